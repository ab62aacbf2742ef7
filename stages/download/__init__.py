"""The stage that turns sources of image-text pairs into image shards."""
