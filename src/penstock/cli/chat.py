"""`penstock chat`: a conversation in the terminal, with a model in this process or with a server."""

import asyncio
import contextlib
import os
import sys
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Protocol

from penstock.errors import ConfigError, PenstockError
from penstock.http.client import OpenAIClient
from penstock.protocol import EngineClient, GenerateRequest, SamplingParams
from penstock.text import ChatTemplate, Tokenizer

HELP = "/help this list   /reset forget the conversation   /system TEXT set the system message   /quit leave"


@dataclass(slots=True)
class Conversation:
    """What was said so far."""

    system: str | None
    temperature: float
    max_tokens: int
    turns: list[dict[str, str]] = field(default_factory=list)

    def messages(self) -> list[dict[str, str]]:
        """Return the turns, system message first."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + self.turns


class Partner(Protocol):
    """Who answers."""

    name: str

    def answer(self, conversation: Conversation) -> AsyncGenerator[tuple[str, int], None]:
        """Yield (text, tokens) as they come."""


class EnginePartner:
    """A model in this process."""

    def __init__(self, name: str, client: EngineClient, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self.name = name
        self._client = client
        self._tokenizer = tokenizer
        self._template = template

    async def answer(self, conversation: Conversation) -> AsyncGenerator[tuple[str, int], None]:
        """Yield each delta's text; the oldest turns are dropped when the context is full."""
        room = self._client.model().max_model_tokens
        ids = self._render(conversation)
        while len(ids) >= room and len(conversation.turns) > 2:
            del conversation.turns[:2]
            ids = self._render(conversation)
        sampling = SamplingParams(
            max_tokens=max(1, min(conversation.max_tokens, room - len(ids))), temperature=conversation.temperature
        )
        request = GenerateRequest(request_id=uuid.uuid4().hex, prompt_token_ids=ids, sampling=sampling)
        async with contextlib.aclosing(self._client.generate(request)) as deltas:
            async for delta in deltas:
                yield delta.text, len(delta.token_ids)

    def _render(self, conversation: Conversation) -> list[int]:
        text = self._template.render(conversation.messages(), add_generation_prompt=True)
        return self._tokenizer.encode(text, add_special_tokens=False)


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
) -> None:
    """Hold the conversation until it ends. ``target`` is a model or a URL, ``model`` a name to ask a URL for."""
    conversation = Conversation(system, temperature, max_tokens)
    target = target or os.environ.get("OPENAI_BASE_URL") or "penstock-mini"
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


async def _partner(target: str, model: str | None, stack: contextlib.AsyncExitStack) -> Partner:
    if target.startswith(("http://", "https://")):
        api_key = os.environ.get("OPENAI_API_KEY")
        if model is None:
            async with OpenAIClient(target, api_key=api_key) as client:
                model = await client.first_model_name()
        return ServerPartner(model, target, api_key)
    if model is not None:
        raise ConfigError(f"--model {model} names a server's model, and {target} is no URL; leave one of them out")
    if sys.stderr.isatty():
        sys.stderr.write(f"loading {target}\n")
    from penstock.launch.local import open_engine
    from penstock.launch.settings import ModelSettings, Settings

    local = await stack.enter_async_context(open_engine(Settings(model=ModelSettings(name=target))))
    if local.template is None:
        raise ConfigError(f"{target} has no chat template, so it cannot chat; use a model made for it")
    return EnginePartner(target, local.client, local.tokenizer, local.template)


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
    conversation.turns.append({"role": "user", "content": question})
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
        conversation.turns.pop()
        raise
    except KeyboardInterrupt:
        conversation.turns.append({"role": "assistant", "content": "".join(pieces)})
        raise
    else:
        conversation.turns.append({"role": "assistant", "content": "".join(pieces)})
    finally:
        if pieces:
            sys.stdout.write("\n")
            sys.stdout.flush()
        if first_s is not None:
            seconds = time.perf_counter() - first_s
            rate = f"{(num_tokens - 1) / seconds:.1f} tokens/s" if num_tokens > 1 else "1 token"
            sys.stderr.write(f"[{num_tokens} tokens, first after {(first_s - began_s) * 1e3:.0f} ms, {rate}]\n")
