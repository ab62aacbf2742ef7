"""Serves the sample images over HTTP on the loopback interface, so that the download stage has real URLs offline.

``python -m infra.sample_data.server --port 8765`` serves until interrupted.
"""

import argparse
import threading
import zipfile
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import ClassVar, Self

from infra.sample_data import SAMPLE_LIST, STYLES, URL_PREFIX, archive_path

__all__ = ["SAMPLE_LIST", "SampleServer", "resolve"]

_HOST = "127.0.0.1"


def resolve(url: str, base_url: str) -> str:
    """Turn ``sample://emoji/...`` into ``<base_url>/emoji/...``; other URLs are returned unchanged."""
    if not url.startswith(URL_PREFIX):
        return url
    return f"{base_url.rstrip('/')}/{url.removeprefix(URL_PREFIX)}"


def load_images() -> dict[str, bytes]:
    """Load all images into memory (about 8 MB), by request path: ``/emoji/<style>/<name>.webp``.

    Raises:
        FileNotFoundError: a style's zip is missing; the message names the command that builds it.
    """
    images: dict[str, bytes] = {}
    for style in STYLES:
        path = archive_path(style)
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing; build it with `python -m infra.sample_data.build`")
        with zipfile.ZipFile(path) as archive:
            images |= {f"/emoji/{style}/{name}": archive.read(name) for name in archive.namelist()}
    return images


class _Handler(BaseHTTPRequestHandler):
    """Answers from a dictionary: a request never reaches the file system, so there is no path to traverse."""

    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds that an idle keep-alive connection may hold its thread
    wbufsize = -1  # header and body leave in one packet, without Nagle's 40 ms delay
    images: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:
        """Send the image, or 404."""
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        """Send the headers of the image, or 404."""
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        image = self.images.get(self.path.partition("?")[0])
        body = b"not found\n" if image is None else image
        self.send_response(HTTPStatus.NOT_FOUND if image is None else HTTPStatus.OK)
        self.send_header("Content-Type", "text/plain" if image is None else "image/webp")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""


class _HttpServer(ThreadingHTTPServer):
    request_queue_size = 128  # a downloader opens many connections at once


class SampleServer:
    """Serves the sample images on ``http://127.0.0.1:PORT`` from a daemon thread while the context is open.

    Args:
        port: TCP port; 0 takes a free one, so that several servers can run side by side.
    """

    def __init__(self, port: int = 0) -> None:
        self._port = port
        self._server: _HttpServer | None = None

    @property
    def base_url(self) -> str:
        """The server's URL ``http://127.0.0.1:PORT``, without a trailing slash.

        Raises:
            RuntimeError: the server is not running.
        """
        if self._server is None:
            raise RuntimeError("the sample server is not running; use it as `with SampleServer() as server:`")
        return f"http://{_HOST}:{self._server.server_address[1]}"

    def resolve(self, url: str) -> str:
        """Turn a ``sample://`` URL into one of this server; other URLs are returned unchanged."""
        return resolve(url, self.base_url)

    def __enter__(self) -> Self:
        """Load the images and start the server.

        Raises:
            FileNotFoundError: the sample data has not been built.
            OSError: the port is taken.
        """
        handler = type("SampleHandler", (_Handler,), {"images": load_images()})
        self._server = _HttpServer((_HOST, self._port), handler)
        threading.Thread(target=self._server.serve_forever, name="sample-server", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description="Serve the sample images on the loopback interface.")
    parser.add_argument("--port", type=int, default=8765, help="TCP port; 0 takes a free one")
    arguments = parser.parse_args()
    with SampleServer(arguments.port) as server:
        print(f"serving {SAMPLE_LIST.name} at {server.base_url}/emoji/<style>/<codepoint>.webp; stop with Ctrl-C")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
