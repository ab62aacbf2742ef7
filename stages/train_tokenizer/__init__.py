"""Training of an image tokenizer on image shards."""
