"""Content-addressed artifacts, the tables in them, and their readers and writers. No torch, no Ray."""
