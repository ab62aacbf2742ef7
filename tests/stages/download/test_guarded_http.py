"""The opener beneath img2dataset: every wait, size, redirect and target has a limit."""

from __future__ import annotations

import base64
import gzip
import http.client
import socket
import subprocess
import sys
import urllib.request
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stages.download.sources import addresses
from stages.download.sources.failures import FetchFailed, read_failure
from stages.download.sources.guarded_http import Guard, GuardedOpener
from stages.download.sources.host_gates import MOST_CLOSINGS, HostGates
from stages.download.sources.source import (
    CONNECTION_ERROR,
    HTTP_ERROR,
    MISSING,
    NOT_FETCHED,
    OPTED_OUT,
    REFUSED,
    TIMEOUT,
    TOO_LARGE,
    TOO_MANY_REDIRECTS,
)
from tests.helpers.misbehaving_server import MisbehavingServer, misbehaving_server, png


@pytest.fixture
def server() -> Iterator[MisbehavingServer]:
    with misbehaving_server() as running:
        yield running


def opener(server: MisbehavingServer, **changes: object) -> GuardedOpener:
    limits = {
        "timeout_s": 60.0,
        "retries": 0,
        "max_bytes": 200_000,
        "max_redirects": 3,
        "max_retry_after_s": 5.0,
        "connections_per_host": 4,
        "allow_private_addresses": False,
        "private_hosts": (server.address,),
    }
    return GuardedOpener(Guard(**(limits | changes)))  # type: ignore[arg-type]


def get(opener: GuardedOpener, url: str) -> bytes:
    with opener.open(urllib.request.Request(url)) as answer:
        return bytes(answer.read())


@pytest.mark.parametrize("path", ["/red.png", "/moved"])
def test_good_url_gives_its_bytes_with_and_without_redirect(server: MisbehavingServer, path: str) -> None:
    assert get(opener(server), server.url(path)) == png("red")


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [
        ("/status/404", HTTP_ERROR, "HTTP Error 404: Not Found"),
        ("/status/403", HTTP_ERROR, "HTTP Error 403: Forbidden"),
        ("/status/500", HTTP_ERROR, "HTTP Error 500: Internal Server Error"),
        ("/busy-for-long.png", HTTP_ERROR, "Retry-After is longer"),
        ("/slow.png", TIMEOUT, "no whole answer in 2 s"),
        ("/slow-headers.png", TIMEOUT, "no whole answer in 2 s"),
        ("/truncated.png", CONNECTION_ERROR, "the body ended early"),
        ("/reset.png", CONNECTION_ERROR, ""),
        ("/garbage.png", CONNECTION_ERROR, "BadStatusLine"),
        ("/big.png", TOO_LARGE, "more than 200000 bytes"),
        ("/endless.png", TOO_LARGE, "more than 200000 bytes"),
        ("/loop", TOO_MANY_REDIRECTS, "more than 3 redirects"),
        ("/to/http://10.0.0.1/x.png", REFUSED, "not public"),
        ("/to/http://[::1]:1/x.png", REFUSED, "not public"),
        ("/to/http://169.254.169.254/latest/meta-data", REFUSED, "not public"),
        ("/to/file:///etc/hostname", REFUSED, "scheme 'file'"),
        ("/to/ftp://example.org/x.png", REFUSED, "scheme 'ftp'"),
        ("/to/http://[bad/x.png", REFUSED, "not a URL"),
    ],
)
def test_bad_url_fails_with_its_status(server: MisbehavingServer, path: str, status: str, reason: str) -> None:
    timeout_s = 2.0 if status == TIMEOUT else 60.0  # so that a busy machine does not make a timeout of all else
    with pytest.raises(FetchFailed) as raised:
        get(opener(server, timeout_s=timeout_s), server.url(path))
    assert raised.value.status == status
    assert reason in raised.value.reason


@pytest.mark.parametrize(
    ("location", "asked"),
    [
        ("/bücher/Å.png".encode(), "/b%C3%BCcher/%C3%85.png"),
        ("/b%C3%BCcher/Å.png?q=ü".encode(), "/b%C3%BCcher/%C3%85.png?q=%C3%BC"),
        ("/日本 語.png".encode(), "/%E6%97%A5%E6%9C%AC%20%E8%AA%9E.png"),
        ("/bücher.png".encode("latin-1"), "/b%FCcher.png"),
        (b"/b%25C3.png", "/b%25C3.png"),
    ],
)
def test_a_redirect_is_asked_for_encoded_once(server: MisbehavingServer, location: bytes, asked: str) -> None:
    with pytest.raises(FetchFailed, match="404"):
        get(opener(server), server.url(f"/to-bytes/{location.hex()}"))
    assert server.asked[asked] == 1


def _short(value: object) -> str:
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)


