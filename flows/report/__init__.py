"""HTML pages about a recipe's run and about a comparison of tokenizers."""
