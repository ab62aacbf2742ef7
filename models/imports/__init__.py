"""Weights that other projects have published, as ours."""
