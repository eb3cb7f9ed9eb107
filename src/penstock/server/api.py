"""What the generating routes share: from a body to the engine's requests, and from its deltas to a response."""

import contextlib
import sys
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastapi import Request
from starlette.responses import Response

from penstock.errors import InvalidRequest
from penstock.http.sse import EventStream, until_client_leaves
from penstock.protocol import EngineClient, GenerateRequest, Picture
from penstock.server.answers import Answer, ShownPrompts
from penstock.server.choosing import likeliest
from penstock.server.config import ServerConfig
from penstock.server.prepare import bad_word_tokens, check_model, generate_request, truncated
from penstock.server.reading import Reading
from penstock.server.rendering import NO_SIGHTS, Renderer, Sights, off_loop
from penstock.server.replies import json_response
from penstock.server.schemas import ChatCompletionRequest, CompletionRequest, Prompt, TokenizeChatRequest
from penstock.server.streaming import Answering, Deltas, begun, measured, merged
from penstock.server.structure import GrammarChecker, structure_of
from penstock.server.tools import Conventions, ToolUse, answers_to, reading_of, tool_use
from penstock.text import Tokenizer
from penstock.text.chat_template import ChatTemplate

if TYPE_CHECKING:
    from penstock.images.reader import ImageReader


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation as the model reads it."""

    token_ids: list[int]
    pictures: tuple[Picture, ...]
    sights: Sights
    use: ToolUse | None
    reading: Reading


class API:
    """What the generating routes share."""

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        config: ServerConfig,
        images: "ImageReader | None" = None,
    ) -> None:
        """``images`` reads them for a model that sees."""
        self.client = client
        self.tokenizer = tokenizer
        self.config = config
        self._renderer = Renderer(tokenizer, template, images)
        self._conventions = Conventions.of(template, config)
        self._grammars = GrammarChecker(tokenizer, client.model, config)

    @property
    def base_names(self) -> tuple[str, ...]:
        """What the model itself is served as."""
        return self.config.served_names or (self.client.model().name,)

    @property
    def names(self) -> tuple[str, ...]:
        """The model's and its adapters'."""
        return (*self.base_names, *self.client.adapters())

    async def conversation(self, body: ChatCompletionRequest | TokenizeChatRequest) -> Conversation:
        """Return a conversation's tokens and what is to be expected of the answer."""
        use = tool_use(body, self._conventions)
        rendered = await self._renderer.render(
            body,
            most_image_tokens=min(self.config.max_prompt_tokens or sys.maxsize, self.client.model().max_model_tokens),
            tools=None if use is None else use.shown,
        )
        reading = reading_of(use, self._conventions, rendered.text)
        return Conversation(rendered.token_ids, rendered.pictures, rendered.sights, use, reading)

    async def text_tokens(self, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Return each text's tokens."""
        return await off_loop(
            lambda: [self.tokenizer.encode(text, add_special_tokens=add_special_tokens) for text in texts],
            sum(map(len, texts)),
        )

    async def prompts(self, given: Prompt, *, param: str, most: int, add_special_tokens: bool) -> list[list[int]]:
        """Return the token ids of each of the prompts in ``param``, which may be ``most``."""
        if isinstance(given, str):
            texts = [given]
        elif not given:
            raise InvalidRequest(f"{param} is empty: give at least one", param=param)
        elif isinstance(given[0], int):
            return [[token_id for token_id in given if isinstance(token_id, int)]]
        else:
            if len(given) > most:
                raise InvalidRequest(
                    f"{param} has {len(given)} items; this server takes at most {most} at once", param=param
                )
            if isinstance(given[0], list):
                return [ids for ids in given if isinstance(ids, list)]
            texts = [text for text in given if isinstance(text, str)]
        return await self.text_tokens(texts, add_special_tokens=add_special_tokens)

    async def _shown(self, body: CompletionRequest | ChatCompletionRequest, prompts: list[list[int]]) -> ShownPrompts:
        """Return what the answers show of their prompts."""
        if isinstance(body, ChatCompletionRequest):
            return ShownPrompts(token_ids=prompts)
        most = body.prompt_logprobs
        if not body.echo:
            return ShownPrompts(token_ids=prompts, num_alternatives=most)
        if isinstance(body.prompt, str) and body.truncate_prompt_tokens is None:
            echoes = [body.prompt]
        else:
            echoes = await off_loop(
                lambda: [self.tokenizer.decode(ids, skip_special_tokens=body.skip_special_tokens) for ids in prompts],
                sum(map(len, prompts)),
            )
        return ShownPrompts(token_ids=prompts, echoes=echoes, num_alternatives=most, hides_output=body.max_tokens == 0)

    async def answer(
        self,
        request: Request,
        body: CompletionRequest | ChatCompletionRequest,
        prompts: list[list[int]],
        conversation: Conversation | None = None,
    ) -> Response:
        """Run every prompt, or the one of a ``conversation``, and return the response, whole or streamed."""
        if body.stream_options is not None and not body.stream:
            raise InvalidRequest("stream_options needs stream to be true", param="stream_options")
        is_chat = isinstance(body, ChatCompletionRequest)
        answer_id = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        requests = await self.requests(request, answer_id, body, prompts, conversation)
        answer = Answer(
            is_chat=is_chat,
            answer_id=answer_id,
            model=check_model(body.model, self.names),
            num_choices=body.num_choices,
            tokenizer=self.tokenizer,
            wants_timeline=body.penstock.timeline,
            reading=None if conversation is None else conversation.reading,
            sights=NO_SIGHTS if conversation is None else conversation.sights,
            prompts=await self._shown(body, [one.prompt_token_ids for one in requests]),
            include_usage=body.stream_options is not None and body.stream_options.include_usage,
            summary=request.state.summary,
        )
        num_drawn = requests[0].sampling.n
        if num_drawn == body.num_choices:
            return await self.respond(request, requests, answer, stream=bool(body.stream))
        deltas = likeliest(
            merged(self.client, requests), num_drawn, body.num_choices, keeps_logprobs=_wants_logprobs(body)
        )
        return await self._whole(request, deltas, answer)

    async def requests(
        self,
        request: Request,
        answer_id: str,
        body: CompletionRequest | ChatCompletionRequest,
        prompts: list[list[int]],
        conversation: Conversation | None = None,
    ) -> list[GenerateRequest]:
        """Return what the engine is asked for: each of ``prompts``, which is a ``conversation``'s if there is one.

        Raises ``RequestError`` naming the parameter of ``body`` at fault.
        """
        model = self.client.model()
        request.state.summary.update(answer_id=answer_id, num_prompts=len(prompts), tenant=body.penstock.tenant)
        structure = structure_of(body)
        reading = None
        pictures: tuple[Picture, ...] = ()
        if conversation is not None:
            reading, pictures = conversation.reading, conversation.pictures
            structure = answers_to(structure, conversation.use, reading, self.tokenizer)
            if pictures:
                request.state.summary.update(
                    num_images=conversation.sights.num_images, num_image_tokens=conversation.sights.num_tokens
                )
        grammar = None if structure is None else await self._grammars.check(structure)
        bad_words = bad_word_tokens(body.bad_words, self.tokenizer)
        return [
            generate_request(
                body,
                truncated(body, ids, model.max_model_tokens, has_pictures=bool(pictures)),
                request_id=f"{answer_id}-{i}",
                model=model,
                config=self.config,
                adapter=body.model if body.model in self.client.adapters() else None,
                grammar=grammar,
                keeps_special_tokens=reading is not None and reading.needs_special_tokens(self.tokenizer),
                bad_words=bad_words,
                pictures=pictures,
            )
            for i, ids in enumerate(prompts)
        ]

    async def respond(
        self, request: Request, requests: list[GenerateRequest], answer: Answering, *, stream: bool
    ) -> Response:
        """Run ``requests`` and return the response that ``answer`` makes of them, whole or streamed."""
        deltas = merged(self.client, requests)
        if not stream:
            return await self._whole(request, deltas, answer)
        deltas = measured(deltas, request.state.waited)
        # The first delta comes before the status does, so that a refusal is not a 200.
        return EventStream(answer.stream(await until_client_leaves(request, begun(deltas))))

    async def _whole(self, request: Request, deltas: Deltas, answer: Answering) -> Response:
        deltas = measured(deltas, request.state.waited)
        async with contextlib.aclosing(deltas):
            return json_response(await until_client_leaves(request, answer.whole(deltas)))


def _wants_logprobs(body: CompletionRequest | ChatCompletionRequest) -> bool:
    return bool(body.logprobs) if isinstance(body, ChatCompletionRequest) else body.logprobs is not None
