"""An HTTP server on loopback that does what servers of the web do, good and bad, by the path that it is asked for."""

from __future__ import annotations

import io
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import numpy as np
from PIL import Image

SIZE = (40, 30)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(colour: str, size: tuple[int, int] = SIZE) -> bytes:
    return encoded(Image.new("RGB", size, colour))


def animation(kind: str) -> bytes:
    frames = [Image.new("RGB", SIZE, colour) for colour in ("red", "green", "blue")]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)


def sixteen_bit_png() -> bytes:
    return encoded(Image.fromarray(np.linspace(0, 65_535, SIZE[0] * SIZE[1]).reshape(SIZE[1], SIZE[0]).astype("u2")))


def rotated_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.new("RGB", SIZE, "orange"), "JPEG", exif=exif)


@cache
def bomb_png(side: int = 30_000) -> bytes:
    """A file of some hundred kilobytes that stands for side x side pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer, row = zlib.compressobj(1), bytes(1 + (side + 7) // 8)
    pixels = b"".join([*(packer.compress(row) for _ in range(side)), packer.flush()])
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


BODIES: dict[str, Callable[[], bytes]] = {
    "/red.png": lambda: png("red"),
    "/blue.png": lambda: png("blue"),
    "/green.png": lambda: png("green"),
    "/wrong-type.png": lambda: png("purple"),
    "/animated.gif": lambda: animation("GIF"),
    "/animated.webp": lambda: animation("WEBP"),
    "/cmyk.jpg": lambda: encoded(Image.new("CMYK", SIZE, (10, 200, 30, 5)), "JPEG"),
    "/16-bit.png": sixteen_bit_png,
    "/rotated.jpg": rotated_jpeg,
    "/bomb.png": bomb_png,
    "/cut.png": lambda: encoded(Image.effect_noise((200, 200), 50))[:9000],
    "/page.png": lambda: b"<!DOCTYPE html><html>no longer here</html>",
    "/noise.png": lambda: b"\x00\x01" * 500,
    "/empty.png": lambda: b"",
    "/big.png": lambda: bytes(300_000),
}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    asked: ClassVar[Counter[str]]
    held: ClassVar[list[int]]
    most_held: ClassVar[list[int]]
    lock: ClassVar[threading.Lock]
    stop: ClassVar[threading.Event]
    flaky_fails: ClassVar[int] = 2

    def do_GET(self) -> None:
        if self.path.startswith("http://"):  # asked as a proxy, whichever host it is about
            self.path = "/" + self.path.removeprefix("http://").partition("/")[2]
        with self.lock:
            self.asked[self.path] += 1
            count = self.asked[self.path]
        try:
            self._answer(self.path, count)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # who asked has gone, as the tests want it

    def _answer(self, path: str, count: int) -> None:
        if path in BODIES:
            kind = "text/html" if path == "/wrong-type.png" else "image/png"
            self._send(200, BODIES[path](), {"Content-Type": kind})
        elif path.startswith("/status/"):
            self._send(int(path.removeprefix("/status/")), b"no")
        elif path == "/busy.png":  # asks once to wait
            answer = (429, b"later", {"Retry-After": "1"}) if count == 1 else (200, png("yellow"), {})
            self._send(*answer)
        elif path == "/busy-for-long.png":
            self._send(429, b"later", {"Retry-After": "86400"})
        elif path == "/flaky.png":  # fails so often before it works
            good = count > self.flaky_fails
            self._send(200 if good else 503, png("pink") if good else b"no")
        elif path == "/mended.png":  # a 404 until it is repaired
            self._send(200 if count > 1 else 404, png("white") if count > 1 else b"no")
        elif path == "/opted-out.png":
            self._send(200, png("red"), {"X-Robots-Tag": "noai"})
        elif path == "/opted-out-of-others.png":
            self._send(200, png("cyan"), {"X-Robots-Tag": "someoneelse: noai"})
        elif path == "/loop":
            self._send(302, b"", {"Location": "/loop"})
        elif path == "/moved":
            self._send(301, b"", {"Location": "/red.png"})
        elif path.startswith("/to-bytes/"):  # the Location header holds these bytes as they are
            where = bytes.fromhex(path.removeprefix("/to-bytes/"))
            self._send(302, b"", {"Location": where.decode("latin-1")})
        elif path.startswith("/coded/"):  # whatever the path says of the body, asked for or not
            _, _, coding, body = path.split("/")
            self._send(200, bytes.fromhex(body), {"Content-Encoding": coding})
        elif path.startswith("/to/"):
            self._send(302, b"", {"Location": path.removeprefix("/to/")})
        elif path == "/hold.png":  # long enough for others to come
            self._hold()
            self._send(200, png("gray"))
        else:
            self._misbehave(path)

    def _hold(self) -> None:
        """Wait, and count who waits: until before the answer, after which a client may send its next request."""
        with self.lock:
            self.held[0] += 1
            self.most_held[0] = max(self.most_held[0], self.held[0])
        self.stop.wait(0.2)
        with self.lock:
            self.held[0] -= 1

    def _misbehave(self, path: str) -> None:
        self.close_connection = True
        if path == "/truncated.png":
            self._send(200, png("red")[:40], {"Content-Length": "4000"})
        elif path == "/slow.png":  # always another byte, never the last one
            self._send(200, b"", {"Content-Length": "100000"})
            self._drip()
        elif path == "/slow-headers.png":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            self._drip()
        elif path == "/endless.png":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
            while not self.stop.is_set():
                self.wfile.write(bytes(1 << 16))
        elif path == "/reset.png":
            self.connection.close()
        elif path == "/garbage.png":
            self.wfile.write(b"this is not HTTP\r\n\r\n")
        else:
            self._send(404, b"no")

    def _drip(self) -> None:
        while not self.stop.wait(0.1):
            self.wfile.write(b"x")
            self.wfile.flush()

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        pass


class MisbehavingServer:
    """A running server.

    Attributes:
        address: `127.0.0.1:PORT`.
        asked: how often each path was asked for.
    """

    def __init__(self, server: ThreadingHTTPServer, handler: Any) -> None:
        self.address = f"127.0.0.1:{server.server_address[1]}"
        self.asked: Counter[str] = handler.asked
        self._most: list[int] = handler.most_held

    @property
    def most_held(self) -> int:
        """Most requests for `/hold.png` that were held at the same time."""
        return self._most[0]

    def url(self, path: str) -> str:
        return f"http://{self.address}{path}"


@contextmanager
def misbehaving_server() -> Iterator[MisbehavingServer]:
    state = {
        "asked": Counter(),
        "held": [0],
        "most_held": [0],
        "lock": threading.Lock(),
        "stop": threading.Event(),
    }
    handler = type("Handler", (_Handler,), state)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    try:
        yield MisbehavingServer(server, handler)
    finally:
        state["stop"].set()  # type: ignore[attr-defined]
        server.shutdown()
        server.server_close()
