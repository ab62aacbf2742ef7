"""Readers and writers of artifacts that several stages use: images, models, rows of a code table."""
