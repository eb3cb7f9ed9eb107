"""A model to be examined: an engine, asked for log-likelihoods and answers as any client would ask it."""

import asyncio
import base64
import io
import itertools
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar

from PIL.Image import Image

from penstock.errors import InvalidSetting, error_from_code
from penstock.images.reader import ImageReader
from penstock.protocol import EngineClient, GenerateRequest, Picture, SamplingParams, TokenDelta
from penstock.server.rendering import Renderer
from penstock.server.schemas import ChatCompletionRequest
from penstock.text import Tokenizer
from penstock.text.chat_template import ChatTemplate

_MOST_UNDER_WAY = 64
"""Requests in the engine at once: enough to fill its steps, few enough to be far from its queue's end."""

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class Subject:
    """An engine and its model's text side. Belongs to one event loop."""

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        images: ImageReader | None = None,
    ) -> None:
        self.client = client
        self.tokenizer = tokenizer
        self.template = template
        self._renderer = None if images is None else Renderer(tokenizer, template, images)
        self._name = uuid.uuid4().hex[:8]
        self._numbers = itertools.count()

    async def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Return the log-likelihood of each token but the first, given those before it. Raises ``PenstockError``.

        The last one is not read but generated, the only token allowed: so as many tokens fit as the model holds.
        """
        *prompt, last = token_ids
        sampling = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, logprobs=0, allowed_token_ids=(last,), ignore_eos=True
        )
        deltas = await self.run(prompt, sampling)
        scores = [score for delta in deltas for score in (*delta.prompt_logprobs, *delta.logprobs)]
        assert len(scores) == len(prompt), "one for each token but the first"
        return [score.chosen.logprob for score in scores]

    async def shown(self, image: Image, question: str) -> tuple[list[int], tuple[Picture, ...]]:
        """Return the prompt that asks about an image, as the server makes it of a chat. Raises ``PenstockError``."""
        if self._renderer is None:
            raise InvalidSetting("the task shows images, and this model sees none; choose others with --task")
        file = io.BytesIO()
        image.save(file, "png")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        chat = {"model": "", "messages": [{"role": "user", "content": content}]}
        rendered = await self._renderer.render(
            ChatCompletionRequest.model_validate(chat), most_image_tokens=self.client.model().max_model_tokens
        )
        return rendered.token_ids, rendered.pictures

    async def answer(
        self,
        prompt: list[int],
        *,
        max_tokens: int,
        stop: tuple[str, ...] = (),
        pictures: tuple[Picture, ...] = (),
    ) -> str:
        """Return the greedy answer. Raises ``PenstockError``."""
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, stop=stop)
        return "".join(delta.text for delta in await self.run(prompt, sampling, pictures))

    async def run(
        self, prompt: list[int], sampling: SamplingParams, pictures: tuple[Picture, ...] = ()
    ) -> list[TokenDelta]:
        """Return all deltas of one request. Raises ``PenstockError``."""
        request_id = f"eval-{self._name}-{next(self._numbers)}"
        request = GenerateRequest(request_id=request_id, prompt_token_ids=prompt, sampling=sampling, pictures=pictures)
        deltas = []
        async with aclosing(self.client.generate(request)) as stream:
            async for delta in stream:
                if delta.error is not None:
                    raise error_from_code(delta.error.code, delta.error.message, param=delta.error.param)
                deltas.append(delta)
        return deltas


async def each(
    items: Sequence[ItemT], work: Callable[[ItemT], Awaitable[ResultT]], on_item: Callable[[int, int], None]
) -> list[ResultT]:
    """Return what ``work`` makes of each item, in order, many under way at a time; the first error ends them all."""
    under_way = asyncio.Semaphore(_MOST_UNDER_WAY)
    num_done = 0

    async def one(item: ItemT) -> ResultT:
        nonlocal num_done
        async with under_way:
            result = await work(item)
        num_done += 1
        on_item(num_done, len(items))
        return result

    tasks = [asyncio.ensure_future(one(item)) for item in items]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        # Each closes its request before the engine is asked anything else.
        await asyncio.gather(*tasks, return_exceptions=True)
