"""From image-text pairs, wherever they lie, to image shards."""
