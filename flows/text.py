"""Formatting of text for terminals and logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tqdm import tqdm

from infra.terminal import printable

if TYPE_CHECKING:
    from storage.manifest import FileEntry


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format rows as left-aligned columns without wrapping, or as a text that says that there are no rows.

    Cells may contain untrusted text: line breaks become spaces, and control characters are escaped.
    """
    if not rows:
        return "nothing there yet"
    names, *cells = ([one_line(cell) for cell in line] for line in [header, *rows])
    widths = [max(len(line[column]) for line in [names, *cells]) for column in range(len(names))]
    lines = [names, ["-" * width for width in widths], *cells]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def one_line(text: str) -> str:
    """Return untrusted text on one line, with control characters escaped."""
    return printable(" ".join(text.splitlines()))


@contextmanager
def byte_bar(label: str, total: int) -> Iterator[Callable[[FileEntry], object]]:
    """Show a progress bar over files, which appears after five seconds.

    Args:
        label: description of the work.
        total: total size of the files in bytes.

    Yields:
        The function to call after each file.
    """
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, delay=5, mininterval=5, miniters=1) as bar:
        yield lambda entry: bar.update(entry.size)


def megabytes(size: int) -> str:
    """Format a number of bytes as `12.3 MB`."""
    return f"{size / 1e6:.1f} MB"
