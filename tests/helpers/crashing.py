"""A store that dies at a chosen call, and stays dead, as a process does that is killed there."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

from storage.objects.object_store import ObjectStore
from storage.store import Store

Side = Literal["before", "after"]


class Died(BaseException):
    """The process is gone: no handler of errors runs, and what `finally` does no longer reaches the store."""


Dies = Callable[[int, str, str, Side], bool]
"""Whether to die, given a call's number, its name, its key or other first argument, and the side of it."""


class DyingBackend:
    """Counts the calls of a back end; the one that is chosen raises, before or after it is done, as all later ones do.

    Attributes:
        calls: names of the calls so far.
    """

    def __init__(self, backend: Any, dies: Dies) -> None:
        self._backend, self._dies, self._dead = backend, dies, False
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        if not callable(found) or name == "local_path":
            return found

        def call(*arguments: Any, **named: Any) -> Any:
            number, key = len(self.calls), str(arguments[0]) if arguments else ""
            self.calls.append(name)
            self._die_if_chosen(number, name, key, "before")
            try:
                return found(*arguments, **named)
            finally:  # also after an object that is not there
                self._die_if_chosen(number, name, key, "after")

        return call

    def _die_if_chosen(self, number: int, name: str, key: str, side: Side) -> None:
        self._dead = self._dead or self._dies(number, name, key, side)
        if self._dead:
            raise Died(f"{side} {name}, call {number}")


def dying(store: Store, dies: Dies) -> tuple[Store, DyingBackend]:
    """The same store, opened anew, that dies where it is told to."""
    opened = Store(store.uri)
    objects = opened.objects
    objects._backend = DyingBackend(objects._backend, dies)  # type: ignore[assignment]
    # in the order of the program: with threads, which call is the n-th would be chance
    objects.map = lambda function, items: [function(item) for item in items]  # type: ignore[method-assign]
    assert isinstance(objects, ObjectStore)
    return opened, objects._backend  # type: ignore[return-value]


def dying_once_written(store: Store, pattern: str) -> Store:
    """The same store, opened anew, that dies when an object whose key matches a regular expression is written."""

    def dies(number: int, name: str, key: str, side: Side) -> bool:
        return side == "after" and name in ("create", "put") and re.search(pattern, key) is not None

    return dying(store, dies)[0]


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
    counting, backend = dying(fresh(), lambda *_: False)
    work(counting)
    for first, side in ((0, "before"), (every // 2, "after")):
        for at in range(first, len(backend.calls), every):
            store = fresh()
            chosen = (at, side)
            try:
                work(dying(store, lambda number, name, key, when, chosen=chosen: (number, when) == chosen)[0])
                raise AssertionError(f"call {at} of {len(backend.calls)} was not reached")
            except Died:
                check(store)
    return len(backend.calls)
