"""Object stores: bytes under keys, in a local folder or an S3 bucket."""
