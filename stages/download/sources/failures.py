"""The exception of a failed fetch, and its text form, which is all that img2dataset keeps of an exception."""

from __future__ import annotations

import re

from stages.download.sources.source import NOT_FETCHED, OPTED_OUT, REFUSED, STATUSES, Failure

_SPELLED = re.compile(r"\[([a-z_]+)\] (.*)", re.DOTALL)


class FetchFailed(Exception):
    """Raised if a URL gives no image.

    Args:
        status: one of `STATUSES`.
        reason: the cause, in the same words for every URL with the same cause.
        try_again: whether a retry may help.
        wait_s: seconds that the server asks to wait before a retry, if any.
    """

    def __init__(self, status: str, reason: str, *, try_again: bool = False, wait_s: float | None = None) -> None:
        super().__init__(f"[{status}] {reason}")
        self.status, self.reason, self.try_again, self.wait_s = status, reason, try_again, wait_s


def read_failure(message: str | None) -> Failure:
    """Parse an error message of img2dataset."""
    text = message or "no reason given"
    spelled = _SPELLED.fullmatch(text)
    if spelled and spelled[1] in STATUSES:
        return Failure(spelled[1], spelled[2])
    if "X-Robots-Tag" in text:
        return Failure(OPTED_OUT, text)
    if text.startswith("unknown url type"):  # raised by urllib before the request reaches the opener
        return Failure(REFUSED, "not a URL that can be fetched")
    return Failure(NOT_FETCHED, text)
