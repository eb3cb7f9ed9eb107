"""Every feature in one batch, streaming and not: each request gets what it gets alone."""

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from pydantic_core import from_json

from penstock.http.sse import EventReader
from penstock.server import ServerConfig
from tests.adapters import write_adapter
from tests.server.fakes import HERMES
from tests.servers import RunningServer, serve_checkpoint
from tests.tiny_models import make_checkpoint

HELLO: Any = [{"role": "user", "content": "hello"}]
LONG = "def f(x):\n    return x\n" * 40
SCHEMA: Any = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "size": {"enum": [1, 2, 3]}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
TOOL: Any = {"type": "function", "function": {"name": "order", "parameters": SCHEMA}}
CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"

REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": (COMPLETIONS, {"prompt": "abc", "seed": 1}),
    "greedy": (COMPLETIONS, {"prompt": "abc", "temperature": 0}),
    "long prompt": (COMPLETIONS, {"prompt": LONG, "seed": 2}),
    "longer prompt, same beginning": (COMPLETIONS, {"prompt": LONG + LONG[:300], "seed": 3}),
    "several prompts": (COMPLETIONS, {"prompt": ["abc", "def", LONG[:200]], "seed": 4}),
    "echo and logprobs": (COMPLETIONS, {"prompt": "def é():", "echo": True, "logprobs": 2, "seed": 5}),
    "echo alone": (COMPLETIONS, {"prompt": LONG[:100], "echo": True, "logprobs": 1, "max_tokens": 0}),
    "prompt logprobs": (COMPLETIONS, {"prompt": LONG[:90], "prompt_logprobs": 2, "seed": 6}),
    "penalties": (
        COMPLETIONS,
        {"prompt": "aaaa", "presence_penalty": 1, "frequency_penalty": 0.5, "repetition_penalty": 1.2, "seed": 7},
    ),
    "bias": (COMPLETIONS, {"prompt": "abc", "logit_bias": {"40": 5, "41": -100}, "seed": 8}),
    "bad words": (COMPLETIONS, {"prompt": "abc", "bad_words": ["a", "bc"], "top_k": 40, "seed": 9}),
    "allowed": (COMPLETIONS, {"prompt": "abc", "allowed_token_ids": [64, 65, 66], "seed": 10}),
    "typical": (COMPLETIONS, {"prompt": "abc", "typical_p": 0.6, "min_p": 0.01, "top_p": 0.9, "seed": 11}),
    "stop": (COMPLETIONS, {"prompt": "abc", "stop": ["e", "zz"], "include_stop_str_in_output": True, "seed": 12}),
    "ends where it may": (COMPLETIONS, {"prompt": "abc", "min_tokens": 9, "ignore_eos": True, "seed": 13}),
    "cut prompt": (COMPLETIONS, {"prompt": LONG, "truncate_prompt_tokens": 50, "cache_salt": "s", "seed": 14}),
    "pattern": (COMPLETIONS, {"prompt": "x", "structured_outputs": {"regex": "[a-f]{3}(é|👍)+"}, "seed": 15}),
    "choice": (COMPLETIONS, {"prompt": "x", "structured_outputs": {"choice": ["yes", "no"]}, "n": 3, "seed": 16}),
    "adapter": (COMPLETIONS, {"model": "lora", "prompt": "abc", "seed": 17}),
    "adapter on a schema": (CHAT, {"model": "lora", "response_format": {"type": "json_object"}, "seed": 18}),
    "chat": (CHAT, {"n": 4, "logprobs": True, "top_logprobs": 3, "seed": 19}),
    "schema": (
        CHAT,
        {
            "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
            "n": 2,
            "seed": 20,
        },
    ),
    "urgent": (CHAT, {"penstock": {"priority": "P0", "deadline_s": 300}, "seed": 21}),
    "of another tenant": (CHAT, {"penstock": {"priority": "P2", "deadline_s": 300, "tenant": "b"}, "seed": 22}),
    "forced call": (CHAT, {"tools": [TOOL], "tool_choice": "required", "seed": 23}),
    "one call": (CHAT, {"tools": [TOOL], "tool_choice": TOOL | {"function": {"name": "order"}}, "n": 2, "seed": 24}),
    "offered call": (CHAT, {"tools": [TOOL], "seed": 25}),
    "response": (RESPONSES, {"input": "hello", "tools": [{"type": "function", **TOOL["function"]}], "seed": 26}),
    "response on a schema": (
        RESPONSES,
        {"input": "x", "text": {"format": {"type": "json_schema", "name": "s", "schema": SCHEMA}}, "seed": 27},
    ),
    "message": (MESSAGES, {"messages": HELLO, "stop_sequences": ["q"], "top_k": 30, "seed": 28}),
    "message that calls": (
        MESSAGES,
        {
            "messages": HELLO,
            "tools": [{"name": "order", "input_schema": SCHEMA}],
            "tool_choice": {"type": "any"},
            "seed": 29,
        },
    ),
}
ALL = [(name, is_streamed) for name in REQUESTS for is_streamed in (False, True)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    path = make_checkpoint(tmp_path_factory.mktemp("mixed"), max_position_embeddings=2048)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": HERMES}))
    adapter = write_adapter(tmp_path_factory.mktemp("adapter"), path)
    with serve_checkpoint(path, ServerConfig(served_names=("tiny",)), num_blocks=2048) as server:
        loaded = httpx.post(f"{server.url}/v1/load_lora_adapter", json={"lora_name": "lora", "lora_path": str(adapter)})
        assert loaded.status_code == 200, loaded.text
        yield server


def body_of(name: str, is_streamed: bool) -> tuple[str, dict[str, Any]]:
    path, body = REQUESTS[name]
    most = {RESPONSES: "max_output_tokens"}.get(path, "max_tokens")
    more = {"messages": HELLO} if path == CHAT else {}
    return path, {"model": "tiny", most: 100, "temperature": 1, **more, **body, "stream": is_streamed}


async def ask(client: httpx.AsyncClient, name: str, is_streamed: bool) -> Any:
    """Return what came back, without ids, times, and what the cache had."""
    path, body = body_of(name, is_streamed)
    response = await client.post(path, json=body, timeout=300)
    assert response.status_code == 200, response.text
    if not is_streamed:
        return ESSENCE[path]([response.json()])
    events = EventReader(1 << 20).feed(response.content)
    return ESSENCE[path]([json.loads(one.data) for one in events if one.data != b"[DONE]"])


def of_choices(pieces: list[dict[str, Any]]) -> Any:
    """Return the choices of OpenAI's older routes; a whole answer is one piece."""
    choices: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        for part in piece["choices"]:
            said = part.get("message") or part.get("delta") or {}
            choice = choices.setdefault(part["index"], {"text": "", "calls": {}, "logprobs": []})
            choice["text"] += part.get("text") or said.get("content") or ""
            for place, call in enumerate(said.get("tool_calls") or ()):
                function = choice["calls"].setdefault(call.get("index", place), {"name": "", "arguments": ""})
                for key in function:
                    function[key] += call["function"].get(key) or ""
            scores = part.get("logprobs") or {}
            choice["logprobs"] += scores.get("token_logprobs") or []
            choice["logprobs"] += [one["logprob"] for one in scores.get("content") or ()]
            choice["finish_reason"] = part["finish_reason"]
            if "prompt_logprobs" in part:
                choice["prompt_logprobs"] = [
                    None if one is None else {key: value["logprob"] for key, value in one.items()}
                    for one in part["prompt_logprobs"]
                ]
    return choices


def of_response(pieces: list[dict[str, Any]]) -> Any:
    """Return the items of a response."""
    last = pieces[-1].get("response", pieces[-1])
    hidden = ("id", "call_id")
    return [last["status"], *({k: v for k, v in item.items() if k not in hidden} for item in last["output"])]


def of_message(pieces: list[dict[str, Any]]) -> Any:
    """Return the blocks of a message."""
    if pieces[0]["type"] == "message":
        (whole,) = pieces
        blocks = [{k: v for k, v in block.items() if k != "id"} for block in whole["content"]]
        return [*blocks, whole["stop_reason"], whole["stop_sequence"]]
    blocks, stop = [], {}
    for piece in pieces:
        match piece["type"]:
            case "content_block_start":
                blocks.append({k: v for k, v in piece["content_block"].items() if k != "id"})
                text = ""
            case "content_block_delta":
                text += piece["delta"].get("text") or piece["delta"].get("partial_json") or ""
            case "content_block_stop":
                is_call = blocks[-1]["type"] == "tool_use"
                blocks[-1] |= {"input": from_json(text or "{}", allow_partial=True)} if is_call else {"text": text}
            case "message_delta":
                stop = piece["delta"]
    return [*blocks, stop["stop_reason"], stop["stop_sequence"]]


ESSENCE: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    CHAT: of_choices,
    COMPLETIONS: of_choices,
    RESPONSES: of_response,
    MESSAGES: of_message,
}


def rounded(value: Any) -> Any:
    """Return a value with its numbers as a sum in another order would leave them."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return pytest.approx(value, abs=1e-3) if isinstance(value, float) else value


async def watch(served: RunningServer, running: list[int]) -> None:
    """Note how many run, until cancelled."""
    while True:
        running.append(served.client.status().num_running)
        await asyncio.sleep(0.002)


async def test_each_gets_what_it_gets_alone(served: RunningServer) -> None:
    limits = httpx.Limits(max_connections=2 * len(ALL))
    async with httpx.AsyncClient(base_url=served.url, limits=limits) as client:
        alone = {name: await ask(client, name, False) for name in REQUESTS}
        running: list[int] = []
        watching = asyncio.create_task(watch(served, running))
        together = await asyncio.gather(*(ask(client, *one) for one in ALL))
        watching.cancel()
    assert max(running) > len(ALL) / 2, "they have to run together for this to show anything"
    for (name, is_streamed), answer in zip(ALL, together, strict=True):
        assert answer == rounded(alone[name]), (name, is_streamed)
    calls = [choice["calls"] for choice in alone["forced call"].values()]
    assert all(one for one in calls), "the features have to be there to be compared"
    assert alone["adapter"] != alone["plain"]
