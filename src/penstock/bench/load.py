"""Drive a target with a load and note when each piece of each answer came."""

import asyncio
import dataclasses
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from penstock.bench.workload import BenchRequest, Workload, draw_requests
from penstock.errors import PenstockError, UnavailableError, error_from_code
from penstock.http.client import OpenAIClient
from penstock.protocol import EngineClient, GenerateRequest, SamplingParams

_WORDS = ("the", "of", "and", "to", "in", "is", "that", "it")
"""Each is one token to most tokenizers."""


class Target(Protocol):
    """What is measured."""

    async def generate(self, request: BenchRequest, request_id: str, on_piece: Callable[[], None]) -> int:
        """Return how many tokens the answer had; ``on_piece`` is called as each piece of it comes.

        Raises PenstockError.
        """


class EngineTarget:
    """An engine behind its client; a piece is what one step added."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client

    async def generate(self, request: BenchRequest, request_id: str, on_piece: Callable[[], None]) -> int:
        """Return the tokens of all deltas."""
        sampling = SamplingParams(max_tokens=request.num_output_tokens, ignore_eos=True, temperature=0.0)
        generate = GenerateRequest(
            request_id=request_id, prompt_token_ids=list(request.prompt_token_ids), sampling=sampling
        )
        num_tokens = 0
        async for delta in self._client.generate(generate):
            if delta.error is not None:
                raise error_from_code(delta.error.code, delta.error.message, param=delta.error.param)
            if delta.token_ids:
                num_tokens += len(delta.token_ids)
                on_piece()
        return num_tokens


class UrlTarget:
    """A server's ``/v1/completions``, or its chat where there are images; a piece is an event that carries text."""

    def __init__(self, client: OpenAIClient, model: str, also: Mapping[str, Any] | None = None) -> None:
        """``also`` is what a server wants in the body beside what every one does."""
        self._client = client
        self._model = model
        self._also = also or {}

    async def generate(self, request: BenchRequest, request_id: str, on_piece: Callable[[], None]) -> int:
        """Return the tokens the server says it generated."""
        path, prompt = _asked(request)
        body = {
            "model": self._model,
            **prompt,
            "max_tokens": request.num_output_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream_options": {"include_usage": True},
            **self._also,
        }
        num_tokens = None
        async with aclosing(self._client.stream(path, body)) as events:
            async for event in events:
                choices = event.get("choices", ())
                if any(choice.get("text") or choice.get("delta", {}).get("content") for choice in choices):
                    on_piece()
                if event.get("usage"):
                    num_tokens = int(event["usage"]["completion_tokens"])
        if num_tokens is None:
            raise UnavailableError("the server sent no usage, so its tokens cannot be counted")
        return num_tokens


def _asked(request: BenchRequest) -> tuple[str, dict[str, Any]]:
    """Return the route for a request and its prompt there: chats take no tokens, so there it is words."""
    if not request.images:
        return "/completions", {"prompt": list(request.prompt_token_ids)}
    words = " ".join(_WORDS[token_id % len(_WORDS)] for token_id in request.prompt_token_ids)
    shown = [{"type": "image_url", "image_url": {"url": url}} for url in request.images]
    return "/chat/completions", {"messages": [{"role": "user", "content": [*shown, {"type": "text", "text": words}]}]}


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of one request. Moments are seconds after the run began."""

    num_prompt_tokens: int
    num_output_tokens: int
    """0 unless the answer came whole."""
    due_s: float
    """When it was to be sent: a driver that falls behind is charged to the target, not hidden."""
    piece_s: tuple[float, ...]
    """When each piece of the answer came."""
    finished_s: float
    error: str | None = None
    """The error's code; None for a whole answer."""

    @property
    def ttft_s(self) -> float | None:
        """Time to first token: from due to the first piece."""
        return self.piece_s[0] - self.due_s if self.piece_s else None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens after the first over the time from the first piece to the last; None with fewer than two."""
        if len(self.piece_s) < 2 or self.piece_s[-1] <= self.piece_s[0]:
            return None
        return (self.num_output_tokens - 1) / (self.piece_s[-1] - self.piece_s[0])

    @property
    def gaps_s(self) -> list[float]:
        """Inter-token latencies: the time from each piece to the next."""
        return [after - before for before, after in zip(self.piece_s, self.piece_s[1:], strict=False)]

    @property
    def e2e_s(self) -> float:
        """End-to-end latency: from due to the end of the answer."""
        return self.finished_s - self.due_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One repetition of a load."""

    outcomes: tuple[Outcome, ...]
    duration_s: float
    """From the first request's due time to the end of the last answer."""


