"""Which addresses a download may connect to: a URL list from elsewhere must not reach into the network it runs in."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable

from stages.download.sources.failures import FetchFailed
from stages.download.sources.source import CONNECTION_ERROR, REFUSED

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
"""All of IPv6 that the public internet uses (IANA's registry). `is_global` asks instead whether an address is on a list
of private ranges, and Python's list lacks some that lead inside: site-local, local NAT64, IPv4-compatible and
IPv4-translated addresses."""


def public(address: str) -> bool:
    """Whether an IP address belongs to the public internet; of IPv6 that carries an IPv4 address, whether that does."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        carried = _carried(ip)
        if carried:
            return all(public(str(each)) for each in carried)
        if ip not in _GLOBAL_UNICAST:
            return False
    return ip.is_global and not ip.is_multicast


def _carried(ip: ipaddress.IPv6Address) -> tuple[ipaddress.IPv4Address, ...]:
    """The IPv4 addresses that packets to an IPv6 address are passed on to."""
    if ip in _NAT64:
        return (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF),)
    if ip.teredo:
        return ip.teredo  # server and client
    carried = ip.ipv4_mapped or ip.sixtofour
    return (carried,) if carried else ()


def resolve(host: str, port: int, *, private_too: bool) -> list[tuple[socket.AddressFamily, tuple[str, int]]]:
    """The addresses of a host, once: who checks them must also connect to them, or a second answer slips by.

    Args:
        host: a name or an address.
        port: TCP port.
        private_too: also addresses of private networks, loopback and the like.

    Raises:
        FetchFailed: the name does not resolve, or to nothing that may be connected to.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise FetchFailed(CONNECTION_ERROR, "the host name does not resolve") from error
    allowed = [(family, address) for family, _, _, _, address in found if private_too or public(str(address[0]))]
    if not allowed:
        raise FetchFailed(REFUSED, "the address is not public; see download.http.private_hosts")
    return allowed  # type: ignore[return-value]  # addresses of IPv6 have two more parts, which connect() takes


def connect(host: str, port: int, left: Callable[[], float], *, private_too: bool) -> socket.socket:
    """A connection to one of the host's addresses that may be connected to.

    Args:
        host: a name or an address.
        port: TCP port.
        left: seconds that are left for all of them together; raises TimeoutError when there are none.
        private_too: as in `resolve`.

    Raises:
        FetchFailed: there is none.
        OSError: none of them answers.
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
