"""Preparation of the frozen encoder whose semantic features the tokenizers use."""
