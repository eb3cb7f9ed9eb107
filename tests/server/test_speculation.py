"""Speculation through OpenAI's client and a real server: the same answers as without, and beside others."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from penstock.kernels.native import NATIVE
from tests.servers import serve_checkpoint

pytestmark = pytest.mark.skipif(NATIVE is None, reason="the native kernels were not built")

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}, "required": ["a", "b"]}
CODE = "def f(x):\n    return x + 1\n\n\n" * 3
ASKED: list[dict[str, Any]] = [
    {"prompt": CODE, "temperature": 0},
    # Of these four tokens it says nothing but what came before.
    {"prompt": "abcd" * 8, "temperature": 0, "logit_bias": {str(token_id): 20 for token_id in range(64, 68)}},
    {"prompt": "abcd" * 8, "seed": 3, "logit_bias": {str(token_id): 20 for token_id in range(64, 68)}, "n": 3},
    {"prompt": "abcd" * 8, "temperature": 0, "logit_bias": {"64": 30, "65": 30}, "logprobs": 2},
    {"prompt": CODE, "seed": 5, "temperature": 1.2, "stop": ["a", "e", "("]},
    {"prompt": "x", "seed": 6, "presence_penalty": 1.0, "extra_body": {"ignore_eos": True}},
    {
        "prompt": CODE,
        "temperature": 0,
        "extra_body": {"structured_outputs": {"json": SCHEMA}},
    },
]


@pytest.fixture(scope="module")
def clients(checkpoint: Callable[[str], Path]) -> Iterator[dict[str, openai.OpenAI]]:
    """A client of a server that guesses and one of a server that does not."""
    path = checkpoint("llama")
    with serve_checkpoint(path, speculate="suffix") as guessing, serve_checkpoint(path) as plain:
        yield {
            name: openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
            for name, server in (("guessing", guessing), ("plain", plain))
        }


def whole(client: openai.OpenAI, asked: dict[str, Any]) -> Any:
    answer = client.completions.create(model=client.models.list().data[0].id, max_tokens=40, **asked)
    assert answer.usage is not None
    return [
        (choice.index, choice.text, choice.finish_reason, choice.logprobs and choice.logprobs.token_logprobs)
        for choice in answer.choices
    ], answer.usage.completion_tokens


def streamed(client: openai.OpenAI, asked: dict[str, Any]) -> Any:
    choices: dict[int, tuple[str, str | None, list[float] | None]] = {}
    num_tokens = None
    stream = client.completions.create(
        model=client.models.list().data[0].id,
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
        **asked,
    )
    for chunk in stream:
        if chunk.usage is not None:
            num_tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            text, _, logprobs = choices.get(choice.index, ("", None, None))
            if choice.logprobs is not None:
                logprobs = [*(logprobs or []), *(choice.logprobs.token_logprobs or [])]
            choices[choice.index] = (text + choice.text, choice.finish_reason, logprobs)
    return [(index, *choice) for index, choice in sorted(choices.items())], num_tokens


@pytest.mark.parametrize("call", [whole, streamed])
def test_answers_are_the_same_with_guesses_and_beside_others(
    call: Callable[[openai.OpenAI, dict[str, Any]], Any], clients: dict[str, openai.OpenAI]
) -> None:
    expected = [whole(clients["plain"], asked) for asked in ASKED]
    with ThreadPoolExecutor(len(ASKED)) as pool:
        for _ in range(3):
            assert list(pool.map(lambda asked: call(clients["guessing"], asked), ASKED)) == expected


def test_what_was_guessed_is_measured(clients: dict[str, openai.OpenAI]) -> None:
    for _ in range(4):
        whole(clients["guessing"], ASKED[1] | {"extra_body": {"ignore_eos": True}})

    def values(name: str) -> dict[str, float]:
        text = httpx.get(str(clients[name].base_url).replace("/v1/", "/metrics")).text
        return {
            line.split(" ")[0]: float(line.split(" ")[1])
            for line in text.splitlines()
            if "spec" in line and not line.startswith("#")
        }

    found, plain = values("guessing"), values("plain")
    drafted = found["vllm:spec_decode_num_draft_tokens_total"]
    accepted = found["vllm:spec_decode_num_accepted_tokens_total"]
    assert drafted >= accepted > 0
    assert found["vllm:spec_decode_num_drafts_total"] > 0
    assert found["penstock_speculation_acceptance_rate"] == pytest.approx(accepted / drafted)
    assert found["penstock_speculation_speedup"] > 0
    assert plain["vllm:spec_decode_num_draft_tokens_total"] == 0
    assert plain["penstock_speculation_speedup"] == 1
