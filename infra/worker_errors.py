"""Errors of worker processes, and how they are passed to the driver."""

from __future__ import annotations

import pickle
import traceback


class WorkerFailed(RuntimeError):
    """Stands for an exception of a worker that cannot be pickled; the message names its type."""


class WorkerDied(RuntimeError):
    """Raised if worker processes keep dying; the message says how often and what was left to do."""


def portable(error: Exception) -> Exception:
    """Return the exception with its traceback as a note, or a WorkerFailed if it does not survive pickling."""
    error.add_note("in the worker:\n" + "".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # the pickling of a third-party class may raise anything
        failed = WorkerFailed(f"{type(error).__name__}: {error}")
        for note in error.__notes__:
            failed.add_note(note)
        return failed
    return error


def is_worker_death(error: BaseException | None) -> bool:
    """Return whether an exception or one of its causes is the death of a Ray actor or worker."""
    from ray.exceptions import ActorDiedError, ActorUnavailableError, WorkerCrashedError

    while error is not None:
        if isinstance(error, (ActorDiedError, ActorUnavailableError, WorkerCrashedError)):
            return True
        error = getattr(error, "cause", None) or error.__cause__
    return False
