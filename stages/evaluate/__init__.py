"""Evaluation on held-out pairs."""
