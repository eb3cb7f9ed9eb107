"""`penstock chat`: a conversation in the terminal, with a model in this process or with a server."""

import asyncio
import base64
import contextlib
import mimetypes
import os
import sys
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from penstock.cli.settings import load_found
from penstock.errors import ConfigError, InvalidImage, PenstockError
from penstock.http.client import OpenAIClient
from penstock.images.config import ImageConfig
from penstock.images.reader import limits_of
from penstock.images.reading import read_image
from penstock.protocol import EngineClient, GenerateRequest, SamplingParams
from penstock.server.rendering import Rendered, Renderer
from penstock.server.schemas import TokenizeChatRequest
from penstock.units import counted

HELP = (
    "/help this list   /reset forget the conversation   /system TEXT set the system message   "
    "/image FILE show an image with the next question   /quit leave"
)


@dataclass(slots=True)
class Conversation:
    """What was said so far."""

    system: str | None
    temperature: float
    max_tokens: int
    turns: list[dict[str, Any]] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    """As data: URLs, those to show with the next question"""

    def messages(self) -> list[dict[str, Any]]:
        """Return the turns, system message first."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + self.turns

    def ask(self, question: str) -> None:
        """Add a question with the images that are to be shown with it."""
        shown = [{"type": "image_url", "image_url": {"url": url}} for url in self.images]
        content = [*shown, {"type": "text", "text": question}] if shown else question
        self.turns.append({"role": "user", "content": content})

    def answered(self, text: str) -> None:
        """Add the answer. The images have been shown."""
        self.turns.append({"role": "assistant", "content": text})
        self.images.clear()

    def refused(self) -> None:
        """Forget the question, and the images, which may be why."""
        self.turns.pop()
        self.images.clear()


class Partner(Protocol):
    """Who answers."""

    name: str

    def answer(self, conversation: Conversation) -> AsyncGenerator[tuple[str, int], None]:
        """Yield (text, tokens) as they come."""


class EnginePartner:
    """A model in this process."""

    def __init__(self, name: str, client: EngineClient, renderer: Renderer) -> None:
        self.name = name
        self._client = client
        self._renderer = renderer

    async def answer(self, conversation: Conversation) -> AsyncGenerator[tuple[str, int], None]:
        """Yield each delta's text; the oldest turns are dropped when the context is full."""
        room = self._client.model().max_model_tokens
        rendered = await self._render(conversation)
        while len(rendered.token_ids) >= room and len(conversation.turns) > 2:
            del conversation.turns[:2]
            rendered = await self._render(conversation)
        sampling = SamplingParams(
            max_tokens=max(1, min(conversation.max_tokens, room - len(rendered.token_ids))),
            temperature=conversation.temperature,
        )
        request = GenerateRequest(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=rendered.token_ids,
            pictures=rendered.pictures,
            sampling=sampling,
        )
        async with contextlib.aclosing(self._client.generate(request)) as deltas:
            async for delta in deltas:
                yield delta.text, len(delta.token_ids)

    async def _render(self, conversation: Conversation) -> Rendered:
        body = TokenizeChatRequest.model_validate({"messages": conversation.messages()})
        return await self._renderer.render(body, most_image_tokens=self._client.model().max_model_tokens)


class ServerPartner:
    """A model behind an OpenAI-compatible server."""

    def __init__(self, name: str, url: str, api_key: str | None) -> None:
        self.name = name
        self._url = url
        self._api_key = api_key

    async def answer(self, conversation: Conversation) -> AsyncGenerator[tuple[str, int], None]:
        """Yield each event's text, counted as one token; at the end, what that missed of the server's own count."""
        body = {
            "model": self.name,
            "messages": conversation.messages(),
            "temperature": conversation.temperature,
            "max_tokens": conversation.max_tokens,
            "stream_options": {"include_usage": True},
        }
        num_counted = 0
        # A connection for each answer: one kept while a person thinks may be closed by the time it is used.
        async with (
            OpenAIClient(self._url, api_key=self._api_key) as client,
            contextlib.aclosing(client.stream("/chat/completions", body)) as events,
        ):
            async for event in events:
                for choice in event.get("choices", ()):
                    text = choice.get("delta", {}).get("content")
                    if text:
                        num_counted += 1
                        yield text, 1
                if event.get("usage"):
                    yield "", event["usage"]["completion_tokens"] - num_counted


