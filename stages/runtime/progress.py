"""Progress bars over everything that takes long."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

from models.ranks import is_first_rank

T = TypeVar("T")


def progress(total: int, label: str, *, initial: int = 0, delay: float = 0.0) -> tqdm[Any]:
    """A progress bar on a terminal; in a log, a line at the start and then every half minute.

    Args:
        total: of what is counted.
        label: what is done.
        initial: what is done already.
        delay: seconds without any bar, for what is mostly done before.
    """
    interval = 0.5 if sys.stderr.isatty() else 30.0
    return _Bar(
        total=total,
        initial=initial,
        desc=label,
        delay=delay,
        mininterval=min(interval, delay or interval),
        maxinterval=interval,
        miniters=1,  # the time alone decides: items are slow and of different size
        dynamic_ncols=True,
        disable=not is_first_rank(),
    )


class _Bar(tqdm):
    """A bar whose first line may come sooner than the interval between lines."""

    def display(self, *arguments: Any, **named: Any) -> Any:
        self.mininterval = self.maxinterval
        return super().display(*arguments, **named)


def in_batches(count: int, batch_size: int, label: str) -> Generator[list[int], None, None]:
    """The positions 0 to `count - 1` in batches, in order, with a progress bar over them."""
    with progress(count, label) as bar:
        for start in range(0, count, batch_size):
            batch = list(range(start, min(start + batch_size, count)))
            yield batch
            bar.update(len(batch))


def tracked(results: Iterator[T], total: int, label: str, *, delay: float = 0.0) -> Generator[T, None, None]:
    """Draw a progress bar over results that arrive one by one; closed, it lets go of them, and their workers end."""
    with progress(total, label, delay=delay) as bar:
        for result in results:
            bar.update()
            yield result
