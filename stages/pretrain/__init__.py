"""Pretraining of the unified language model on image-text pairs."""
