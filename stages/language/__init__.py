"""Token sequences of text and visual codes, and training code that pretraining and fine-tuning share."""
