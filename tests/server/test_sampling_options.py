"""The smaller options of sampling and of looking at prompts, through OpenAI's own client."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from openai.types import Completion

from tests.servers import RunningServer
from tests.tiny_models import EOS_ID, VOCAB_SIZE, reference_logits


def complete(client: openai.OpenAI, extra: dict[str, Any], **request: Any) -> Completion:
    answer: Completion = client.completions.create(
        **{"model": "tiny", "prompt": "def f(x):", "max_tokens": 20, **request}, extra_body=extra
    )
    return answer


def tokens_of(server: RunningServer, text: str) -> list[int]:
    tokens: list[int] = httpx.post(f"{server.url}/tokenize", json={"prompt": text}).json()["tokens"]
    return tokens


# ---- what may come


def test_only_allowed_tokens_come(client: openai.OpenAI, server: RunningServer) -> None:
    allowed = tokens_of(server, "abc")
    for temperature in (0, 1):
        answer = complete(client, {"allowed_token_ids": allowed}, temperature=temperature, n=2, seed=1)
        for choice in answer.choices:
            assert set(choice.text) <= set("abc")
            assert choice.finish_reason == "length"
    ended = complete(client, {"allowed_token_ids": [EOS_ID]}).choices[0]
    assert (ended.text, ended.finish_reason) == ("", "stop")
    chat = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "x"}],
        max_tokens=5,
        extra_body={"allowed_token_ids": allowed[:1]},
    )
    assert chat.choices[0].message.content == "aaaaa"


def test_bad_words_do_not_come(client: openai.OpenAI, server: RunningServer) -> None:
    only = {"allowed_token_ids": tokens_of(server, "ab")}
    for seed in range(5):
        text = complete(client, {**only, "bad_words": ["aa", "bbb"]}, seed=seed, temperature=1).choices[0].text
        assert len(text) == 20
        assert "aa" not in text
        assert "bbb" not in text
    assert complete(client, {**only, "bad_words": ["a"]}, temperature=1).choices[0].text == "b" * 20
    # Where nothing would be left the list of what is allowed wins.
    assert set(complete(client, {**only, "bad_words": ["a", "b"]}).choices[0].text) <= set("ab")


def test_a_grammar_wins_over_lists(client: openai.OpenAI, server: RunningServer) -> None:
    wanted = {"structured_outputs": {"choice": ["xyz"]}}
    for extra in ({"allowed_token_ids": tokens_of(server, "a")}, {"bad_words": ["x", "yz"]}):
        assert complete(client, {**wanted, **extra}).choices[0].text == "xyz"
    both = {"structured_outputs": {"regex": "[a-f]{9}"}, "allowed_token_ids": tokens_of(server, "efgh")}
    assert set(complete(client, both, temperature=1).choices[0].text) <= set("ef")


def test_three_hundred_biases(client: openai.OpenAI, server: RunningServer) -> None:
    (wanted,) = tokens_of(server, "q")
    bias = {str(token_id): -100 for token_id in range(VOCAB_SIZE) if token_id != wanted}
    first = dict(list(bias.items())[:300])
    assert len(first) == 300
    allowed = [token_id for token_id in range(300) if token_id <= wanted or str(token_id) in first]
    answer = complete(client, {"allowed_token_ids": allowed}, logit_bias=first)
    assert answer.choices[0].text == "q" * 20
    with pytest.raises(openai.BadRequestError, match="at most 300"):
        complete(client, {}, logit_bias={str(token_id): 1 for token_id in range(301)})


def test_a_tiny_typical_share_leaves_one_token(client: openai.OpenAI) -> None:
    texts = {complete(client, {"typical_p": 1e-6}, temperature=1, seed=seed).choices[0].text for seed in range(4)}
    assert len(texts) == 1
    free = {complete(client, {"typical_p": 1}, temperature=1, seed=seed).choices[0].text for seed in range(4)}
    assert len(free) == 4


# ---- the prompt


def test_prompts_are_cut_at_the_front(client: openai.OpenAI, server: RunningServer) -> None:
    long, end = "x" * 700 + "def f(x):", "def f(x):"
    cut = complete(client, {"truncate_prompt_tokens": 9}, prompt=long, temperature=0)
    assert cut.choices[0].text == complete(client, {}, prompt=end, temperature=0).choices[0].text
    assert cut.usage is not None
    assert cut.usage.prompt_tokens == 9
    short = complete(client, {"truncate_prompt_tokens": 500}, prompt=end)
    assert short.usage is not None
    assert short.usage.prompt_tokens == 9
    fitted = complete(client, {"truncate_prompt_tokens": -1}, prompt=long, max_tokens=12)
    assert fitted.usage is not None
    assert fitted.usage.prompt_tokens == 512 - 12
    chat = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": long}],
        max_tokens=5,
        extra_body={"truncate_prompt_tokens": 30},
    )
    assert chat.usage is not None
    assert chat.usage.prompt_tokens == 30


@pytest.mark.parametrize("num_tokens", [0, 1, 6])
@pytest.mark.parametrize("as_tokens", [False, True])
def test_echo(client: openai.OpenAI, server: RunningServer, num_tokens: int, as_tokens: bool) -> None:
    text = "def é():"
    prompt: Any = tokens_of(server, text) if as_tokens else text
    request: dict[str, Any] = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "n": 2, "logprobs": 2}
    plain = complete(client, {}, **{**request, "max_tokens": max(1, num_tokens)})
    own = plain.choices[0].text if num_tokens else ""
    answer = complete(client, {}, **request, echo=True)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2 * num_tokens
    streamed = ["", ""]
    tokens: list[list[str]] = [[], []]
    for chunk in client.completions.create(model="tiny", **request, echo=True, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
            tokens[choice.index] += (choice.logprobs.tokens or []) if choice.logprobs else []
    for i, choice in enumerate(answer.choices):
        assert choice.text == streamed[i] == text + own
        assert choice.finish_reason == "length"
        logprobs = choice.logprobs
        assert logprobs is not None
        assert logprobs.tokens == tokens[i]
        assert logprobs.token_logprobs is not None
        assert logprobs.top_logprobs is not None
        assert len(logprobs.tokens or []) == len(text.encode()) + num_tokens
        assert logprobs.token_logprobs[0] is None
        assert logprobs.top_logprobs[0] is None
        assert all(value is not None for value in logprobs.token_logprobs[1:])


def expected_logprobs(path: Path, tokens: list[int]) -> list[float]:
    values = torch.log_softmax(reference_logits(path, tokens), dim=-1)
    return [float(values[i, token]) for i, token in enumerate(tokens[1:])]


def test_prompt_logprobs_are_the_models(
    client: openai.OpenAI, server: RunningServer, checkpoint: Callable[[str], Path]
) -> None:
    texts = ["def f(x):", "import os, sys\n" * 9]
    # The second time the prefix cache has it all, and must not be used.
    for _ in range(2):
        answer = complete(client, {"prompt_logprobs": 3}, prompt=texts, n=2, max_tokens=2)
        for choice in answer.choices:
            tokens = tokens_of(server, texts[choice.index // 2])
            assert choice.model_extra is not None
            first, *rest = choice.model_extra["prompt_logprobs"]
            assert first is None
            values = [one[str(token)]["logprob"] for one, token in zip(rest, tokens[1:], strict=True)]
            assert values == pytest.approx(expected_logprobs(checkpoint("llama"), tokens), abs=1e-4)
            for one, token in zip(rest, tokens[1:], strict=True):
                ranks = sorted(entry["rank"] for entry in one.values())
                assert ranks[:3] == [1, 2, 3]
                assert len(one) == (3 if one[str(token)]["rank"] <= 3 else 4)
    one_token = complete(client, {"prompt_logprobs": 0}, prompt="x", max_tokens=1)
    assert one_token.choices[0].model_extra is not None
    assert one_token.choices[0].model_extra["prompt_logprobs"] == [None]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt_logprobs": 6}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"typical_p": 0}, "typical_p"),
        ({"typical_p": 1.5}, "typical_p"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [VOCAB_SIZE]}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words.0"),
        ({"bad_words": ["a"] * 200}, "bad_words"),
    ],
)
def test_what_is_out_of_range_is_named(client: openai.OpenAI, body: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="abc", extra_body=body)
    assert caught.value.param == param
