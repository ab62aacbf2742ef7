"""The training loop, in one process or in several with data parallelism."""
