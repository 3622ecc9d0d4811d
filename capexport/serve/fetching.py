"""Images behind URLs, fetched from public addresses only."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from functools import cache
from typing import TypeAlias
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import h11

import capexport
from capexport.errors import ImageError

_MAX_REDIRECTS = 5
_SECONDS = 20.0  # for a URL and all its redirects
_CONCURRENT = 16
_MAX_URL = 8000  # characters: splitting and encoding a URL of megabytes takes minutes
_UNESCAPED = "%/:?@!$&'()*+,;=~[]"  # in a path and a query; the rest is percent-encoded
_REDIRECT_STATUSES = (301, 302, 303, 307, 308)
# Addresses that are not public, whatever this Python's `ipaddress` says: IANA's registries of
# special-purpose addresses, multicast, and the address by which virtual machines on Azure reach
# their host.
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16",
        "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24",
        "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24",
        "203.0.113.0/24", "224.0.0.0/3", "168.63.129.16/32",
        "2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20",
    )
)  # fmt: skip
# All public IPv6 addresses lie in here, but for those with an IPv4 address in their last 32 bits:
# IPv4-mapped ones, and those of NAT64 (RFC 6052).
_GLOBAL_IPV6 = ipaddress.ip_network("2000::/3")
_EMBEDDED_IPV4 = (ipaddress.ip_network("::ffff:0:0/96"), ipaddress.ip_network("64:ff9b::/96"))

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_public(address: Address) -> bool:
    """Whether an address is neither private, loopback, link-local, multicast nor reserved. An IPv6
    address that embeds an IPv4 address is as public as that."""
    if any(address in network for network in _EMBEDDED_IPV4):
        return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    if address.version == 6 and address not in _GLOBAL_IPV6:
        return False
    return not any(address in network for network in _NOT_PUBLIC)


class Fetcher:
    """Fetches a few images at once, each within limits of time and size."""

    def __init__(self) -> None:
        self._turns = asyncio.Semaphore(_CONCURRENT)

    async def fetch(self, url: str, most: int) -> bytes:
        """The bytes behind an http(s) URL.

        Raises:
            ImageError: the URL leads to nothing, to no public address, to more than `most` bytes,
                or it takes too long.
        """
        try:
            async with self._turns:
                return await asyncio.wait_for(self._follow(url, most), _SECONDS)
        except asyncio.TimeoutError as error:
            raise ImageError(f"{url:.200}: takes longer than {_SECONDS:.0f} s") from error
        except ImageError:
            raise
        except (OSError, ValueError, h11.ProtocolError) as error:
            raise ImageError(f"{url:.200}: cannot be fetched: {error!s:.200}") from error

    async def _follow(self, url: str, most: int) -> bytes:
        for _ in range(_MAX_REDIRECTS + 1):
            if len(url) > _MAX_URL:
                raise ImageError(f"{url:.200}: a URL has at most {_MAX_URL} characters")
            status, location, body = await self._get(urlsplit(url), most)
            if status == 200:
                return body
            if status not in _REDIRECT_STATUSES or not location:
                raise ImageError(f"{url:.200}: the answer is {status}")
            url = urljoin(url, location)
        raise ImageError(f"{url:.200}: more than {_MAX_REDIRECTS} redirects")

    async def _get(self, url: SplitResult, most: int) -> tuple[int, str, bytes]:
        """Status, `Location` header ("" if there is none) and body (only of status 200)."""
        secure = url.scheme == "https"
        if url.scheme not in ("http", "https") or not url.hostname or url.username is not None:
            raise ImageError(f"{url.geturl():.200}: must begin with https:// or http:// and a host")
        host = url.hostname.encode("idna").decode()
        # Connect to the address that was checked: the name may resolve to another one next time.
        address = await _public_address(host, url.port or (443 if secure else 80))
        name = f"[{host}]" if ":" in host else host
        reader, writer = await asyncio.open_connection(
            *address, ssl=_context() if secure else None, server_hostname=host if secure else None
        )
        try:
            connection = h11.Connection(h11.CLIENT)
            request = h11.Request(
                method="GET",
                target=quote(url.path or "/", _UNESCAPED)
                + (f"?{quote(url.query, _UNESCAPED)}" if url.query else ""),
                headers=[
                    ("Host", f"{name}:{url.port}" if url.port else name),
                    ("User-Agent", f"capexport/{capexport.__version__}"),
                    ("Accept", "image/*"),
                    ("Connection", "close"),
                ],
            )
            writer.write(connection.send(request) + connection.send(h11.EndOfMessage()))
            return await self._answer(connection, reader, most)
        finally:
            writer.close()

    async def _answer(
        self, connection: h11.Connection, reader: asyncio.StreamReader, most: int
    ) -> tuple[int, str, bytes]:
        status, location, body = 0, "", bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(65536))
            elif isinstance(event, h11.Response):
                status = event.status_code
                location = dict(event.headers).get(b"location", b"").decode()
                if status != 200:
                    return status, location, b""
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > most:
                    raise ImageError(f"an image of more than {most} bytes")
            elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
                return status, location, bytes(body)


async def _public_address(host: str, port: int) -> tuple[str, int]:
    """An IP address of the host, and the port. All its addresses must be public."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for *_, (text, *_) in found:
        if not is_public(ipaddress.ip_address(text)):
            raise ImageError(f"{host}: is no public address, and only those are fetched from")
    return str(found[0][-1][0]), port


@cache
def _context() -> ssl.SSLContext:
    return ssl.create_default_context()
