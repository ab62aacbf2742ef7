"""Plain PyTorch modules: tokenizers, teachers, losses, vocabulary, the unified VLM, sampling and metrics.

Nothing in this package knows about Ray, Prefect, the artifact store or files: modules take tensors and
configurations and return tensors, so that every one of them runs in a notebook as it does in a cluster.
"""
