"""An HTTP proxy on loopback, in front of an S3 server, that spoils chosen requests the way networks and services do."""

import http.client
import socket
import struct
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

import pytest

from storage.objects import s3 as objects_s3
from storage.objects import s3_retries

Fault = Literal["500", "503", "timeout", "reset_request", "reset_response", "lost_response", "done_but_500"]
FAULTS: tuple[Fault, ...] = (
    "500",  # InternalError; nothing was done
    "503",  # SlowDown; nothing was done
    "timeout",  # no answer within the client's patience; nothing was done
    "reset_request",  # the connection breaks while the request is read; nothing was done
    "reset_response",  # done; the connection breaks in the middle of the answer
    "lost_response",  # done; the connection breaks before the answer
    "done_but_500",  # done; the answer says that it was not
)
READ_TIMEOUT_S = 0.4
"""How long an impatient client waits for an answer."""
_CODES = {"500": "InternalError", "503": "SlowDown", "done_but_500": "InternalError"}
WRITES = frozenset({"PUT", "POST", "DELETE"})
"""What a reader's key is refused."""
_HOP_BY_HOP = ("connection", "transfer-encoding", "keep-alive", "expect")


class FaultProxy:
    """Forwards to one server; what it spoils is set by the attributes, at any time.

    Attributes:
        faults: what happens to the n-th request from now (0, 1, ...); taken out as they happen.
        always: what happens to every request, None for nothing.
        refused: HTTP methods that are answered with 403, as to a key that may not use them.
        drop_conditions: forward without If-None-Match, like a service that does not know it.
        methods: HTTP method of every request so far.
    """

    def __init__(self, upstream: str) -> None:
        self._upstream = urlsplit(upstream).netloc
        self.faults: dict[int, Fault] = {}
        self.always: Fault | None = None
        self.refused: frozenset[str] = frozenset()
        self.drop_conditions = False
        self.methods: list[str] = []
        self._lock = threading.Lock()
        self._offset = 0
        self.ended = threading.Event()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def spoil(self, numbers: Iterable[int], fault: Fault) -> None:
        """Let `fault` happen to these requests, the next one being number 0."""
        with self._lock:
            self._offset = len(self.methods)
            self.faults = dict.fromkeys(numbers, fault)

    def count(self) -> int:
        """How many requests have come."""
        with self._lock:
            return len(self.methods)

    def next_fault(self, method: str) -> Fault | None:
        """Count a request and say what is to happen to it."""
        with self._lock:
            number = len(self.methods) - self._offset
            self.methods.append(method)
            return self.faults.pop(number, None) or self.always

    def forward(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        """Ask the real server; return its status, headers and body."""
        if self.drop_conditions:
            headers = {name: value for name, value in headers.items() if name.lower() != "if-none-match"}
        connection = http.client.HTTPConnection(self._upstream, timeout=30)
        try:
            connection.request(method, path, body=body or None, headers=headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    @contextmanager
    def serving(self) -> Iterator["FaultProxy"]:
        """Serve in a thread until the block ends."""
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.ended.set()
            self._server.shutdown()
            self._server.server_close()
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients that were spoilt hang up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FaultProxy

    def do_GET(self) -> None:
        self._relay()

    do_PUT = do_HEAD = do_POST = do_DELETE = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _relay(self) -> None:
        fault = self.owner.next_fault(self.command)
        length = int(self.headers.get("Content-Length", 0))
        if fault == "reset_request":
            self.rfile.read(length // 2)
            return self._reset()
        body = self._body(length)
        if fault == "timeout":
            self.owner.ended.wait(20)  # far longer than the tests' clients wait
            return self._reset()
        if fault in ("500", "503"):
            return self._refuse(int(fault), _CODES[fault])
        if self.command in self.owner.refused:
            return self._refuse(403, "AccessDenied")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
        status, answer_headers, answer = self.owner.forward(self.command, self.path, headers, body)
        if fault == "lost_response":
            return self._reset()
        if fault == "done_but_500":
            return self._refuse(500, _CODES[fault])
        self.send_response(status)
        for name, value in answer_headers.items():
            if name.lower() not in (*_HOP_BY_HOP, "content-length", "date", "server"):
                self.send_header(name, value)
        shown = answer_headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(answer))
        self.send_header("Content-Length", shown)
        if fault == "reset_response":
            if self.command == "HEAD" or not answer:
                return self._reset()
            self.end_headers()
            self.wfile.write(answer[: len(answer) // 2])
            return self._reset()
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    def _body(self, length: int) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(length)
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _refuse(self, status: int, code: str) -> None:
        body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>a fault of the test</Message></Error>'.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _reset(self) -> None:
        """Break the connection so that the client sees a reset, not an end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.wfile.flush()
        self.connection.close()


@pytest.fixture
def proxy(s3_endpoint: str) -> Iterator[FaultProxy]:
    """A proxy before the session's S3 server."""
    with FaultProxy(s3_endpoint).serving() as proxy:
        yield proxy


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between tries that suit a test; how often a call is tried stays as it is."""
    monkeypatch.setattr(s3_retries, "FIRST_BACKOFF_S", 0.005)


@pytest.fixture
def impatient(short_waits: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for the time that an answer may take."""
    config = objects_s3._DEFAULT_OPTIONS["config_kwargs"] | {"read_timeout": READ_TIMEOUT_S}
    monkeypatch.setitem(objects_s3._DEFAULT_OPTIONS, "config_kwargs", config)
