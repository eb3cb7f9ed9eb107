"""An engine that says what a test tells it to, and clients of a server over it, without sockets."""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import anthropic
import httpx
import httpx2
import openai
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from penstock.errors import NotReady
from penstock.images.reader import ImageReader
from penstock.protocol import (
    EngineState,
    EngineStatus,
    FinishReason,
    GenerateRequest,
    MemoryPlan,
    ModelInfo,
    TokenDelta,
    Usage,
)
from penstock.server import ServerConfig
from penstock.server.app import create_app
from penstock.text import Tokenizer
from penstock.text.chat_template import ChatTemplate
from tests.fakes.tokenizer_files import CHAT_TEMPLATE, byte_level_tokenizer
from tests.fakes.vision import seeing_tokenizer

TOKENIZER = Tokenizer.of(byte_level_tokenizer())
HERMES = (
    "{% if tools %}<|im_start|>system\n<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools>"
    "<tool_call>{name, arguments}</tool_call><|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = HERMES.replace("<tool_call>", "").replace("</tool_call>", "") + "{# <|python_tag|> #}"
MISTRAL = HERMES.replace("<tool_call>", "[TOOL_CALLS]").replace("</tool_call>", "")
THINKING = HERMES + "{% if add_generation_prompt and enable_thinking %}<think>\n{% endif %}{# </think> #}"
TEMPLATES = {
    "hermes": HERMES,
    "llama3_json": LLAMA3,
    "mistral": MISTRAL,
    "mistral_args": MISTRAL + "{# [ARGS] #}",
    "qwen3_coder": HERMES + "{# <function= #}",
    "thinking": THINKING,
}

Script = Callable[[GenerateRequest], AsyncGenerator[TokenDelta, None]]

MODEL = ModelInfo(
    name="fake",
    source="nowhere",
    architecture="none",
    dtype="float32",
    kv_dtype="float32",
    num_parameters=0,
    vocab_size=TOKENIZER.vocab_size,
    max_model_tokens=1000,
    eos_token_ids=(),
    hidden_size=4,
    memory=MemoryPlan(
        weights_bytes=0, activation_peak_bytes=0, block_bytes=1, num_blocks=1, block_size=1, available_bytes=1
    ),
)


def delta(request: GenerateRequest, text: str, finish_reason: FinishReason | None = None, **more: object) -> TokenDelta:
    """Return a delta of one token with ``text``; the last one carries usage."""
    usage = Usage(num_prompt_tokens=len(request.prompt_token_ids), num_cached_tokens=0, num_output_tokens=1)
    return TokenDelta(
        request_id=request.request_id,
        text=text,
        token_ids=(0,),
        finish_reason=finish_reason,
        usage=usage if finish_reason else None,
        **more,  # type: ignore[arg-type]
    )


class FakeEngine:
    """An ``EngineClient`` that runs ``script`` for each request and remembers them."""

    def __init__(self, script: Script, state: EngineState = EngineState.READY) -> None:
        self.script = script
        self.state = state
        self.requests: list[GenerateRequest] = []
        self.num_open = 0
        self.loaded: dict[str, str] = {}

    async def start(self) -> None:
        """Nothing to load."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        """Yield what the script does."""
        self.requests.append(request)
        self.num_open += 1
        try:
            async with contextlib.aclosing(self.script(request)) as deltas:
                async for one in deltas:
                    yield one
        finally:
            self.num_open -= 1

    def status(self) -> EngineStatus:
        """Return the state."""
        return EngineStatus(state=self.state)

    def model(self) -> ModelInfo:
        """Return a model, unless there is none yet."""
        if self.state is EngineState.LOADING:
            raise NotReady("the model is still loading; retry in a moment", retry_after_s=2.5)
        return MODEL

    async def load_adapter(self, name: str, path: str) -> None:
        """Take any."""
        self.loaded[name] = path

    async def unload_adapter(self, name: str) -> None:
        """Forget it."""
        del self.loaded[name]

    def adapters(self) -> tuple[str, ...]:
        """Return their names."""
        return tuple(self.loaded)

    async def drain(self, timeout_s: float) -> bool:
        """Nothing to wait for."""
        return True

    async def stop(self) -> None:
        """Nothing to stop."""


def saying(*pieces: str, reason: FinishReason = "stop") -> FakeEngine:
    async def script(request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        for piece in pieces:
            yield delta(request, piece)
        yield delta(request, "", reason)

    return FakeEngine(script)


def app_over(
    engine: FakeEngine, config: ServerConfig | None, template: str, images: ImageReader | None = None
) -> FastAPI:
    """Return a server over ``engine``; with ``images``, the fake family's tokenizer."""
    return create_app(
        client=engine,
        tokenizer=TOKENIZER if images is None else seeing_tokenizer(),
        images=images,
        template=ChatTemplate({"default": template}),
        config=config or ServerConfig(),
        registry=CollectorRegistry(),
    )


@contextlib.asynccontextmanager
async def http_over(
    engine: FakeEngine,
    config: ServerConfig | None = None,
    *,
    template: str = CHAT_TEMPLATE,
    images: ImageReader | None = None,
) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of a server over ``engine``."""
    transport = httpx.ASGITransport(app_over(engine, config, template, images))
    async with httpx.AsyncClient(transport=transport, base_url="http://fake") as client:
        yield client


@contextlib.asynccontextmanager
async def anthropic_over(
    engine: FakeEngine,
    config: ServerConfig | None = None,
    *,
    template: str = CHAT_TEMPLATE,
    images: ImageReader | None = None,
) -> AsyncIterator[anthropic.AsyncAnthropic]:
    """Yield Anthropic's client of a server over ``engine``."""
    transport = httpx2.ASGITransport(app_over(engine, config, template, images))
    async with httpx2.AsyncClient(transport=transport) as client:
        yield anthropic.AsyncAnthropic(base_url="http://fake", api_key="none", max_retries=0, http_client=client)


@contextlib.asynccontextmanager
async def openai_over(
    engine: FakeEngine,
    config: ServerConfig | None = None,
    *,
    template: str = CHAT_TEMPLATE,
    images: ImageReader | None = None,
) -> AsyncIterator[openai.AsyncOpenAI]:
    """Yield OpenAI's client of a server over ``engine``."""
    async with http_over(engine, config, template=template, images=images) as client:
        # Some versions of the SDK declare a fork of httpx; either is taken.
        transport: Any = client
        yield openai.AsyncOpenAI(base_url="http://fake/v1", api_key="none", max_retries=0, http_client=transport)
