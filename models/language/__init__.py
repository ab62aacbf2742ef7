"""The unified language model: vocabulary, heads, sampling and decoding."""