def _deflated(data: bytes, window_bits: int) -> bytes:
    packer = zlib.compressobj(wbits=window_bits)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", gzip.compress(png("red"), mtime=0)),
        ("x-gzip", gzip.compress(png("red"), mtime=0) + b"trailing"),
        ("GZIP", gzip.compress(png("red"), mtime=0)),
        ("deflate", _deflated(png("red"), 15)),
        ("deflate", _deflated(png("red"), -15)),
        ("gzip, gzip", gzip.compress(gzip.compress(png("red"), mtime=0), mtime=0)),
        ("identity", png("red")),
        ("gzip", png("red")),
        ("UTF-8", png("red")),
    ],
    ids=_short,
)
def test_a_coding_that_nobody_asked_for_is_taken_off(server: MisbehavingServer, coding: str, body: bytes) -> None:
    assert get(opener(server), server.url(f"/coded/{coding.replace(' ', '')}/{body.hex()}")) == png("red")


@pytest.mark.parametrize(
    ("coding", "body", "status", "reason"),
    [
        ("gzip", gzip.compress(bytes(300_000), mtime=0), TOO_LARGE, "more than 200000 bytes"),
        (
            "gzip,gzip",
            gzip.compress(gzip.compress(bytes(20_000_000), mtime=0), mtime=0),
            TOO_LARGE,
            "more than 200000 bytes",
        ),
        ("gzip", gzip.compress(png("red"), mtime=0)[:40], CONNECTION_ERROR, "the body ended early"),
        ("gzip", gzip.compress(png("red"), mtime=0)[:20] + bytes(60), CONNECTION_ERROR, "the packed body is damaged"),
        ("br", b"\x0b\x02\x80hello\x03", HTTP_ERROR, "Content-Encoding: br, which was not asked for"),
    ],
    ids=_short,
)
def test_what_a_coding_hides_has_the_limits_of_any_body(
    server: MisbehavingServer, coding: str, body: bytes, status: str, reason: str
) -> None:
    with pytest.raises(FetchFailed) as raised:
        get(opener(server), server.url(f"/coded/{coding}/{body.hex()}"))
    assert (raised.value.status, reason in raised.value.reason) == (status, True)


