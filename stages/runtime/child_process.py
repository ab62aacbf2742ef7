"""A function in a child process, which it may bring down: its caller lives on and hears of it.

python -m stages.runtime.child_process < pickled factory and arguments > pickled results
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any

DEATHS_BEFORE_ISOLATION = 2
"""A shard on which so many workers died is worked on in a child process, and the images that bring it down are found.
The first death is taken for chance: a machine that went away, memory that somebody else took."""
TRIES = 2
"""How often an image is tried alone before it is taken for the cause; what struck once may have been chance."""
_PATIENCE_S = 10
"""Seconds that a child has to end by itself."""
_BROKEN_OFF = (EOFError, BrokenPipeError, pickle.UnpicklingError)


class ChildDied(RuntimeError):
    """The process died of what it was given."""


class ChildCannotStart(RuntimeError):
    """The process died before it was given anything."""


class RaisedInChild(RuntimeError):
    """An exception in the child, whose type may not travel between processes."""

    def __init__(self, type_name: str, text: str) -> None:
        super().__init__(type_name, text)
        self.type_name, self.text = type_name, text


def described(error: BaseException) -> str:
    """Type and text on one line: the same words whichever process an exception was raised in."""
    raised = (error.type_name, error.text) if isinstance(error, RaisedInChild) else (type(error).__name__, str(error))
    return " ".join(": ".join(raised).split())


class ChildProcess:
    """A function in a child process, which is started when needed and again after it died.

    Args:
        factory: picklable; makes the function in the child.
    """

    def __init__(self, factory: Callable[[], Callable[..., Any]]) -> None:
        self._factory = factory
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ChildProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, *arguments: Any) -> Any:
        """What the function returns.

        Raises:
            ChildDied: the child died of these arguments.
            ChildCannotStart: it died before.
            MemoryError: as in the child.
            RaisedInChild: any other exception there.
        """
        child = self._child or self._start()
        assert child.stdin is not None and child.stdout is not None
        try:
            pickle.dump(arguments, child.stdin)
            child.stdin.flush()
            result, raised = pickle.load(child.stdout)
        except _BROKEN_OFF:
            raise ChildDied(f"a child process ended with exit code {self.close()}") from None
        if raised is None:
            return result
        type_name, text = raised
        raise MemoryError(text) if type_name == MemoryError.__name__ else RaisedInChild(type_name, text)

    def close(self) -> int | None:
        """End the child; its exit code, None where there was no child."""
        if self._child is None:
            return None
        child, self._child = self._child, None
        assert child.stdin is not None and child.stdout is not None
        with suppress(BrokenPipeError):
            child.stdin.close()  # it ends by itself when there are no more arguments
        try:
            child.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        child.stdout.close()
        return child.returncode

    def _start(self) -> subprocess.Popen[bytes]:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._child = child = subprocess.Popen(
            [sys.executable, "-m", "stages.runtime.child_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert child.stdin is not None and child.stdout is not None
        try:
            pickle.dump(self._factory, child.stdin)
            child.stdin.flush()
            pickle.load(child.stdout)
        except _BROKEN_OFF:
            raise ChildCannotStart(f"a child process ended with exit code {self.close()} before it was ready") from None
        return child


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Be the child: make the function, then call it again and again until there are no more arguments."""

    def answer(value: Any) -> None:
        pickle.dump(value, answers)
        answers.flush()

    function = pickle.load(requests)()
    answer("ready")
    while True:
        try:
            arguments = pickle.load(requests)
        except EOFError:
            return
        try:
            result = function(*arguments)
        except Exception as error:  # raised again in the parent
            name = MemoryError.__name__ if isinstance(error, MemoryError) else type(error).__name__
            answer((None, (name, str(error))))
        else:
            answer((result, None))


def main() -> None:
    """Serve on stdin and stdout; whatever else prints goes to stderr."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent says so, and ends this one
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
