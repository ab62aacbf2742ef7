"""The pipeline's stages: one module a stage, and the few modules that stages share.

A stage module holds its config class, its `run` and its `STAGE`; it never imports another stage module: stages meet
only through artifacts in the store.
"""
