"""Fetching from a real server, and refusing to."""

import asyncio
import contextlib
import gzip
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web

from penstock.errors import InvalidImage
from penstock.images.config import ImageConfig
from penstock.images.fetching import Fetcher

FILE = bytes(range(256)) * 40


class Host:
    """A server with a file, redirects to it, and bad habits."""

    def __init__(self) -> None:
        self.port = 0
        self.asked: list[web.Request] = []
        self.ended = asyncio.Event()
        self.other = ""
        """Where /elsewhere leads"""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request)
        name = request.path.strip("/")
        if name.startswith("hop"):
            left = int(name[3:])
            raise web.HTTPFound(f"/hop{left - 1}" if left else "/file")
        if name == "elsewhere":
            return web.Response(status=302, headers={"location": self.other})
        if name == "slow":
            await self.ended.wait()
        if name == "endless":
            response = web.StreamResponse()
            await response.prepare(request)
            with contextlib.suppress(ConnectionError):
                while True:
                    await response.write(FILE)
        if name == "missing":
            raise web.HTTPNotFound
        if name == "squeezed":
            return web.Response(body=gzip.compress(b"\0" * 1_000_000), headers={"content-encoding": "gzip"})
        if name == "labelled":
            return web.Response(body=FILE, headers={"content-encoding": "aws-chunked"})
        if name in ("half", "nothing"):
            if name == "half":
                response = web.StreamResponse(headers={"content-length": str(len(FILE))})
                await response.prepare(request)
                await response.write(FILE[:100])
            assert request.transport is not None
            request.transport.close()
        return web.Response(body=FILE, content_type="text/html")


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    host = Host()
    app = web.Application()
    app.router.add_get("/{name:.*}", host.answer)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host.port = runner.addresses[0][1]
    yield host
    host.ended.set()
    await runner.cleanup()


def fetcher(host: Host, **config: Any) -> Fetcher:
    given: dict[str, Any] = {
        "allowed_hosts": (f"127.0.0.1:{host.port}",),
        "allow_private_addresses": True,
        "max_bytes": 20_000,
        "fetch_timeout_s": 5.0,
        **config,
    }
    return Fetcher(ImageConfig(**given))


async def refusal(fetcher: Fetcher, url: str) -> str:
    with pytest.raises(InvalidImage) as refused:
        await fetcher.fetch(url)
    return refused.value.message


async def test_a_file_whatever_its_type(host: Host) -> None:
    assert await fetcher(host).fetch(f"{host.url}/file") == FILE
    (asked,) = host.asked
    assert asked.headers["accept-encoding"] == "identity"
    assert not {"authorization", "cookie"} & {name.lower() for name in asked.headers}


async def test_nothing_is_fetched_unless_allowed(host: Host) -> None:
    for config in (ImageConfig(), ImageConfig(allowed_hosts=("*",))):
        message = await refusal(Fetcher(config), "FILE:///etc/hostname")
        assert message == "files of the server are never read; send what is in yours, as a data: URL"
    assert (
        "fetches no images; send it as a data: URL, or have the operator name its host in images.allowed_hosts"
        in await refusal(Fetcher(ImageConfig()), f"{host.url}/file")
    )
    other = fetcher(host, allowed_hosts=("example.com", "*.example.com", "127.0.0.1"))
    assert f"fetches no images from 127.0.0.1:{host.port}" in await refusal(other, f"{host.url}/file")
    assert host.asked == []


@pytest.mark.parametrize(
    ("entry", "url", "is_allowed"),
    [
        ("example.com", "http://example.com/a", True),
        ("example.com", "https://EXAMPLE.com/a", True),
        ("Example.com", "https://example.com/a", True),
        ("example.com", "https://www.example.com/a", False),
        ("example.com", "https://example.com.evil.org/a", False),
        ("example.com", "https://evil.org/example.com", False),
        ("example.com", "https://example.com:8443/a", False),
        ("example.com:8443", "https://example.com:8443/a", True),
        ("example.com:8443", "https://example.com/a", False),
        ("*.example.com", "https://www.example.com/a", True),
        ("*.example.com", "https://example.com/a", False),
        ("*.example.com", "https://notexample.com/a", False),
        ("*", "https://anything.org/a", True),
        ("*", "https://anything.org:6379/a", False),
    ],
)
async def test_the_allow_list(monkeypatch: pytest.MonkeyPatch, entry: str, url: str, is_allowed: bool) -> None:
    resolves_to(monkeypatch, lambda _: "10.0.0.1")
    message = await refusal(Fetcher(ImageConfig(allowed_hosts=(entry,))), url)
    assert ("is not a public one" if is_allowed else "fetches no images from") in message


