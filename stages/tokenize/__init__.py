"""From image shards to a table of visual codes."""
