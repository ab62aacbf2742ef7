"""Retries with exponential back-off of S3 calls: 500, 503 SlowDown, time-outs, broken connections.

All retries happen here. The retry loops of botocore and s3fs, which each cover only some of these failures and would
multiply, are switched off (`storage.objects.s3`).
"""

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from storage.errors import on_one_line

logger = logging.getLogger(__name__)

ATTEMPTS = 7
"""Number of attempts before a failure is final: 6 to 19 s of back-off in total, longer than a usual disruption."""
QUICK_ATTEMPTS = 3
"""Number of attempts of the first call, when a wrong address is more likely than a disruption."""
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
    """Retry a call with exponential back-off until it succeeds or the attempts are used up.

    Args:
        what: description of the call for the log.
        call: the call, which must be idempotent, as its answer may be lost.
        attempts: largest number of attempts; default ATTEMPTS.

    Raises:
        Exception: the error of the last attempt, or the first error that is not transient.
    """
    attempts = ATTEMPTS if attempts is None else attempts
    for attempt in range(1, attempts):
        try:
            return call()
        except Exception as error:
            if not is_transient(error):
                raise
            logger.info("S3: %s failed (%s), attempt %d of %d", what, described(error), attempt, attempts)
        time.sleep(min(FIRST_BACKOFF_S * 2 ** (attempt - 1), _LONGEST_BACKOFF_S) * (0.5 + random.random()))
    return call()


def is_transient(error: BaseException) -> bool:
    """Return whether an error is transient, so that a retry may succeed."""
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
    """Return whether an exception comes from the S3 client rather than from a mistake in the calling code."""
    return type(error).__module__.partition(".")[0] in ("botocore", "aiobotocore", "aiohttp")


def s3_error(error: BaseException) -> tuple[str, int]:
    """Return S3's error code and HTTP status of an exception of s3fs ('' and 0 if there is none)."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None) or {}
    code = response.get("Error", {}).get("Code", "")
    return code, int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def described(error: BaseException) -> str:
    """Return an exception's type and message on one line."""
    return on_one_line(f"{type(error).__name__}: {error}")
