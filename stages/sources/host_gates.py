"""Manners towards hosts: so many connections at a time to each, and none while it asks to wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class _Gate:
    def __init__(self, connections: int) -> None:
        self.free = threading.BoundedSemaphore(connections)
        self.opens_at = 0.0


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
        """Wait until a connection to the host is free and it takes requests again; hold it within the block."""
        gate = self._gate(host)
        with gate.free:
            time.sleep(max(0.0, gate.opens_at - time.monotonic()))
            yield

    def close_for(self, host: str, seconds: float) -> None:
        """Let nobody through for so long."""
        gate = self._gate(host)
        with self._lock:
            gate.opens_at = max(gate.opens_at, time.monotonic() + seconds)

    def _gate(self, host: str) -> _Gate:
        with self._lock:
            return self._gates.setdefault(host, _Gate(self._connections))
