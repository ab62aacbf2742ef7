"""Conversion of tokenizer weights that other projects have published into this project's state dicts."""
