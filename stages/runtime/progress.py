"""Progress bars of everything that takes long."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

from models.ranks import is_first_rank

T = TypeVar("T")


def progress(total: int, label: str, *, initial: int = 0, delay: float = 0.0) -> tqdm[Any]:
    """Build a progress bar for a terminal; in a log it prints a line at the start and then every half minute.

    Args:
        total: total count.
        label: description of the work.
        initial: count that is done already.
        delay: seconds before the bar appears, for work that is usually done sooner.
    """
    interval = 0.5 if sys.stderr.isatty() else 30.0
    return _Bar(
        total=total,
        initial=initial,
        desc=label,
        delay=delay,
        mininterval=min(interval, delay or interval),
        maxinterval=interval,
        miniters=1,  # updates depend on time only, because items are slow and of different size
        dynamic_ncols=True,
        disable=not is_first_rank(),
    )


class _Bar(tqdm):
    """A bar whose first line may appear earlier than the interval between lines."""

    def display(self, *arguments: Any, **named: Any) -> Any:
        self.mininterval = self.maxinterval
        return super().display(*arguments, **named)


def in_batches(count: int, batch_size: int, label: str) -> Generator[list[int], None, None]:
    """Yield the indices 0 to `count - 1` in batches, with a progress bar."""
    with progress(count, label) as bar:
        for start in range(0, count, batch_size):
            batch = list(range(start, min(start + batch_size, count)))
            yield batch
            bar.update(len(batch))


def tracked(results: Iterator[T], total: int, label: str, *, delay: float = 0.0) -> Generator[T, None, None]:
    """Yield results with a progress bar; closing this generator closes `results`, which ends its workers."""
    with progress(total, label, delay=delay) as bar:
        for result in results:
            bar.update()
            yield result
