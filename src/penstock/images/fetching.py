"""Files from http(s) URLs that strangers name, so that a server cannot be made to reach what they could not."""

import asyncio
import ipaddress
import re
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from penstock.errors import InvalidImage
from penstock.images.config import ImageConfig

_DEFAULT_PORTS = (80, 443)
_MOST_AT_ONCE = 16
"""Files under way. Each may be as large as a file may be."""
_MOST_SHOWN_CHARS = 100
_PIECE_BYTES = 1 << 16
_HAVE_ALLOWED = "send it as a data: URL, or have the operator name its host in images.allowed_hosts"
_MOST_PORT_CHARS = 20
_NO_URL = "its URL must be data:image/png;base64, and the file in base64, or http:// or https:// and a host"
_PORT = re.compile(r"https?://(?:[^/?#@]*@)?(?:\[[^/?#\]]*\]|[^/?#:\[]*):([^/?#]*)", re.IGNORECASE)
"""An http(s) URL up to its port"""
_COMPRESSIONS = {"br", "compress", "deflate", "gzip", "x-gzip", "zstd"}
_FAILURES: tuple[tuple[type[aiohttp.ClientError], str], ...] = (
    (aiohttp.ClientPayloadError, "its host closed the connection before the whole file came"),
    (aiohttp.ClientConnectorCertificateError, "its host has a certificate that is not trusted"),
    (aiohttp.ClientSSLError, "its host does not speak TLS as https:// needs"),
    (aiohttp.ClientConnectorError, "its host refuses connections, or cannot be reached"),
    (aiohttp.ClientConnectionError, "its host closed the connection without an answer"),
    (aiohttp.ClientResponseError, "its host does not answer in HTTP"),
    (aiohttp.ClientError, "it cannot be fetched"),
)
"""What each error of a connection means; the first that fits does"""
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""Addresses of IPv4 hosts as RFC 6052 writes them, in the last 32 bits"""

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Fetcher:
    """Fetches files within the operator's limits."""

    def __init__(self, config: ImageConfig) -> None:
        self._config = config
        self._places = asyncio.Semaphore(_MOST_AT_ONCE)

    async def fetch(self, url: str) -> bytes:
        """Return the file at ``url``, whatever type its host says it is.

        Every hop's host must be allowed, and what is connected to is an address that was found to be public: names are
        looked up once. Raises ``InvalidImage`` with the reason and the remedy.
        """
        if url[:5].lower() == "file:":
            raise InvalidImage("files of the server are never read; send what is in yours, as a data: URL")
        if not url[:8].lower().startswith(("http://", "https://")):
            raise InvalidImage(_NO_URL)
        if not self._config.allowed_hosts:
            raise InvalidImage(f"this server fetches no images; {_HAVE_ALLOWED}")
        try:
            async with self._places, asyncio.timeout(self._config.fetch_timeout_s):
                return await self._follow(_parse(url))
        except TimeoutError:
            raise InvalidImage(
                f"its host did not send it within {self._config.fetch_timeout_s:g} s; send it as a data: URL"
            ) from None
        except aiohttp.ClientError as error:
            why = next(words for kind, words in _FAILURES if isinstance(error, kind))
            raise InvalidImage(f"{why}; check the URL, or send it as a data: URL") from error

    async def _follow(self, url: URL) -> bytes:
        for _ in range(self._config.max_redirects + 1):
            async with self._response(url) as response:
                location = response.headers.get("location")
                if response.status not in (301, 302, 303, 307, 308) or location is None:
                    return await self._body(response)
            url = url.join(_parse(location, relative=True))
        raise InvalidImage(f"its host redirects more than {self._config.max_redirects} times; give the last URL")

    @asynccontextmanager
    async def _response(self, url: URL) -> AsyncIterator[aiohttp.ClientResponse]:
        addresses = await self._addresses(url)
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(resolver=_Found(addresses), force_close=True),
                cookie_jar=aiohttp.DummyCookieJar(),
                # Else a few bytes could become many.
                auto_decompress=False,
                headers={"accept-encoding": "identity", "accept": "image/*", "user-agent": "penstock"},
            ) as session,
            session.get(url, allow_redirects=False) as response,
        ):
            yield response

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        if response.status != 200:
            raise InvalidImage(f"its host answers {response.status}; check the URL, or send it as a data: URL")
        encodings = {one.strip().lower() for one in response.headers.get("content-encoding", "").split(",")}
        for compression in sorted(encodings & _COMPRESSIONS):
            raise InvalidImage(
                f"its host compresses it ({compression}), which it was asked not to; have it sent as it is, "
                "or send it as a data: URL"
            )
        most = self._config.max_bytes
        pieces = bytearray()
        if (response.content_length or 0) <= most:
            async for piece in response.content.iter_chunked(_PIECE_BYTES):
                pieces += piece
                if len(pieces) > most:
                    break
            else:
                return bytes(pieces)
        raise InvalidImage(f"it has more than the {most} bytes that are read; send a smaller file")

    async def _addresses(self, url: URL) -> Sequence[ResolveResult]:
        """Return where to connect to for ``url``. Raises ``InvalidImage`` unless all of it is allowed."""
        host, port = url.raw_host, url.port
        if url.scheme not in ("http", "https") or not host or port is None:
            raise InvalidImage(_NO_URL)
        if url.raw_user is not None or url.raw_password is not None:
            raise InvalidImage("its URL has a user's name or password in it; leave them out")
        if not any(_allows(entry, host, port) for entry in self._config.allowed_hosts):
            where = f"{_bracketed(host)}:{port}"[:_MOST_SHOWN_CHARS]
            raise InvalidImage(f"this server fetches no images from {where}; {_HAVE_ALLOWED}")
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise InvalidImage(f"there is no host {host[:_MOST_SHOWN_CHARS]}; check the URL") from error
        addresses = [(family, str(address[0])) for family, _, _, _, address in found]
        if not self._config.allow_private_addresses and not all(_is_public(address) for _, address in addresses):
            raise InvalidImage(
                f"the address of {_bracketed(host)[:_MOST_SHOWN_CHARS]} is not a public one; send it as a data: URL, "
                "or have the operator set images.allow_private_addresses"
            )
        return [
            ResolveResult(hostname=host, host=address, port=port, family=family, proto=0, flags=socket.AI_NUMERICHOST)
            for family, address in addresses
        ]


