"""The stage that encodes image shards into a table of visual codes."""
