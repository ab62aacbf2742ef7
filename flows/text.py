"""Plain text for terminals and logs."""

from __future__ import annotations

from collections.abc import Sequence

from stages.errors import printable


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns that are never wrapped, safe for a terminal; says so when there are no rows."""
    if not rows:
        return "nothing there yet"
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def megabytes(size: int) -> str:
    """Bytes as `12.3 MB`."""
    return f"{size / 1e6:.1f} MB"