def resolves_to(monkeypatch: pytest.MonkeyPatch, answer: Callable[[str], str]) -> list[str]:
    """Have names resolve as a test wants; return the list that those asked for are added to."""
    asked: list[str] = []

    async def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        address = answer(host)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return [(family, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    return asked


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
            "224.0.0.1",
        ),
        *("::1", "::", "fe80::1", "fd00::1", "ff02::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::"),
    ],
)
async def test_private_addresses_are_refused_whatever_their_name(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    resolves_to(monkeypatch, lambda _: address)
    everywhere = Fetcher(ImageConfig(allowed_hosts=("*",)))
    message = await refusal(everywhere, "http://images.example/a.png")
    assert "is not a public one" in message
    assert "images.allow_private_addresses" in message


@pytest.mark.parametrize(
    "written", ["127.0.0.1", "2130706433", "0x7f.1", "127.1", "[::1]", "[::ffff:127.0.0.1]", "localhost"]
)
async def test_private_addresses_are_refused_however_they_are_written(written: str) -> None:
    message = await refusal(Fetcher(ImageConfig(allowed_hosts=("*",))), f"http://{written}/a.png")
    assert "is not a public one" in message or "there is no host" in message


async def test_what_is_connected_to_is_what_was_judged(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["127.0.0.1"])
    asked = resolves_to(monkeypatch, lambda _: next(answers))  # a second look-up would fail
    allowed = fetcher(host, allowed_hosts=(f"images.example:{host.port}",))
    assert await allowed.fetch(f"http://images.example:{host.port}/file") == FILE
    assert asked == ["images.example"]
    assert host.asked[0].headers["host"] == f"images.example:{host.port}"


async def test_redirects_are_followed_so_far(host: Host) -> None:
    assert await fetcher(host).fetch(f"{host.url}/hop2") == FILE
    assert "redirects more than 3 times" in await refusal(fetcher(host), f"{host.url}/hop3")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("http://example.com/a", "fetches no images from example.com:80"),
        ("http://localhost:1/a", "fetches no images from localhost:1"),
        ("file:///etc/passwd", "its URL must be data:"),
        ("http://user:secret@127.0.0.1/a", "a user's name or password"),
        ("http://127.0.0.1:99999/", "the port in its URL is '99999'; a port is a number up to 65535"),
        ("http://[::ffff:127.0.0.1]:8399/a", "fetches no images from [::ffff:7f00:1]:8399;"),
    ],
)
async def test_every_hop_is_judged(host: Host, target: str, message: str) -> None:
    host.other = target
    assert message in await refusal(fetcher(host), f"{host.url}/elsewhere")


async def test_a_redirect_to_a_private_address_is_refused(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = {"public.example": "127.0.0.1", "inside.example": "10.0.0.1"}
    resolves_to(monkeypatch, addresses.__getitem__)
    host.other = f"http://inside.example:{host.port}/a"
    # As if this machine's address were public.
    monkeypatch.setattr("penstock.images.fetching._is_public", lambda address: address == "127.0.0.1")
    allowed = fetcher(host, allowed_hosts=(f"*:{host.port}",), allow_private_addresses=False)
    assert "the address of inside.example is not a public one" in await refusal(
        allowed, f"http://public.example:{host.port}/elsewhere"
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("slow", "did not send it within 0.3 s"),
        ("endless", "more than the 20000 bytes"),
        ("missing", "its host answers 404"),
        ("half", "its host closed the connection before the whole file came; check the URL, or send it"),
        ("nothing", "its host closed the connection without an answer; check the URL, or send it"),
        ("squeezed", "its host compresses it (gzip), which it was asked not to"),
    ],
)
async def test_bad_hosts(host: Host, path: str, message: str) -> None:
    assert message in await refusal(fetcher(host, fetch_timeout_s=0.3 if path == "slow" else 5.0), f"{host.url}/{path}")


async def test_encodings_that_compress_nothing_are_read(host: Host) -> None:
    assert await fetcher(host).fetch(f"{host.url}/labelled") == FILE


@pytest.mark.parametrize("url", ["http://a:70000", "HTTPS://[::1]:x/", "http://u:p@a:-1/b", "http://:99999/"])
async def test_wrong_ports_are_named(url: str) -> None:
    assert "the port in its URL is" in await refusal(Fetcher(ImageConfig(allowed_hosts=("*",))), url)


async def test_tls_where_there_is_none_is_said(host: Host) -> None:
    assert "does not speak TLS" in await refusal(fetcher(host), host.url.replace("http:", "https:"))


async def test_a_size_that_is_said_is_believed(host: Host) -> None:
    assert "more than the 100 bytes" in await refusal(fetcher(host, max_bytes=100), f"{host.url}/file")


@pytest.mark.parametrize(
    "url",
    ["", "x", "ftp://example.com/a", "//example.com/a", "http://", "http://[::1", "http:///a"],
)
async def test_other_urls_are_refused(url: str) -> None:
    assert "its URL must be data:" in await refusal(Fetcher(ImageConfig(allowed_hosts=("*",))), url)


async def test_a_host_that_is_not_there(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    free = socket.create_server(("127.0.0.1", 0))
    port = free.getsockname()[1]
    free.close()
    closed = fetcher(host, allowed_hosts=(f"127.0.0.1:{port}", "nowhere.example"))
    assert "its host refuses connections, or cannot be reached" in await refusal(closed, f"http://127.0.0.1:{port}/a")

    async def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "not known")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    assert "there is no host nowhere.example" in await refusal(closed, "http://nowhere.example/a")
