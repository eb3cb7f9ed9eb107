"""The driver keeps to the load and notes what happened."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from penstock.bench import BenchRequest, EngineTarget, LengthRange, UrlTarget, Workload, drive, repeat
from penstock.errors import Overloaded
from penstock.http.client import OpenAIClient
from penstock.protocol import (
    EngineState,
    EngineStatus,
    ErrorInfo,
    GenerateRequest,
    ModelInfo,
    TokenDelta,
)


class CountingTarget:
    """Answers one token per piece, yielding to others between pieces."""

    def __init__(self, fail: frozenset[int] = frozenset()) -> None:
        self.fail = fail
        self.num_running = 0
        self.most_running = 0
        self.ids: list[str] = []

    async def generate(self, request: BenchRequest, request_id: str, on_piece: Callable[[], None]) -> int:
        self.ids.append(request_id)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            for _ in range(request.num_output_tokens):
                await asyncio.sleep(0)
                on_piece()
            if len(self.ids) - 1 in self.fail:
                raise Overloaded("full")
        finally:
            self.num_running -= 1
        return request.num_output_tokens


def requests(count: int, *, every_s: float = 0.0) -> list[BenchRequest]:
    return [
        BenchRequest(prompt_token_ids=(1, 2), num_output_tokens=3, arrival_s=index * every_s) for index in range(count)
    ]


async def test_a_closed_loop_keeps_its_concurrency() -> None:
    target = CountingTarget()
    finished: list[None] = []
    run = await drive(target, requests(20), concurrency=4, name="run", on_finished=lambda: finished.append(None))
    assert target.most_running == 4
    assert len(finished) == len(run.outcomes) == 20
    assert len(set(target.ids)) == 20
    for outcome in run.outcomes:
        assert outcome.num_output_tokens == len(outcome.piece_s) == 3
        assert outcome.ttft_s is not None
        assert 0 <= outcome.ttft_s <= outcome.e2e_s
        assert len(outcome.gaps_s) == 2
        assert outcome.error is None


async def test_an_open_loop_sends_when_requests_are_due() -> None:
    target = CountingTarget()
    run = await drive(target, requests(5, every_s=0.01), concurrency=None, name="run")
    assert [outcome.due_s for outcome in run.outcomes] == pytest.approx([0, 0.01, 0.02, 0.03, 0.04])
    assert all(outcome.piece_s[0] >= outcome.due_s for outcome in run.outcomes)
    assert run.duration_s >= 0.04


async def test_an_error_is_an_outcome() -> None:
    run = await drive(CountingTarget(fail=frozenset({1})), requests(3), concurrency=1, name="run")
    assert [outcome.error for outcome in run.outcomes] == [None, "overloaded", None]
    assert run.outcomes[1].num_output_tokens == 0


async def test_repetitions_follow_a_warm_up_that_is_dropped() -> None:
    target = CountingTarget()
    length = LengthRange(low=2, high=2)
    workload = Workload(num_requests=6, prompt_tokens=length, output_tokens=length, concurrency=2)
    finished: list[None] = []
    runs = await repeat(
        target, workload, range(9), repetitions=3, num_warmup=4, on_finished=lambda: finished.append(None)
    )
    assert [len(run.outcomes) for run in runs] == [6, 6, 6]
    assert len(finished) == len(set(target.ids)) == 4 + 3 * 6


class ScriptedClient:
    """An engine that answers each request with the deltas it was given."""

    def __init__(self, deltas: list[TokenDelta]) -> None:
        self.deltas = deltas
        self.requests: list[GenerateRequest] = []

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        self.requests.append(request)
        for delta in self.deltas:
            yield delta

    async def start(self) -> None: ...

    def status(self) -> EngineStatus:
        return EngineStatus(state=EngineState.READY)

    def model(self) -> ModelInfo:
        raise NotImplementedError

    async def load_adapter(self, name: str, path: str) -> None:
        raise NotImplementedError

    async def unload_adapter(self, name: str) -> None:
        raise NotImplementedError

    def adapters(self) -> tuple[str, ...]:
        return ()

    async def drain(self, timeout_s: float) -> bool:
        return True

    async def stop(self) -> None: ...


async def test_an_engine_is_asked_for_exactly_as_many_tokens() -> None:
    client = ScriptedClient(
        [
            TokenDelta(request_id="r", token_ids=(1,)),
            TokenDelta(request_id="r", token_ids=(2, 3)),
            TokenDelta(request_id="r", finish_reason="length"),
        ]
    )
    run = await drive(EngineTarget(client), requests(1), concurrency=1, name="run")
    assert run.outcomes[0].num_output_tokens == 3
    assert len(run.outcomes[0].piece_s) == 2
    assert client.requests[0].sampling.ignore_eos
    assert client.requests[0].sampling.max_tokens == 3
    assert client.requests[0].prompt_token_ids == [1, 2]


async def test_an_engine_error_keeps_its_code() -> None:
    failed = TokenDelta(
        request_id="r", finish_reason="error", error=ErrorInfo(code="step_failed", message="a step failed")
    )
    run = await drive(EngineTarget(ScriptedClient([failed])), requests(1), concurrency=1, name="run")
    assert run.outcomes[0].error == "step_failed"


async def test_a_server_is_counted_by_its_usage() -> None:
    asked: list[dict[str, Any]] = []

    async def completions(request: web.Request) -> web.StreamResponse:
        asked.append(await request.json())
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for event in (
            '{"choices": [{"text": "a"}]}',
            '{"choices": [{"text": ""}]}',
            '{"choices": [{"text": "bc"}]}',
            '{"choices": [], "usage": {"completion_tokens": 3}}',
            "[DONE]",
        ):
            await response.write(f"data: {event}\n\n".encode())
        return response

    app = web.Application()
    app.router.add_post("/v1/completions", completions)
    async with TestServer(app) as server, OpenAIClient(str(server.make_url("/"))) as client:
        run = await drive(UrlTarget(client, "mini"), requests(1), concurrency=1, name="run")
    assert run.outcomes[0].error is None
    assert run.outcomes[0].num_output_tokens == 3
    assert len(run.outcomes[0].piece_s) == 2
    assert asked[0]["ignore_eos"] is True
    assert asked[0]["stream"] is True
    assert asked[0]["prompt"] == [1, 2]
