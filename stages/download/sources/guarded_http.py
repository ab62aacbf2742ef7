"""HTTP client for untrusted URLs: every wait, size, redirect and target has a limit.

`GuardedOpener` replaces urllib's own opener (`urllib.request.install_opener`), so that img2dataset fetches through it.
A host is resolved once, its address is checked, and that address is connected to; the same holds for each redirect.
With a proxy (`http_proxy`, `https_proxy`) the proxy makes the connection, so only the address to which the name
resolves on this machine is checked.
"""

from __future__ import annotations

import base64
import http.client
import io
import random
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
import urllib.response
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from email.message import Message
from email.utils import parsedate_to_datetime

from stages.download.sources.addresses import connect, resolve
from stages.download.sources.failures import FetchFailed
from stages.download.sources.host_gates import HostGates
from stages.download.sources.source import (
    CONNECTION_ERROR,
    HTTP_ERROR,
    MISSING,
    REFUSED,
    TIMEOUT,
    TOO_LARGE,
    TOO_MANY_REDIRECTS,
)

_REDIRECTS = (301, 302, 303, 307, 308)
_WORTH_A_RETRY = (408, 425, 429, 500, 502, 503, 504)
_PORTS = {"http": 80, "https": 443}
_CHUNK_BYTES = 1 << 16
_FIRST_PAUSE_S = 0.5
_SAFE = "%/:=&?~#+!$,;'@()*[]"
_UNREAD_CODINGS = ("br", "zstd", "compress", "x-compress")
_MOST_CODINGS = 3


@dataclass(frozen=True)
class Guard:
    """The limits of one fetch process, as plain values."""

    timeout_s: float
    """Deadline of one request in seconds, from the connection to the last byte."""
    retries: int
    max_bytes: int
    max_redirects: int
    max_retry_after_s: float
    connections_per_host: int
    allow_private_addresses: bool
    private_hosts: tuple[str, ...] = ()
    """Hosts as `host:port` whose addresses need not be public."""
    trusted: tuple[str, ...] = ()
    """Servers of our own as `host:port`, which need neither checks nor rate limits."""


