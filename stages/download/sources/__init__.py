"""Where image-text pairs come from: URL lists, and files that people already have. All give rows, then bytes."""
