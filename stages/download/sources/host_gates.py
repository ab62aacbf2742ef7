"""Manners towards hosts: so many connections at a time to each, and none while it asks to wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from stages.download.sources.failures import FetchFailed
from stages.download.sources.source import HTTP_ERROR

MOST_CLOSINGS = 10
"""So many times in a row a host may ask to wait; a list full of a host that is shut would wait for hours otherwise."""


class _Gate:
    def __init__(self, connections: int) -> None:
        self.free = threading.BoundedSemaphore(connections)
        self.opens_at = 0.0
        self.closings = 0


class HostGates:
    """One gate a host, shared by all threads of a process.

    Args:
        connections: at a time to one host.
    """

    def __init__(self, connections: int) -> None:
        self._connections = connections
        self._gates: dict[str, _Gate] = {}
        self._lock = threading.Lock()

    @contextmanager
    def through(self, host: str) -> Iterator[None]:
        """Wait until a connection to the host is free and it takes requests again; hold it within the block.

        Raises:
            FetchFailed: it asked to wait again and again, and served nothing in between.
        """
        gate = self._gate(host)
        with gate.free:
            if gate.closings >= MOST_CLOSINGS:
                raise FetchFailed(HTTP_ERROR, "given up: the host only ever asked to wait")
            time.sleep(max(0.0, gate.opens_at - time.monotonic()))
            yield

    def close_for(self, host: str, seconds: float) -> None:
        """Let nobody through for so long; requests that were under way together count once."""
        gate = self._gate(host)
        with self._lock:
            gate.closings += gate.opens_at <= time.monotonic()
            gate.opens_at = max(gate.opens_at, time.monotonic() + seconds)

    def served(self, host: str) -> None:
        """The host answered a request."""
        gate = self._gate(host)
        with self._lock:
            gate.closings = 0

    def _gate(self, host: str) -> _Gate:
        with self._lock:
            return self._gates.setdefault(host, _Gate(self._connections))
