"""Token sequences of text and visual codes, and what pretraining and fine-tuning share."""
