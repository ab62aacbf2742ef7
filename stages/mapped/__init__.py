"""The engine of stages that map over shards: download, tokenize, evaluate."""
