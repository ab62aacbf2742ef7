"""Safe output of untrusted text to a terminal or a log.

Captions, URLs, host names, answers of models and messages of libraries may contain control sequences that a terminal
obeys (colours, cursor movement, window title, clipboard) or characters that change the reading order.
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
"""Unicode categories that are escaped: control, format (bidirectional overrides), surrogate, line and paragraph
ends."""
_SHOWN = "\u200c\u200d"
"""Joiners, which are not escaped: emoji and Persian and Indian words need them to shape their neighbours."""


def printable(text: str, longest: int | None = None, *, lines: bool = False) -> str:
    r"""Escape control and format characters, as `\x1b` and `\u202e`.

    Args:
        text: untrusted text.
        longest: length at which the text is truncated, with an ellipsis as its last character; None for no limit.
        lines: whether `\n` and tabs are kept, for text that our own code has divided into lines.
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


def on_one_line(text: object, longest: int | None = None) -> str:
    """Return a text, or an exception's message, with all white space as single spaces; truncated at a length."""
    return " ".join(str(text).split())[:longest]


def say(text: object, *, file: TextIO | None = None) -> None:
    """Print text of one or more lines, with control characters and what the stream cannot encode escaped."""
    stream = sys.stdout if file is None else file
    shown = printable(str(text), lines=True)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(shown.encode(encoding, "backslashreplace").decode(encoding), file=stream)


@contextmanager
def said_if_slow(text: str) -> Iterator[None]:
    """Print a text on stderr if the block takes longer than five seconds (terminal) or half a minute (log)."""
    timer = threading.Timer(5.0 if sys.stderr.isatty() else 30.0, say, [text], {"file": sys.stderr})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class LogFormatter(logging.Formatter):
    """Formats each record as one line, escaped as by `printable`; tracebacks below it keep their lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        """Return the line and the traceback that follows it."""
        return printable(super().format(record), lines=True)
