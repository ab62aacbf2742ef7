"""Commands in the tests' own process: what they do to its loggers ends with the test."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture
def fresh_loggers() -> Iterator[None]:
    """The project's loggers as a new process has them, for a test; afterwards they are what they were."""
    loggers = [logging.getLogger(name) for name in ("stages", "infra", "storage")]
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.NOTSET)
        logger.propagate, logger.handlers = True, []
    yield
    for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.propagate, logger.handlers = propagate, handlers
