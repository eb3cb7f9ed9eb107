"""Requests that generate nothing: what the engine says of many prompts, of which a bounded number run at a time."""

import asyncio
import contextlib
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import Request
from pydantic import Field

from penstock.errors import ContextTooLong, InvalidRequest
from penstock.http.sse import until_client_leaves
from penstock.protocol import EngineClient, GenerateRequest, Pooling, Priority, SamplingParams, TokenDelta
from penstock.server.api import API
from penstock.server.prepare import check_model
from penstock.server.schemas import PenstockOptions
from penstock.server.strict import Strict


class PromptsRequest(Strict):
    """What the routes that generate nothing have in common."""

    model: str | None = Field(None, max_length=512)
    user: str | None = Field(None, max_length=512)
    cache_salt: str = Field("", max_length=512)
    penstock: PenstockOptions = Field(default_factory=lambda: PenstockOptions.model_validate({}))


class PromptReadings:
    """What the engine said of each prompt, and what that cost."""

    def __init__(self, body: PromptsRequest, answer_id: str, model: str, deltas: Sequence[TokenDelta]) -> None:
        self.answer_id = answer_id
        self.model = model
        self.deltas = deltas
        usages = [delta.usage for delta in deltas if delta.usage is not None]
        self.num_tokens = sum(usage.num_prompt_tokens for usage in usages)
        self.num_cached_tokens = sum(usage.num_cached_tokens for usage in usages)
        self._wants_timeline = body.penstock.timeline

    @property
    def ends(self) -> dict[str, Any]:
        """What every answer ends with."""
        usage = {
            "prompt_tokens": self.num_tokens,
            "total_tokens": self.num_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }
        if not self._wants_timeline:
            return {"usage": usage}
        return {"usage": usage, "penstock": {"timeline": [delta.timeline for delta in self.deltas]}}


async def read_prompts(
    api: API,
    request: Request,
    body: PromptsRequest,
    prompts: Sequence[Sequence[int]],
    *,
    kind: str,
    param: str,
    scored_from: Sequence[int] | None = None,
    pooling: Pooling | None = None,
) -> PromptReadings:
    """Have the engine read each of ``prompts``, which are those in ``param``: pool it, or score it from a token on.

    Ends when the client leaves. Raises ``RequestError`` naming the parameter at fault.
    """
    model = check_model(body.model, api.names)
    answer_id = f"{kind}-{uuid.uuid4().hex}"
    summary = request.state.summary
    summary.update(answer_id=answer_id, num_prompts=len(prompts), tenant=body.penstock.tenant)
    info = api.client.model()
    most = min(info.max_model_tokens, api.config.max_prompt_tokens or info.max_model_tokens)
    for i, token_ids in enumerate(prompts):
        _check(token_ids, most, info.vocab_size, param if len(prompts) == 1 else f"{param}.{i}")
    options = body.penstock
    requests = [
        GenerateRequest(
            request_id=f"{answer_id}-{i}",
            prompt_token_ids=list(token_ids),
            sampling=SamplingParams(max_tokens=0)
            if scored_from is None
            else SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_logprobs_from=scored_from[i]),
            priority=Priority[options.priority],
            deadline_s=options.deadline_s,
            tenant=options.tenant,
            cache_salt=body.cache_salt,
            adapter=body.model if body.model in api.client.adapters() else None,
            pooling=pooling,
        )
        for i, token_ids in enumerate(prompts)
    ]
    with request.state.waited.waiting():
        deltas = await until_client_leaves(request, _run(api.client, requests, api.config.max_prompts))
    readings = PromptReadings(body, answer_id, model, deltas)
    summary.update(num_prompt_tokens=readings.num_tokens, num_cached_tokens=readings.num_cached_tokens)
    return readings


def _check(token_ids: Sequence[int], most: int, vocab_size: int, param: str) -> None:
    if not token_ids:
        raise InvalidRequest(f"{param} is empty: it must hold at least one token", param=param)
    if len(token_ids) > most:
        raise ContextTooLong(
            f"{param} takes {len(token_ids)} tokens and at most {most} are read; shorten it", param=param
        )
    if max(token_ids) >= vocab_size:
        raise InvalidRequest(
            f"token id {max(token_ids)} is not in the vocabulary: ids go from 0 to {vocab_size - 1}", param=param
        )


async def _run(client: EngineClient, requests: Sequence[GenerateRequest], at_once: int) -> list[TokenDelta]:
    """Return the one delta of each request; the failure of one, or being cancelled, ends them all."""
    places = asyncio.Semaphore(at_once)

    async def run(request: GenerateRequest) -> TokenDelta:
        async with places, contextlib.aclosing(client.generate(request)) as deltas:
            (delta,) = [delta async for delta in deltas]
            return delta

    tasks = [asyncio.create_task(run(request)) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
