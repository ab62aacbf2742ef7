"""A store that dies at its n-th call, and stays dead, as a process does that is killed there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from storage.objects.object_store import ObjectStore
from storage.store import Store

Side = Literal["before", "after"]


class Died(BaseException):
    """The process is gone: no handler of errors runs, and what `finally` does no longer reaches the store."""


class DyingBackend:
    """Counts the calls of a back end; call `at` raises, before or after it is done, and so does every later one.

    Attributes:
        calls: names of the calls so far.
    """

    def __init__(self, backend: Any, at: int | None, side: Side) -> None:
        self._backend, self._at, self._side = backend, at, side
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        if not callable(found) or name == "local_path":
            return found

        def call(*arguments: Any, **named: Any) -> Any:
            number = len(self.calls)
            self.calls.append(name)
            if self._at is not None and (number > self._at or (number == self._at and self._side == "before")):
                raise Died(f"{name}, call {number}")
            result = found(*arguments, **named)
            if number == self._at:
                raise Died(f"after {name}, call {number}")
            return result

        return call


def dying(store: Store, at: int | None, side: Side = "before") -> tuple[Store, DyingBackend]:
    """The same store, opened anew, that dies at call `at`; None never dies and counts only."""
    opened = Store(store.uri)
    objects = opened.objects
    objects._backend = DyingBackend(objects._backend, at, side)  # type: ignore[assignment]
    # in the order of the program: with threads, which call is the n-th would be chance
    objects.map = lambda function, items: [function(item) for item in items]  # type: ignore[method-assign]
    assert isinstance(objects, ObjectStore)
    return opened, objects._backend  # type: ignore[return-value]


def die_everywhere(
    fresh: Callable[[], Store], work: Callable[[Store], object], check: Callable[[Store], None], *, every: int = 1
) -> int:
    """Do `work` on fresh stores, dying before and after its calls; then `check` each, which resumes the work.

    Args:
        fresh: makes a store in which the work has not begun.
        work: calls the store in an order of its own.
        check: takes the store that is left.
        every: 1 dies at every call; 5 at every fifth, beginning elsewhere on the other side.

    Returns:
        How many calls the work has.
    """
    counting, backend = dying(fresh(), None)
    work(counting)
    for first, side in ((0, "before"), (every // 2, "after")):
        for at in range(first, len(backend.calls), every):
            store = fresh()
            try:
                work(dying(store, at, side)[0])
                raise AssertionError(f"call {at} of {len(backend.calls)} was not reached")
            except Died:
                check(store)
    return len(backend.calls)
