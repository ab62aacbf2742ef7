"""A failed fetch as an exception whose text passes through img2dataset, which keeps no more of it than that."""

from __future__ import annotations

import re

from stages.download.sources.source import NOT_FETCHED, OPTED_OUT, REFUSED, STATUSES, Failure

_SPELLED = re.compile(r"\[([a-z_]+)\] (.*)", re.DOTALL)


class FetchFailed(Exception):
    """A URL gave no image.

    Args:
        status: one of `STATUSES`.
        reason: the same words for the same cause.
        try_again: whether another attempt may help.
        wait_s: how long the server asks to wait before it.
    """

    def __init__(self, status: str, reason: str, *, try_again: bool = False, wait_s: float | None = None) -> None:
        super().__init__(f"[{status}] {reason}")
        self.status, self.reason, self.try_again, self.wait_s = status, reason, try_again, wait_s


def read_failure(message: str | None) -> Failure:
    """What an error message of img2dataset stands for."""
    text = message or "no reason given"
    spelled = _SPELLED.fullmatch(text)
    if spelled and spelled[1] in STATUSES:
        return Failure(spelled[1], spelled[2])
    if "X-Robots-Tag" in text:
        return Failure(OPTED_OUT, text)
    if text.startswith("unknown url type"):  # urllib's word, before the request reaches the opener
        return Failure(REFUSED, "not a URL that can be fetched")
    return Failure(NOT_FETCHED, text)
