"""Set-up of a process that runs stages."""

import logging
import os
import sys

from infra.terminal import LogFormatter


def prepare_process() -> None:
    """Set up logging."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter())
    for package in ("stages", "infra", "storage"):
        package_logger = logging.getLogger(package)
        package_logger.setLevel(logging.INFO)
        package_logger.propagate = False
        if not package_logger.handlers:
            package_logger.addHandler(handler)
