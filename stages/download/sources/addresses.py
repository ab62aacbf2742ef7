"""Checks of IP addresses against server-side request forgery: an untrusted URL list must not reach private networks."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable

from stages.download.sources.failures import FetchFailed
from stages.download.sources.source import CONNECTION_ERROR, REFUSED

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
"""The part of IPv6 that the public internet uses (IANA's registry). `is_global` instead tests for private ranges, and
Python's list of these lacks some: site-local, local NAT64, IPv4-compatible and IPv4-translated addresses."""


def public(address: str) -> bool:
    """Return whether an IP address is public; for IPv6 that embeds an IPv4 address, whether that one is."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        carried = _carried(ip)
        if carried:
            return all(public(str(each)) for each in carried)
        if ip not in _GLOBAL_UNICAST:
            return False
    return ip.is_global and not ip.is_multicast


def _carried(ip: ipaddress.IPv6Address) -> tuple[ipaddress.IPv4Address, ...]:
    """Return the IPv4 addresses embedded in an IPv6 address, to which its packets are forwarded."""
    if ip in _NAT64:
        return (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF),)
    if ip.teredo:
        return ip.teredo  # the server's and the client's address
    carried = ip.ipv4_mapped or ip.sixtofour
    return (carried,) if carried else ()


def resolve(host: str, port: int, *, private_too: bool) -> list[tuple[socket.AddressFamily, tuple[str, int]]]:
    """Resolve a host once; callers must connect to the returned addresses, since a second answer could differ.

    Args:
        host: a name or an address.
        port: TCP port.
        private_too: whether private, loopback and similar addresses are returned too.

    Raises:
        FetchFailed: the name does not resolve, or to no permitted address.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise FetchFailed(CONNECTION_ERROR, "the host name does not resolve") from error
    allowed = [(family, address) for family, _, _, _, address in found if private_too or public(str(address[0]))]
    if not allowed:
        raise FetchFailed(REFUSED, "the address is not public; see download.http.private_hosts")
    return allowed  # type: ignore[return-value]  # IPv6 addresses have two more parts, which connect() accepts


def connect(host: str, port: int, left: Callable[[], float], *, private_too: bool) -> socket.socket:
    """Connect to the first permitted address of a host that answers.

    Args:
        host: a name or an address.
        port: TCP port.
        left: returns the seconds left for all attempts together; raises TimeoutError if there are none.
        private_too: as in `resolve`.

    Raises:
        FetchFailed: the host has no permitted address.
        OSError: none of its addresses answers.
    """
    last: OSError | None = None
    for family, address in resolve(host, port, private_too=private_too):
        timeout = left()
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout)
            connection.connect(address)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection
        except OSError as error:
            connection.close()
            last = error
    assert last is not None, "there is at least one address"
    raise last
