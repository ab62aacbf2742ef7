"""Sources of image-text pairs: URL lists and existing files. Each returns its rows first, then the images' bytes."""
