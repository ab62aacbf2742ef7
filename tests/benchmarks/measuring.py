"""Time, peak memory and the JSON line of each case."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Measured:
    """What repeated calls took."""

    seconds: float
    """Median of the calls."""
    extra_bytes: int
    """Most memory above that before the calls: resident on a CPU, allocated on a GPU."""


def measure(call: Callable[[], object], device: torch.device, *, repeats: int) -> Measured:
    """Call once to warm up, then `repeats` times."""
    call()
    gc.collect()
    if device.type == "cuda":
        return _measure_gpu(call, repeats)
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed is given back, so that growth shows
    before = _resident_bytes()
    with _Watch() as watch:
        times = [_timed(call) for _ in range(repeats)]
    return Measured(statistics.median(times), watch.peak - before)


def report(name: str, ours: float, peer: float, unit: str) -> None:
    """Print one JSON line; `ratio` is the peer's figure over ours."""
    line = {"name": name, "ours": round(ours, 5), "peer": round(peer, 5), "unit": unit, "ratio": round(peer / ours, 3)}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _measure_gpu(call: Callable[[], object], repeats: int) -> Measured:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return Measured(statistics.median(times), torch.cuda.max_memory_allocated() - before)


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class _Watch:
    """Samples resident memory every two milliseconds."""

    def __enter__(self) -> _Watch:
        self.peak = _resident_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, _resident_bytes())
