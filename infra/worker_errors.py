"""What goes wrong in worker processes, and how it travels home."""

from __future__ import annotations

import pickle
import traceback


class WorkerFailed(RuntimeError):
    """An exception in a worker that cannot travel between processes as itself; the message names its type."""


class WorkerDied(RuntimeError):
    """Worker processes died again and again; the message says how often and what was left to do."""


def portable(error: Exception) -> Exception:
    """The exception with its traceback as a note, or a WorkerFailed where it does not survive pickling."""
    error.add_note("in the worker:\n" + "".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a foreign class's pickling may raise
        failed = WorkerFailed(f"{type(error).__name__}: {error}")
        for note in error.__notes__:
            failed.add_note(note)
        return failed
    return error


def is_worker_death(error: BaseException | None) -> bool:
    """Whether the death of one of Ray's actors is among an exception and its causes."""
    from ray.exceptions import ActorDiedError, ActorUnavailableError, WorkerCrashedError

    while error is not None:
        if isinstance(error, (ActorDiedError, ActorUnavailableError, WorkerCrashedError)):
            return True
        error = getattr(error, "cause", None) or error.__cause__
    return False
