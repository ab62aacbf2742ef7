"""`python -m stages.prepare_teacher`, which is what `ray job submit` runs."""

import importlib

if __name__ == "__main__":
    # By name: what runs stages knows every stage, and no stage knows it
    raise SystemExit(importlib.import_module("stages.pipeline.command").run_standalone("prepare_teacher"))
