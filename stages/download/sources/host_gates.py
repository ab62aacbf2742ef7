"""Rate limits per host: a maximum of concurrent connections, and no request while the host asks to wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from stages.download.sources.failures import FetchFailed
from stages.download.sources.source import HTTP_ERROR

MOST_CLOSINGS = 10
"""Number of times in a row that a host may ask to wait; a list of many URLs of a blocked host would wait for hours."""


class _Gate:
    def __init__(self, connections: int) -> None:
        self.free = threading.BoundedSemaphore(connections)
        self.opens_at = 0.0
        self.closings = 0


class HostGates:
    """The rate limits of all hosts, shared by the threads of a process.

    Args:
        connections: largest number of concurrent connections to one host.
    """

    def __init__(self, connections: int) -> None:
        self._connections = connections
        self._gates: dict[str, _Gate] = {}
        self._lock = threading.Lock()

    @contextmanager
    def through(self, host: str) -> Iterator[None]:
        """Wait for a free connection slot and for the end of the host's requested wait; hold the slot in the block.

        Raises:
            FetchFailed: the host has asked to wait too many times in a row.
        """
        gate = self._gate(host)
        with gate.free:
            if gate.closings >= MOST_CLOSINGS:
                raise FetchFailed(HTTP_ERROR, "given up: the host only ever asked to wait")
            time.sleep(max(0.0, gate.opens_at - time.monotonic()))
            yield

    def close_for(self, host: str, seconds: float) -> None:
        """Block requests to a host for some seconds; concurrent requests that are told to wait count once."""
        gate = self._gate(host)
        with self._lock:
            gate.closings += gate.opens_at <= time.monotonic()
            gate.opens_at = max(gate.opens_at, time.monotonic() + seconds)

    def served(self, host: str) -> None:
        """Record that the host has answered a request, which resets the count of waits."""
        gate = self._gate(host)
        with self._lock:
            gate.closings = 0

    def _gate(self, host: str) -> _Gate:
        with self._lock:
            return self._gates.setdefault(host, _Gate(self._connections))