@dataclass
class _Deadline:
    """The deadline of one request, which also interrupts blocking calls on its socket."""

    ends_at: float
    expired: bool = False
    _socket: socket.socket | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def left(self) -> float:
        seconds = self.ends_at - time.monotonic()
        if seconds <= 0 or self.expired:
            raise TimeoutError
        return seconds

    def watch(self, connection: socket.socket | None) -> None:
        """Shut this connection down at the deadline, because a socket's timeout applies to single packets only."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
            # a second handle of the same connection, since TLS takes over the first
            self._socket = None if connection is None else connection.dup()

    def expire(self) -> None:
        self.expired = True
        with self._lock:
            if self._socket is not None:
                try:
                    self._socket.shutdown(socket.SHUT_RDWR)
                except OSError:
                    return  # the peer has closed it already


class GuardedOpener:
    """Opens http and https URLs within the limits of a guard.

    Args:
        guard: the limits.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._gates = HostGates(guard.connections_per_host)
        self._tls = ssl.create_default_context()
        self._proxies = urllib.request.getproxies()

    def open(
        self, request: urllib.request.Request, data: object = None, timeout: object = None
    ) -> urllib.response.addinfourl:
        """Return the whole response in memory; the arguments are those of `urllib.request.OpenerDirector.open`.

        Raises:
            FetchFailed: there is no usable response.
        """
        headers = dict(request.header_items()) | {"Accept-Encoding": "identity", "Connection": "close"}
        for attempt in range(self._guard.retries + 1):
            try:
                return self._follow(request.full_url, headers)
            except FetchFailed as error:
                if not error.try_again or attempt == self._guard.retries:
                    raise
                if error.wait_s is None:  # otherwise the host's rate limit makes the next attempt wait
                    time.sleep(_FIRST_PAUSE_S * 2**attempt * random.uniform(0.5, 1.5))
        raise AssertionError("the last attempt returns or raises")

    def _follow(self, url: str, headers: dict[str, str]) -> urllib.response.addinfourl:
        """Fetch a URL and follow its redirects."""
        where = ""
        for hop in range(self._guard.max_redirects + 1):
            parts, port = _split(where, url)
            where = parts.geturl()
            if parts.scheme == "file" and self._guard.allow_private_addresses and hop == 0:
                return self._read_file(parts)
            if parts.scheme not in _PORTS or not parts.hostname:
                raise FetchFailed(REFUSED, f"URLs of scheme {parts.scheme!r} are not fetched")
            trusted = f"{parts.hostname}:{port}" in self._guard.trusted
            with nullcontext() if trusted else self._gates.through(parts.hostname), self._deadline() as deadline:
                answer = self._ask(parts, port, headers, deadline, trusted=trusted)
            if isinstance(answer, urllib.response.addinfourl):
                return answer
            url = answer
        raise FetchFailed(TOO_MANY_REDIRECTS, f"more than {self._guard.max_redirects} redirects")

    @contextmanager
    def _deadline(self) -> Iterator[_Deadline]:
        deadline = _Deadline(time.monotonic() + self._guard.timeout_s)
        timer = threading.Timer(self._guard.timeout_s, deadline.expire)
        timer.daemon = True
        timer.start()
        try:
            yield deadline
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._failure(error, deadline) from error
        finally:
            timer.cancel()
            deadline.watch(None)

    def _failure(self, error: Exception, deadline: _Deadline) -> FetchFailed:
        if deadline.expired or isinstance(error, TimeoutError):
            return FetchFailed(TIMEOUT, f"no whole answer in {self._guard.timeout_s:g} s", try_again=True)
        if isinstance(error, ssl.SSLCertVerificationError):  # checked first, as it is a ValueError too
            return FetchFailed(CONNECTION_ERROR, f"TLS certificate: {error.verify_message}")
        if isinstance(error, http.client.InvalidURL | ValueError):
            return FetchFailed(REFUSED, "not a URL that can be fetched")
        if isinstance(error, http.client.IncompleteRead):
            return FetchFailed(CONNECTION_ERROR, "the body ended early", try_again=True)
        reason = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
        return FetchFailed(CONNECTION_ERROR, reason, try_again=True)

    def _ask(
        self,
        parts: urllib.parse.SplitResult,
        port: int,
        headers: dict[str, str],
        deadline: _Deadline,
        *,
        trusted: bool,
    ) -> urllib.response.addinfourl | str:
        assert parts.hostname is not None
        connection, target, for_proxy = self._connection(parts, port, deadline, trusted=trusted)
        try:
            connection.request("GET", target, headers=headers | for_proxy)
            with connection.getresponse() as response:
                if response.status in _REDIRECTS and response.headers.get("Location"):
                    return _location(str(response.headers["Location"]))
                if not 200 <= response.status < 300:
                    raise self._refusal(response, parts.hostname)
                self._gates.served(parts.hostname)
                codings = ",".join(response.headers.get_all("Content-Encoding", []))
                body = _unpacked(self._body(response, deadline), codings, self._guard.max_bytes)
                return urllib.response.addinfourl(io.BytesIO(body), response.headers, parts.geturl(), response.status)
        finally:
            connection.close()

    def _connection(
        self, parts: urllib.parse.SplitResult, port: int, deadline: _Deadline, *, trusted: bool
    ) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
        """Return an open connection for a URL, the request target, and headers for a proxy."""
        host = str(parts.hostname)
        query = f"?{parts.query}" if parts.query else ""
        path = urllib.parse.quote((parts.path or "/") + query, safe=_SAFE)
        known = f"{host}:{port}" in self._guard.private_hosts
        private_too = trusted or known or self._guard.allow_private_addresses
        tls = parts.scheme == "https"
        proxy = None if trusted or urllib.request.proxy_bypass(host) else self._proxies.get(parts.scheme)
        if proxy is not None:
            self._check_behind_proxy(host, port, private_too=private_too)
            return self._through_proxy(proxy, host, port, path, deadline, tls=tls)
        raw = connect(host, port, deadline.left, private_too=private_too)
        deadline.watch(raw)
        left = deadline.left()
        if tls:
            secure = http.client.HTTPSConnection(host, port, timeout=left, context=self._tls)
            secure.sock = self._tls.wrap_socket(raw, server_hostname=host)
            return secure, path, {}
        plain = http.client.HTTPConnection(host, port, timeout=left)
        plain.sock = raw
        return plain, path, {}

    def _through_proxy(
        self, proxy: str, host: str, port: int, path: str, deadline: _Deadline, *, tls: bool
    ) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
        where = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        address = str(where.hostname), where.port or 80
        authorization = {}
        if where.username:
            pair = f"{urllib.parse.unquote(where.username)}:{urllib.parse.unquote(where.password or '')}"
            authorization = {"Proxy-Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}
        if tls:
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                *address, timeout=deadline.left(), context=self._tls
            )
            connection.set_tunnel(host, port, headers=authorization)
        else:
            connection = http.client.HTTPConnection(*address, timeout=deadline.left())
        connection.connect()
        deadline.watch(connection.sock)
        return (connection, path, {}) if tls else (connection, f"http://{host}:{port}{path}", authorization)

    def _check_behind_proxy(self, host: str, port: int, *, private_too: bool) -> None:
        try:
            resolve(host, port, private_too=private_too)
        except FetchFailed as error:
            if error.status == REFUSED:
                raise  # other failures are ignored: a name that does not resolve here may resolve at the proxy

    def _body(self, response: http.client.HTTPResponse, deadline: _Deadline) -> bytes:
        expected = response.length
        body = bytearray()
        if expected is not None and expected > self._guard.max_bytes:
            raise FetchFailed(TOO_LARGE, f"more than {self._guard.max_bytes} bytes")
        while chunk := response.read(_CHUNK_BYTES):
            deadline.left()
            body += chunk
            if len(body) > self._guard.max_bytes:
                raise FetchFailed(TOO_LARGE, f"more than {self._guard.max_bytes} bytes")
        if deadline.expired:
            raise TimeoutError
        if expected is not None and len(body) < expected:
            raise http.client.IncompleteRead(bytes(body), expected - len(body))
        return bytes(body)

    def _refusal(self, response: http.client.HTTPResponse, host: str) -> FetchFailed:
        # the server's own reason phrase is untrusted, and this text goes into tables and terminals
        phrase = http.client.responses.get(response.status, "of no standard meaning")
        reason = f"HTTP Error {response.status}: {phrase}"
        if response.status not in _WORTH_A_RETRY:
            return FetchFailed(HTTP_ERROR, reason)
        wait_s = _retry_after(response.headers)
        if wait_s is None:
            return FetchFailed(HTTP_ERROR, reason, try_again=True)
        if wait_s > self._guard.max_retry_after_s:
            longer = f"Retry-After is longer than {self._guard.max_retry_after_s:g} s"
            return FetchFailed(HTTP_ERROR, f"{reason} ({longer})")
        self._gates.close_for(host, wait_s)
        return FetchFailed(HTTP_ERROR, reason, try_again=True, wait_s=wait_s)

    def _read_file(self, parts: urllib.parse.SplitResult) -> urllib.response.addinfourl:
        try:
            with open(urllib.request.url2pathname(parts.path), "rb") as file:
                body = file.read(self._guard.max_bytes + 1)
        except OSError as error:
            raise FetchFailed(MISSING, error.strerror or type(error).__name__) from error
        if len(body) > self._guard.max_bytes:
            raise FetchFailed(TOO_LARGE, f"more than {self._guard.max_bytes} bytes")
        return urllib.response.addinfourl(io.BytesIO(body), Message(), parts.geturl(), 200)