async def drive(
    target: Target,
    requests: Sequence[BenchRequest],
    *,
    concurrency: int | None,
    name: str,
    on_finished: Callable[[], None] = lambda: None,
) -> Run:
    """Send ``requests`` and return what became of them, in their order.

    With a ``concurrency`` that many are under way at a time; without one each is sent at its ``arrival_s``.
    ``name`` makes the request ids unique. ``on_finished`` is called after each request. Errors the target
    answers with are outcomes; anything else is a fault of ours and is raised.
    """
    began = time.perf_counter()
    under_way = asyncio.Semaphore(concurrency if concurrency is not None else len(requests))

    async def one(index: int, request: BenchRequest) -> Outcome:
        if concurrency is None:
            await asyncio.sleep(began + request.arrival_s - time.perf_counter())
        async with under_way:
            due_s = request.arrival_s if concurrency is None else time.perf_counter() - began
            outcome = await _send(target, request, f"{name}-{index}", began, due_s)
        on_finished()
        return outcome

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(index, request)) for index, request in enumerate(requests)]
    outcomes = tuple(task.result() for task in tasks)
    first_s = min(outcome.due_s for outcome in outcomes)
    return Run(outcomes=outcomes, duration_s=max(outcome.finished_s for outcome in outcomes) - first_s)


async def repeat(
    target: Target,
    workload: Workload,
    token_ids: Sequence[int],
    *,
    repetitions: int,
    num_warmup: int,
    on_finished: Callable[[], None] = lambda: None,
    on_warm: Callable[[], None] = lambda: None,
) -> list[Run]:
    """Return ``repetitions`` runs of ``workload``, after ``num_warmup`` requests whose outcomes are dropped.

    Warm-up requests are sent at the load's own concurrency, all at once in an open loop; ``on_finished`` is
    called after each request, theirs included; ``on_warm`` once, before what counts.
    """
    name = uuid.uuid4().hex[:8]
    if num_warmup:
        warmup = dataclasses.replace(workload, num_requests=num_warmup)
        requests = draw_requests(warmup, token_ids, repetition=-1)
        await drive(
            target,
            requests,
            concurrency=workload.concurrency or num_warmup,
            name=f"{name}-warmup",
            on_finished=on_finished,
        )
    on_warm()
    return [
        await drive(
            target,
            draw_requests(workload, token_ids, repetition=repetition),
            concurrency=workload.concurrency,
            name=f"{name}-{repetition}",
            on_finished=on_finished,
        )
        for repetition in range(repetitions)
    ]


async def _send(target: Target, request: BenchRequest, request_id: str, began: float, due_s: float) -> Outcome:
    piece_s: list[float] = []
    num_output_tokens = 0
    error: str | None = None
    try:
        num_output_tokens = await target.generate(
            request, request_id, lambda: piece_s.append(time.perf_counter() - began)
        )
    except PenstockError as fault:
        error = fault.code
    return Outcome(
        num_prompt_tokens=len(request.prompt_token_ids),
        num_output_tokens=num_output_tokens,
        due_s=due_s,
        piece_s=tuple(piece_s),
        finished_s=time.perf_counter() - began,
        error=error,
    )
