"""What comes from elsewhere is shown on a terminal and does nothing there."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable

import pytest

from infra.terminal import LogFormatter, printable, said_if_slow, say

HOSTILE = {
    "\x1b[2J\x1b]0;title\x07": r"\x1b[2J\x1b]0;title\x07",  # clears the screen, names the window
    "\x9b31m": r"\x9b31m",  # the same in one byte
    "good\rbad": r"good\rbad",
    "a\x00b\x08\x7f": r"a\x00b\x08\x7f",
    "user\u202etxt.exe": r"user\u202etxt.exe",  # shown as "userexe.txt"
    "\u2066a\u2069\u200f\u061c": r"\u2066a\u2069\u200f\u061c",
    "\ufeffa\u2028b\u2029": r"\ufeffa\u2028b\u2029",
    "\U000e0041hidden": r"\U000e0041hidden",
    "\udc80": r"\udc80",
}


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_terminal_would_obey_or_reorder_is_spelled_out(text: str) -> None:
    assert printable(text) == HOSTILE[text]
    assert printable(text, lines=True) == HOSTILE[text]


@pytest.mark.parametrize("text", ["", "plain", "größe, 猫, עברית, عربى", "👩\u200d🚀", "n\u00a0b", "می\u200cخواهم"])
def test_other_text_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


def test_line_breaks_stay_only_where_lines_are_ours() -> None:
    assert printable("a\n\tb") == r"a\n\tb"
    assert printable("a\n\tb\r", lines=True) == "a\n\tb\\r"


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", r"a\u732b\x1b" + "\n"), ("utf-8", "a猫\\x1b\n")])
def test_what_a_stream_cannot_show_is_spelled_out_too(encoding: str, shown: str) -> None:
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding=encoding)
    say("a猫\x1b", file=stream)
    stream.flush()
    assert buffer.getvalue().decode("utf-8") == shown


def test_a_log_line_is_one_line_and_a_traceback_keeps_its_own() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LogFormatter())
    logger = logging.Logger("test")
    logger.addHandler(handler)
    logger.warning("skipped %s", "a\nmusevl: all is well\x1b[2J")
    try:
        raise ValueError("bad\x1b[2J")
    except ValueError:
        logger.exception("failed")
    first, *others = stream.getvalue().splitlines()
    assert first == r"skipped a\nmusevl: all is well\x1b[2J"
    assert others[0] == "failed" and others[-1] == r"ValueError: bad\x1b[2J" and len(others) > 3


def test_what_takes_long_says_what_it_is_and_what_does_not_says_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with said_if_slow("loading"):
        pass
    assert capsys.readouterr().err == ""
    seconds = []

    class Passed:
        """A timer whose time is up at once."""

        def __init__(self, after: float, function: Callable[..., None], args: list[str], kwargs: object) -> None:
            seconds.append(after)
            self.start = lambda: function(*args, file=sys.stderr)

        def cancel(self) -> None:
            pass

    monkeypatch.setattr("threading.Timer", Passed)
    with said_if_slow("loading"):
        assert (capsys.readouterr().err, seconds) == ("loading\n", [30.0])