def run_chat(
    target: str | None,
    *,
    model: str | None,
    prompt: str | None,
    system: str | None,
    temperature: float,
    max_tokens: int,
    images: Sequence[Path],
) -> None:
    """Hold the conversation until it ends.

    ``target`` is a model or a URL, None the settings' model; ``model`` a name to ask a URL for.

    ``images`` are shown with the first question. Raises ``InvalidImage`` for a file that cannot be.
    """
    conversation = Conversation(system, temperature, max_tokens, images=[_url_of(file) for file in images])
    target = target or os.environ.get("OPENAI_BASE_URL")
    # The loop runs only while there is something to wait for: a person types on the main thread, where Ctrl-C and
    # line editing work.
    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        try:
            partner = runner.run(_partner(target, model, stack))
            if prompt is not None:
                _ask(runner, partner, conversation, prompt)
            else:
                sys.stderr.write(f"talking to {partner.name}; {HELP}\n")
                _converse(runner, partner, conversation)
        finally:
            runner.run(stack.aclose())


async def _partner(target: str | None, model: str | None, stack: contextlib.AsyncExitStack) -> Partner:
    if target is not None and target.startswith(("http://", "https://")):
        api_key = os.environ.get("OPENAI_API_KEY")
        if model is None:
            async with OpenAIClient(target, api_key=api_key) as client:
                model = await client.first_model_name()
        return ServerPartner(model, target, api_key)
    settings = load_found(None, {"model.name": ("MODEL", target)})
    name = target or settings.model.name
    if model is not None:
        raise ConfigError(f"--model {model} names a server's model, and {name} is no URL; leave one of them out")
    if sys.stderr.isatty():
        sys.stderr.write(f"loading {name}\n")
    from penstock.launch.local import open_engine

    local = await stack.enter_async_context(open_engine(settings))
    if local.template is None:
        raise ConfigError(f"{name} has no chat template, so it cannot chat; use a model made for it")
    return EnginePartner(name, local.client, Renderer(local.tokenizer, local.template, local.images))


def _url_of(file: Path) -> str:
    """Return an image file as a data: URL. Raises ``InvalidImage`` naming the file if it cannot be shown."""
    try:
        data = file.expanduser().read_bytes()
        read_image(data, limits_of(ImageConfig()))
    except OSError as error:
        raise InvalidImage(f"{file} cannot be read ({error.strerror}); give the path of an image file") from error
    except InvalidImage as error:
        raise InvalidImage(f"{file}: {error.message}") from error
    media_type = mimetypes.guess_type(file.name)[0] or "image/png"
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def _converse(runner: asyncio.Runner, partner: Partner, conversation: Conversation) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() history and editing
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            sys.stderr.write("\n")
            return
        except KeyboardInterrupt:
            sys.stderr.write("\n(Ctrl-D or /quit leaves)\n")
            continue
        command, _, rest = line.partition(" ")
        match command:
            case "":
                continue
            case "/quit" | "/exit":
                return
            case "/help":
                sys.stderr.write(HELP + "\n")
            case "/reset":
                conversation.turns.clear()
                conversation.images.clear()
            case "/image":
                try:
                    conversation.images.append(_url_of(Path(rest)))
                except PenstockError as error:
                    sys.stderr.write(f"error: {error.message}\n")
            case "/system":
                conversation.system = rest or None
            case _ if command.startswith("/"):
                sys.stderr.write(f"there is no {command}; {HELP}\n")
            case _:
                try:
                    _ask(runner, partner, conversation, line)
                except PenstockError as error:
                    sys.stderr.write(f"error: {error.message}\n")
                except KeyboardInterrupt:
                    sys.stderr.write("(stopped; Ctrl-D or /quit leaves)\n")


def _ask(runner: asyncio.Runner, partner: Partner, conversation: Conversation, question: str) -> None:
    """Print the answer as it comes and what it took, and add both turns to the conversation.

    Raises KeyboardInterrupt after Ctrl-C, which stops the answer and keeps what there is of it; and what the
    partner raises, after which it is as if nothing had been asked.
    """
    conversation.ask(question)
    began_s = time.perf_counter()
    first_s: float | None = None
    num_tokens = 0
    pieces: list[str] = []

    async def listen() -> None:
        nonlocal first_s, num_tokens
        async with contextlib.aclosing(partner.answer(conversation)) as answer:
            async for text, count in answer:
                first_s = first_s or time.perf_counter()
                num_tokens += count
                pieces.append(text)
                sys.stdout.write(text)
                sys.stdout.flush()

    try:
        runner.run(listen())
    except PenstockError:
        conversation.refused()
        raise
    except KeyboardInterrupt:
        conversation.answered("".join(pieces))
        raise
    else:
        conversation.answered("".join(pieces))
    finally:
        if pieces:
            sys.stdout.write("\n")
            sys.stdout.flush()
        if first_s is not None:
            seconds = time.perf_counter() - first_s
            rate = f", {(num_tokens - 1) / seconds:.1f} tokens/s" if num_tokens > 1 else ""
            first_ms = (first_s - began_s) * 1e3
            sys.stderr.write(f"[{counted(num_tokens, 'token')}, first after {first_ms:.0f} ms{rate}]\n")
