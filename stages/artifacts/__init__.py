"""What stages read of the artifacts of earlier ones: images, models, rows of a code table."""
