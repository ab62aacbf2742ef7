"""Calls of an S3 service that outlast its bad moments: 500, 503 SlowDown, time-outs, connections that break.

This is the one place that tries again. botocore and s3fs have loops of their own, which between them retry some of
these and not others, and which multiply; both are switched off (`objects_s3`).
"""

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

logger = logging.getLogger(__name__)

ATTEMPTS = 7
"""How often a call is made before its failure is final: 6 to 19 s of waiting, longer than a usual hiccup."""
QUICK_ATTEMPTS = 3
"""The same at the start, where a wrong address is likelier than a hiccup."""
FIRST_BACKOFF_S = 0.2
_LONGEST_BACKOFF_S = 10.0
_TRANSIENT_CODES = {
    "BadDigest",
    "IncompleteBody",
    "InternalError",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "ThrottlingException",
    "XAmzContentSHA256Mismatch",
}
_TRANSIENT_STATUS = (408, 429)

_Result = TypeVar("_Result")


def steadily(what: str, call: Callable[[], _Result], *, attempts: int | None = None) -> _Result:
    """Call until it works, a bounded number of times, waiting longer each time.

    Args:
        what: the call, for the log.
        call: may be repeated: a repetition after a lost answer must do no harm.
        attempts: how often at most; default ATTEMPTS.

    Raises:
        Exception: what the last attempt raised, or the first one that no repetition would mend.
    """
    attempts = ATTEMPTS if attempts is None else attempts
    for attempt in range(1, attempts):
        try:
            return call()
        except Exception as error:
            if not is_transient(error):
                raise
            logger.info("S3: %s failed (%s), attempt %d of %d", what, one_line(error), attempt, attempts)
        time.sleep(min(FIRST_BACKOFF_S * 2 ** (attempt - 1), _LONGEST_BACKOFF_S) * (0.5 + random.random()))
    return call()


def is_transient(error: BaseException) -> bool:
    """Say whether the same call may work a moment later."""
    import botocore.exceptions as botocore_errors
    from botocore.parsers import ResponseParserError

    code, status = s3_error(error)
    if status:
        return status >= 500 or status in _TRANSIENT_STATUS or code in _TRANSIENT_CODES
    broken_connection = (
        botocore_errors.ConnectionError,
        botocore_errors.HTTPClientError,
        botocore_errors.IncompleteReadError,
        botocore_errors.ResponseStreamingError,
        ResponseParserError,
        ConnectionError,
        TimeoutError,
    )
    return isinstance(error, broken_connection) or type(error).__module__.partition(".")[0] == "aiohttp"


def is_transport_error(error: BaseException) -> bool:
    """Say whether an exception comes from the S3 client rather than from a mistake in the calling code."""
    return type(error).__module__.partition(".")[0] in ("botocore", "aiobotocore", "aiohttp")


def s3_error(error: BaseException) -> tuple[str, int]:
    """Return S3's error code and the HTTP status behind an exception of s3fs ('' and 0 when there is none)."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None) or {}
    code = response.get("Error", {}).get("Code", "")
    return code, int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def one_line(error: BaseException) -> str:
    """Return an exception's message on one line, with its type where the message alone says little."""
    return " ".join(f"{type(error).__name__}: {error}".split())
