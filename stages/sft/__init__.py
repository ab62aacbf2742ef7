"""Supervised fine-tuning on a mixture of questions about images and requests to draw them."""
