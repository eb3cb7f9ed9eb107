"""`penstock chat`: a conversation in the terminal, with a model in this process or with a server."""

import asyncio
import contextlib
import os
import signal
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

    def __init__(self, name: str, client: OpenAIClient) -> None:
        self.name = name
        self._client = client

    async def answer(self, conversation: Conversation) -> AsyncGenerator[tuple[str, int], None]:
        """Yield each event's text; one event counts as a token until the server says how many there were."""
        body = {
            "model": self.name,
            "messages": conversation.messages(),
            "temperature": conversation.temperature,
            "max_tokens": conversation.max_tokens,
        }
        async with contextlib.aclosing(self._client.stream("/chat/completions", body)) as events:
            async for event in events:
                for choice in event.get("choices", ()):
                    text = choice.get("delta", {}).get("content")
                    if text:
                        yield text, 1


def run_chat(target: str | None, *, prompt: str | None, system: str | None, temperature: float, max_tokens: int) -> int:
    """Hold the conversation; returns the exit status."""
    conversation = Conversation(system, temperature, max_tokens)
    return asyncio.run(_chat(target or os.environ.get("OPENAI_BASE_URL"), conversation, prompt))


async def _chat(target: str | None, conversation: Conversation, prompt: str | None) -> int:
    async with contextlib.AsyncExitStack() as stack:
        partner = await _partner(target or "penstock-mini", stack)
        if prompt is not None:
            conversation.turns.append({"role": "user", "content": prompt})
            await _say(partner, conversation)
            return 0
        sys.stderr.write(f"talking to {partner.name}; {HELP}\n")
        await _converse(partner, conversation)
    return 0


async def _partner(target: str, stack: contextlib.AsyncExitStack) -> Partner:
    if target.startswith(("http://", "https://")):
        client = OpenAIClient(target, api_key=os.environ.get("OPENAI_API_KEY"))
        await stack.enter_async_context(client)
        names = await client.model_names()
        if not names:
            raise ConfigError(f"{target} lists no models")
        return ServerPartner(names[0], client)
    from penstock.launch.local import open_engine

    local = await stack.enter_async_context(open_engine(target))
    if local.template is None:
        raise ConfigError(f"{target} has no chat template, so it cannot chat; use a model made for it")
    return EnginePartner(target, local.client, local.tokenizer, local.template)


async def _converse(partner: Partner, conversation: Conversation) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() history and editing
    while True:
        try:
            line = (await asyncio.to_thread(input, "> ")).strip()
        except (EOFError, KeyboardInterrupt):
            sys.stderr.write("\n")
            return
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
            case _:
                conversation.turns.append({"role": "user", "content": line})
                try:
                    await _say(partner, conversation)
                except PenstockError as error:
                    conversation.turns.pop()
                    sys.stderr.write(f"error: {error.message}\n")


async def _say(partner: Partner, conversation: Conversation) -> None:
    """Print an answer as it comes and what it took. Ctrl-C stops the answer and keeps what was said."""
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

    listening = asyncio.create_task(listen())
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, listening.cancel)
    try:
        await listening
    except asyncio.CancelledError:
        sys.stdout.write(" [stopped]")
    finally:
        loop.remove_signal_handler(signal.SIGINT)
    sys.stdout.write("\n")
    sys.stdout.flush()
    conversation.turns.append({"role": "assistant", "content": "".join(pieces)})
    if first_s is not None:
        seconds = time.perf_counter() - first_s
        rate = f"{(num_tokens - 1) / seconds:.1f} tokens/s" if num_tokens > 1 else "1 token"
        sys.stderr.write(f"[{num_tokens} tokens, first after {(first_s - began_s) * 1e3:.0f} ms, {rate}]\n")