def _split(base: str, url: str) -> tuple[urllib.parse.SplitResult, int]:
    """Split a URL, which may be relative to another one, into its parts and its port."""
    try:
        parts = urllib.parse.urlsplit(urllib.parse.urljoin(base, url.strip()))
        return parts, parts.port or _PORTS.get(parts.scheme, 0)
    except ValueError as error:
        raise FetchFailed(REFUSED, "not a URL that can be fetched") from error


def _location(header: str) -> str:
    """Return the URL of a Location header, which http.client decodes as Latin-1 although most are UTF-8."""
    written = header.encode("latin-1", errors="replace")
    try:
        return written.decode("utf-8")
    except UnicodeDecodeError:
        return urllib.parse.quote(written, safe=_SAFE)  # byte by byte, as in browsers


def _unpacked(body: bytes, codings: str, max_bytes: int) -> bytes:
    """Decode the content codings of a body, which some servers apply although none was requested.

    If a body is not encoded as its header says, or the coding is unknown, it is returned as it is: decoding the image
    will tell what it is.

    Args:
        body: the body as received.
        codings: the Content-Encoding header, '' if there is none; codings were applied in this order.
        max_bytes: size limit of the body, encoded or not.

    Raises:
        FetchFailed: the decoded body is too large or truncated, or the coding is not supported.
    """
    for coding in reversed([name.strip().lower() for name in codings.split(",")][:_MOST_CODINGS]):
        if coding in _UNREAD_CODINGS:
            raise FetchFailed(HTTP_ERROR, f"the answer has Content-Encoding: {coding}, which was not asked for")
        if coding in ("gzip", "x-gzip") and body.startswith(b"\x1f\x8b"):
            body = _inflated(body, 16 + zlib.MAX_WBITS, max_bytes)
        elif coding == "deflate" and body:
            with_header = body[0] & 15 == zlib.DEFLATED and int.from_bytes(body[:2], "big") % 31 == 0
            body = _inflated(body, zlib.MAX_WBITS if with_header else -zlib.MAX_WBITS, max_bytes)
    return body


def _inflated(packed: bytes, window_bits: int, max_bytes: int) -> bytes:
    stream = zlib.decompressobj(window_bits)
    try:
        body = stream.decompress(packed, max_bytes + 1)
    except zlib.error as error:
        raise FetchFailed(CONNECTION_ERROR, "the packed body is damaged", try_again=True) from error
    if len(body) > max_bytes:
        raise FetchFailed(TOO_LARGE, f"more than {max_bytes} bytes")
    if not stream.eof:
        raise FetchFailed(CONNECTION_ERROR, "the body ended early", try_again=True)
    return body


def _retry_after(headers: Message) -> float | None:
    """Return the seconds that a server asks to wait in Retry-After, or None if there is no readable value."""
    text = (headers.get("Retry-After") or "").strip()
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