@pytest.mark.parametrize(
    ("address", "is_public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::808:808", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("::ffff:127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("2002:a00:1::", False),
        ("2002:808:808::", True),
        ("64:ff9b::a00:1", False),
        ("64:ff9b:1::a00:1", False),
        ("64:ff9b:1::808:808", False),
        ("fec0::1", False),
        ("feff::1", False),
        ("::10.0.0.1", False),
        ("::8.8.8.8", False),
        ("::ffff:0:10.0.0.1", False),
        ("::ffff:0:8.8.8.8", False),
        ("2001:0:808:808::f7f7:f7f7", True),  # Teredo, whose last part is the client's address with its bits turned
        ("2001:0:808:808::f5ff:fffe", False),
        ("2001:0:a00:1::f7f7:f7f7", False),
        ("2001:db8::1", False),
        ("5f00::1", False),
        ("ff0e::1", False),
        ("::", False),
    ],
)
def test_only_addresses_of_the_public_internet_are_public(address: str, is_public: bool) -> None:
    assert addresses.public(address) is is_public


def test_private_server_is_refused_unless_it_is_named_or_all_are_allowed(server: MisbehavingServer) -> None:
    with pytest.raises(FetchFailed, match="not public"):
        get(opener(server, private_hosts=()), server.url("/red.png"))
    assert server.asked["/red.png"] == 0
    for changes in ({}, {"private_hosts": (), "allow_private_addresses": True}):
        assert get(opener(server, **changes), server.url("/red.png")) == png("red")


def test_name_is_resolved_once_and_the_checked_address_is_connected_to(
    server: MisbehavingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    port = int(server.address.rpartition(":")[2])

    def rebinding(host: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        """Public at first, loopback ever after."""
        asked.append(host)
        address = "203.0.113.7" if len(asked) > 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    named = opener(server, private_hosts=(f"pictures.example:{port}",))
    assert get(named, f"http://pictures.example:{port}/red.png") == png("red")
    assert asked == ["pictures.example"]


def test_name_with_a_private_address_is_refused(server: MisbehavingServer) -> None:
    with pytest.raises(FetchFailed, match="not public"):
        get(opener(server), f"http://localhost:{server.address.rpartition(':')[2]}/red.png")


def test_proxy_is_asked_in_place_of_the_host_but_never_for_a_private_address(
    server: MisbehavingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown_here(host: str, *arguments: object, **options: object) -> object:
        if host == "pictures.example":
            raise socket.gaierror("only the proxy knows it")
        return look_up(host, *arguments, **options)  # type: ignore[arg-type]

    look_up = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", unknown_here)
    monkeypatch.setenv("http_proxy", f"http://{server.address}")
    monkeypatch.delenv("no_proxy", raising=False)
    behind = opener(server)
    assert get(behind, "http://pictures.example/red.png") == png("red")
    with pytest.raises(FetchFailed, match="not public"):
        get(behind, "http://10.0.0.1/blue.png")
    assert server.asked == {"/red.png": 1}


@pytest.mark.processes
def test_fetch_process_ends_when_the_stage_is_gone() -> None:
    module = "stages.download.sources.fetch_process"
    script = f"import time; from {module} import end_with; end_with(parent=-1); time.sleep(600)"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[3]).returncode == 1


def test_failures_that_may_pass_are_tried_again_and_others_not(server: MisbehavingServer) -> None:
    assert get(opener(server, retries=2), server.url("/flaky.png")) == png("pink")
    assert server.asked["/flaky.png"] == 3
    with pytest.raises(FetchFailed):
        get(opener(server, retries=2), server.url("/status/404"))
    assert server.asked["/status/404"] == 1


def test_host_that_asks_to_wait_is_asked_again(server: MisbehavingServer) -> None:
    assert get(opener(server, retries=1), server.url("/busy.png")) == png("yellow")


def test_only_so_many_connections_at_a_time_go_to_one_host(server: MisbehavingServer) -> None:
    limited = opener(server, connections_per_host=2)
    with ThreadPoolExecutor(8) as pool:
        bodies = list(pool.map(lambda _: get(limited, server.url("/hold.png")), range(8)))
    assert bodies == [png("gray")] * 8
    assert server.most_held == 2


def test_local_file_is_read_only_where_private_addresses_are_allowed(server: MisbehavingServer, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png("red"))
    url = (tmp_path / "a.png").as_uri()
    with pytest.raises(FetchFailed, match="scheme 'file'"):
        get(opener(server), url)
    allowed = opener(server, allow_private_addresses=True)
    assert get(allowed, url) == png("red")
    with pytest.raises(FetchFailed) as raised:
        get(allowed, url + ".absent")
    assert raised.value.status == MISSING


@pytest.mark.parametrize(
    ("message", "status", "reason"),
    [
        (str(FetchFailed(TIMEOUT, "no whole answer in 2 s")), TIMEOUT, "no whole answer in 2 s"),
        ("Use of image disallowed by X-Robots-Tag directive", OPTED_OUT, "X-Robots-Tag"),
        ("unknown url type: 'x'", REFUSED, "not a URL"),
        ("[made_up] what", NOT_FETCHED, "[made_up] what"),
        (None, NOT_FETCHED, "no reason"),
    ],
)
def test_failure_survives_the_way_through_img2dataset(message: str | None, status: str, reason: str) -> None:
    failure = read_failure(message)
    assert failure.status == status
    assert reason in failure.reason


def test_all_addresses_of_a_name_share_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def left() -> float:
        asked.append(0.01)
        if len(asked) > 2:
            raise TimeoutError
        return 0.01

    dead = [(socket.AF_INET, ("127.0.0.1", port)) for port in range(1, 9)]  # nothing listens there
    monkeypatch.setattr(addresses, "resolve", lambda *_, **__: dead)
    with pytest.raises(TimeoutError):
        addresses.connect("pictures.example", 80, left, private_too=True)
    assert len(asked) == 3


def test_a_host_that_only_ever_asks_to_wait_is_given_up() -> None:
    gates = HostGates(1)
    for _ in range(MOST_CLOSINGS - 1):
        gates.close_for("shut", 0)
    gates.served("shut")
    for _ in range(MOST_CLOSINGS):
        with gates.through("shut"):
            gates.close_for("shut", 0)
    with pytest.raises(FetchFailed, match="only ever asked to wait"), gates.through("shut"):
        pass
    with gates.through("another"):
        pass


def test_requests_that_are_refused_together_count_once() -> None:
    gates = HostGates(4)
    for _ in range(3 * MOST_CLOSINGS):
        gates.close_for("busy", 0.05)
    with gates.through("busy"):
        pass


def test_a_proxy_gets_its_user_and_password(server: MisbehavingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://me:p%40ss@{server.address}")
    monkeypatch.delenv("no_proxy", raising=False)
    sent: list[dict[str, str]] = []
    request = http.client.HTTPConnection.request

    def noted(self: http.client.HTTPConnection, *arguments: object, headers: dict[str, str]) -> None:
        sent.append(headers)
        request(self, *arguments, headers=headers)  # type: ignore[arg-type]

    monkeypatch.setattr(http.client.HTTPConnection, "request", noted)
    assert get(opener(server, allow_private_addresses=True), "http://203.0.113.7/red.png") == png("red")
    assert sent[0]["Proxy-Authorization"] == f"Basic {base64.b64encode(b'me:p@ss').decode()}"
