"""Events survive their way to a reader, and an answer ends when its reader leaves."""

import asyncio
import itertools
import json
from collections.abc import AsyncGenerator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from openai._streaming import SSEDecoder
from starlette.requests import Request
from starlette.types import Message

from penstock.http.sse import (
    DONE,
    ClientLeft,
    Event,
    EventReader,
    EventStream,
    EventTooLarge,
    event,
    until_client_leaves,
)

TEXT = st.text(
    alphabet=st.sampled_from("ab: \u2028\u2029\x85\x0b\x0cé👍\n\r") | st.characters(exclude_categories=["Cs"])
)
UNICODE_LINE_ENDS = "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven"


def cut(data: bytes, borders: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(border % (len(data) + 1) for border in borders)})
    return [data[start:end] for start, end in itertools.pairwise(places)]


def read(pieces: list[bytes], max_event_bytes: int = 1 << 20) -> list[Event]:
    reader = EventReader(max_event_bytes)
    return [one for piece in pieces for one in reader.feed(piece)] + reader.end()


def lines_of(text: str) -> bytes:
    """Return ``text`` with the ends of its lines as a reader sees them."""
    return text.replace("\r\n", "\n").replace("\r", "\n").encode()


def test_one_line_is_one_field() -> None:
    assert event(b'{"a": 1}') == b'data: {"a": 1}\n\n'
    assert event(b"x", "error") == b"event: error\ndata: x\n\n"
    assert event(b"") == b"data: \n\n"


def test_each_line_is_a_field_of_its_own() -> None:
    assert event(b"one\ntwo\r\n\rthree\n") == b"data: one\ndata: two\ndata: \ndata: three\ndata: \n\n"


def test_a_name_cannot_bring_fields_with_it() -> None:
    with pytest.raises(AssertionError):
        event(b"x", "error\ndata: y")


@given(st.lists(TEXT, max_size=5), st.lists(st.integers(0, 10_000), max_size=8))
@example([UNICODE_LINE_ENDS, ""], [3, 4, 5])
def test_what_is_written_is_read_however_it_is_cut(texts: list[str], borders: list[int]) -> None:
    stream = b"".join(event(text.encode(), "part") for text in texts) + DONE
    assert read(cut(stream, borders)) == [*(Event(lines_of(text), "part") for text in texts), Event(b"[DONE]")]


@given(st.lists(TEXT, min_size=1, max_size=5))
@example([UNICODE_LINE_ENDS])
def test_the_openai_client_reads_the_same(texts: list[str]) -> None:
    stream = b"".join(event(json.dumps({"text": text}, ensure_ascii=False).encode()) for text in texts)
    assert [json.loads(one.data)["text"] for one in SSEDecoder().iter_bytes(iter([stream]))] == texts
    lines = b"".join(event(text.encode()) for text in texts)
    assert [one.data for one in SSEDecoder().iter_bytes(iter([lines]))] == [lines_of(text).decode() for text in texts]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_every_line_end_of_the_format_is_known(end: bytes) -> None:
    stream = end.join([b": ping", b"id: 7", b"retry: 1", b"event: x", b"data:a", b"data: b", b"", b"data", b"", b""])
    expected = [Event(b"a\nb", "x"), Event(b"")]
    assert read([stream]) == expected
    assert read([bytes((byte,)) for byte in stream]) == expected


def test_an_event_without_data_is_none() -> None:
    assert read([b"event: ping\n\n: nothing\n\ndata: x\n\n"]) == [Event(b"x")]


@pytest.mark.parametrize("stream", [b"data: " + b"x" * 200, b"data: xxxx\n" * 40])
def test_an_event_too_large_is_refused_while_it_comes(stream: bytes) -> None:
    with pytest.raises(EventTooLarge, match="100 bytes"):
        read([bytes((byte,)) for byte in stream], max_event_bytes=100)


def test_the_limit_is_for_one_event_and_not_for_all() -> None:
    assert len(read([event(b"x" * 80)] * 50, max_event_bytes=100)) == 50


class Client:
    """The other end of an ASGI connection: takes what is sent until it leaves."""

    def __init__(self, *, takes: int = 1_000_000) -> None:
        self.sent: list[Message] = []
        self.leaves = asyncio.Event()
        self.has_begun = asyncio.Event()
        self._takes = takes

    async def receive(self) -> Message:
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if len(self.sent) >= self._takes:
            await asyncio.Event().wait()
        self.sent.append(message)
        if len(self.sent) == 3:
            self.has_begun.set()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


class Source:
    """Events that are counted, with an end that is noticed."""

    def __init__(self, num_events: int | None = None) -> None:
        self._num_events = num_events
        self.is_closed = False

    async def events(self) -> AsyncGenerator[bytes, None]:
        try:
            for number in itertools.count() if self._num_events is None else range(self._num_events):
                await asyncio.sleep(0)
                yield event(str(number).encode())
        finally:
            self.is_closed = True


SCOPE = {"type": "http", "method": "POST", "path": "/", "headers": []}


async def test_a_whole_stream_ends_with_an_empty_last_piece() -> None:
    client, source = Client(), Source(3)
    await EventStream(source.events())(SCOPE, client.receive, client.send)
    headers = dict(client.sent[0]["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert headers[b"cache-control"] == b"no-cache"
    assert b"content-length" not in headers
    assert client.body == b"data: 0\n\ndata: 1\n\ndata: 2\n\n"
    assert client.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
    assert source.is_closed


@pytest.mark.parametrize("takes", [1_000_000, 3], ids=["while waiting for an event", "while sending one"])
async def test_a_client_that_leaves_ends_the_source_at_once(takes: int) -> None:
    client, source = Client(takes=takes), Source()
    answering = asyncio.create_task(EventStream(source.events())(SCOPE, client.receive, client.send))
    await client.has_begun.wait()
    client.leaves.set()
    with pytest.raises(ClientLeft):
        await answering
    assert source.is_closed


async def test_work_is_cancelled_when_its_client_leaves() -> None:
    client = Client()
    ended = asyncio.Event()

    async def work() -> None:
        try:
            client.leaves.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.set()

    with pytest.raises(ClientLeft):
        await until_client_leaves(Request(SCOPE, client.receive), work())
    assert ended.is_set()


async def test_work_that_is_done_is_returned_and_its_fault_raised() -> None:
    async def fail() -> None:
        raise KeyError("inside")

    async def succeed() -> int:
        return 7

    request = Request(SCOPE, Client().receive)
    assert await until_client_leaves(request, succeed()) == 7
    with pytest.raises(KeyError):
        await until_client_leaves(request, fail())