class _Found(AbstractResolver):
    """Answers with addresses that were looked up, and judged, before."""

    def __init__(self, addresses: Sequence[ResolveResult]) -> None:
        self._addresses = addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Return them."""
        return list(self._addresses)

    async def close(self) -> None:
        """Nothing to close."""


def _parse(url: str, *, relative: bool = False) -> URL:
    try:
        parsed = URL(url)
        # Raises for a port that is none.
        if parsed.port is not None or relative:
            return parsed
    except ValueError:
        found = _PORT.match(url)
        if found and not (found[1].isascii() and found[1].isdigit() and int(found[1][:_MOST_PORT_CHARS]) < 1 << 16):
            raise InvalidImage(
                f"the port in its URL is {found[1][:_MOST_PORT_CHARS]!r}; a port is a number up to 65535"
            ) from None
    raise InvalidImage(_NO_URL)


def _bracketed(host: str) -> str:
    """Return a host as URLs write it."""
    return f"[{host}]" if ":" in host else host


def _allows(entry: str, host: str, port: int) -> bool:
    """Whether an entry of the allow-list covers a host and its port."""
    name, _, own_port = entry.lower().partition(":")
    if port != int(own_port) if own_port else port not in _DEFAULT_PORTS:
        return False
    return name in ("*", host) or (name.startswith("*.") and host.endswith(name[1:]))


def _is_public(text: str) -> bool:
    address = _meant(ipaddress.ip_address(text.partition("%")[0]))
    return address.is_global and not address.is_multicast


def _meant(address: _Address) -> _Address:
    """Return the IPv4 address that an IPv6 address is another form of, else the address."""
    if not isinstance(address, ipaddress.IPv6Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address
