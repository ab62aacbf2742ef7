"""The pipeline's stages, one package each, and the packages that they share.

A stage's package holds `stage.py` (its config class, its `run` and its `STAGE`), the modules that only this stage
needs,
and `__main__.py`, so that `python -m stages.NAME` runs it. No stage imports another: they meet only through artifacts
in the store. From the bottom up, the others are: `protocol` (what a stage is), `runtime` (devices, child processes),
`artifacts` (images, models and rows of earlier stages), `metrics`, `training` (the training loop), `language`
(sequences and the training of language models), and above the stages `pipeline` (the recipe over all of them, and what
runs them).
"""
