"""What training and evaluation measure."""
