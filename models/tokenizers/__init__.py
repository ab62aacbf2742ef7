"""Image tokenizers: encoders, quantizers, decoders and their training losses."""
