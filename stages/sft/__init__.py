"""Supervised fine-tuning on a mixture of questions about images and prompts to generate them."""
