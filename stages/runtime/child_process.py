"""Runs a function in a child process, so that a crash of the function is reported to the caller and does not kill it.

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

from infra.terminal import on_one_line

DEATHS_BEFORE_ISOLATION = 2
"""After this many deaths of workers, a shard is processed in a child process to find the images that crash it. The
first death is treated as chance: a lost machine, or memory taken by another process."""
TRIES = 2
"""Number of attempts with a single image before it is treated as the cause; one failure may be chance."""
_PATIENCE_S = 10
"""Seconds that a child process may take to exit by itself."""
_BROKEN_OFF = (EOFError, BrokenPipeError, pickle.UnpicklingError)


class ChildDied(RuntimeError):
    """Raised if the child process died while it processed its arguments."""


class ChildCannotStart(RuntimeError):
    """Raised if the child process died before it received arguments."""


class RaisedInChild(RuntimeError):
    """Stands for an exception of the child process, whose type may not be picklable."""

    def __init__(self, type_name: str, text: str) -> None:
        super().__init__(type_name, text)
        self.type_name, self.text = type_name, text


def described(error: BaseException) -> str:
    """Return an exception's type and text on one line, the same whichever process raised it."""
    raised = (error.type_name, error.text) if isinstance(error, RaisedInChild) else (type(error).__name__, str(error))
    return on_one_line(": ".join(raised))


class ChildProcess:
    """A function in a child process, which is started on first use and restarted after it died.

    Args:
        factory: picklable; builds the function in the child process.
    """

    def __init__(self, factory: Callable[[], Callable[..., Any]]) -> None:
        self._factory = factory
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ChildProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, *arguments: Any) -> Any:
        """Call the function in the child process and return its result.

        Raises:
            ChildDied: the child process died with these arguments.
            ChildCannotStart: it died before.
            MemoryError: the function raised MemoryError.
            RaisedInChild: the function raised another exception.
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
        """End the child process; return its exit code, or None if there was none."""
        if self._child is None:
            return None
        child, self._child = self._child, None
        assert child.stdin is not None and child.stdout is not None
        with suppress(BrokenPipeError):
            child.stdin.close()  # the child exits at the end of its input
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
    """Serve as the child process: build the function, then call it with each arguments until the input ends."""

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
    """Serve on stdin and stdout; other output to stdout is redirected to stderr."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes; the parent ends this one
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
