"""The frozen encoder that gives semantic features."""
