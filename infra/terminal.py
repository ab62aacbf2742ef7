"""Text from elsewhere on a terminal or in a log: it is shown, and does nothing.

Captions, URLs, names of hosts, answers of models and messages of libraries may hold what a terminal obeys (colours,
moving the cursor, the title of the window, the clipboard) or what changes the order in which it is read.
"""

from __future__ import annotations

import logging
import sys
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

_SPELLED_OUT = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories: control, format (which bidirectional overrides are among), surrogate, line and paragraph ends."""
_SHOWN = "\u200c\u200d"
"""Joiners, which emoji and Persian and Indian words are written with; they change the shape of their neighbours."""


def printable(text: str, longest: int | None = None, *, lines: bool = False) -> str:
    r"""Spell out control and format characters: `\x1b`, `\u202e`.

    Args:
        text: of any source.
        longest: most characters of it, the last of which says that there were more; None for all.
        lines: whether `\n` and tabs are kept, for text that our own code has put into lines.
    """
    if longest is not None and len(text) > longest:
        text = text[: longest - 1] + "…"
    if text.isprintable():
        return text
    kept = _SHOWN + "\n\t" if lines else _SHOWN
    return "".join(
        character
        if character in kept or unicodedata.category(character) not in _SPELLED_OUT
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def say(text: object, *, file: TextIO | None = None) -> None:
    """Print text of several lines, with what a terminal would obey, or could not show, spelled out."""
    stream = sys.stdout if file is None else file
    shown = printable(str(text), lines=True)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(shown.encode(encoding, "backslashreplace").decode(encoding), file=stream)


@contextmanager
def said_if_slow(text: str) -> Iterator[None]:
    """Say on stderr what the block does, should it take longer: five seconds on a terminal, half a minute in a log."""
    timer = threading.Timer(5.0 if sys.stderr.isatty() else 30.0, say, [text], {"file": sys.stderr})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class LogFormatter(logging.Formatter):
    """A message a line, spelled out as by `printable`; tracebacks below it keep their lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, and what follows it."""
        return printable(super().format(record), lines=True)
