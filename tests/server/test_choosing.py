"""best_of and beam search, through OpenAI's own client."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai.types import Completion

from penstock.text import Tokenizer
from tests.tiny_models import EOS_ID, reference

TEXT = "def f(x):"
MESSAGES: list[Any] = [{"role": "user", "content": "hello"}]


def complete(client: openai.OpenAI, extra: dict[str, Any] | None = None, **request: Any) -> Completion:
    answer: Completion = client.completions.create(
        **{"model": "tiny", "prompt": TEXT, "max_tokens": 12, **request}, extra_body=extra
    )
    return answer


def logprobs_of(choice: Any) -> list[float]:
    return [value for value in choice.logprobs.token_logprobs if value is not None]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# ---- best_of


def test_the_likeliest_of_those_drawn_come_back(client: openai.OpenAI) -> None:
    drawn = complete(client, n=4, seed=3, temperature=1, logprobs=0).choices
    order = sorted(drawn, key=lambda choice: -mean(logprobs_of(choice)))
    assert order != drawn
    best = complete(client, n=2, best_of=4, seed=3, temperature=1, logprobs=0)
    assert [choice.text for choice in best.choices] == [choice.text for choice in order[:2]]
    assert [choice.index for choice in best.choices] == [0, 1]
    assert logprobs_of(best.choices[0]) == logprobs_of(order[0])
    assert best.usage is not None
    assert best.usage.completion_tokens == sum(len(logprobs_of(choice)) for choice in drawn)
    plain = complete(client, best_of=4, seed=3, temperature=1)
    assert plain.choices[0].text == order[0].text
    assert plain.choices[0].logprobs is None
    as_drawn = complete(client, n=4, best_of=4, seed=3, temperature=1)
    assert [choice.text for choice in as_drawn.choices] == [choice.text for choice in drawn]


def test_of_several_prompts_each_has_its_best(client: openai.OpenAI) -> None:
    prompts = [TEXT, "import os"]
    together = complete(client, prompt=prompts, n=2, best_of=3, seed=1, temperature=1)
    assert [choice.index for choice in together.choices] == [0, 1, 2, 3]
    for i, prompt in enumerate(prompts):
        alone = complete(client, prompt=prompt, n=2, best_of=3, seed=1, temperature=1)
        assert [choice.text for choice in alone.choices] == [
            choice.text for choice in together.choices[2 * i : 2 * i + 2]
        ]


def test_an_echo_has_its_prompts_log_probabilities(client: openai.OpenAI) -> None:
    plain = complete(client, best_of=3, seed=1, temperature=1, logprobs=1)
    echoed = complete(client, best_of=3, seed=1, temperature=1, logprobs=1, echo=True)
    assert echoed.choices[0].text == TEXT + plain.choices[0].text
    assert len(logprobs_of(echoed.choices[0])) == len(TEXT) - 1 + len(logprobs_of(plain.choices[0]))


def test_chats_have_it_too(client: openai.OpenAI) -> None:
    def chat(extra: dict[str, Any], **request: Any) -> Any:
        return client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=8, seed=2, temperature=1, extra_body=extra, **request
        )

    drawn = chat({}, n=4, logprobs=True).choices
    order = sorted(drawn, key=lambda one: -mean([token.logprob for token in one.logprobs.content]))
    (best,) = chat({"best_of": 4}).choices
    assert best.message.content == order[0].message.content
    assert best.logprobs is None


# ---- beam search


@torch.no_grad()
def expected(path: Path, text: str, width: int, n: int, **options: Any) -> list[list[int]]:
    tokens = Tokenizer.load(path).encode(text, add_special_tokens=True)
    output = reference(path).generate(
        torch.tensor([tokens]),
        attention_mask=torch.ones(1, len(tokens), dtype=torch.int64),
        do_sample=False,
        num_beams=width,
        num_return_sequences=n,
        max_new_tokens=12,
        pad_token_id=319,
        **{"eos_token_id": EOS_ID, **options},
    )
    return [[token for token in row[len(tokens) :].tolist() if token not in (319, EOS_ID)] for row in output]


@pytest.fixture
def path(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("llama")


@pytest.mark.parametrize("options", [{}, {"length_penalty": 0.2}, {"early_stopping": True}])
def test_the_text_is_transformers(client: openai.OpenAI, path: Path, options: dict[str, Any]) -> None:
    wanted = [Tokenizer.load(path).decode(tokens) for tokens in expected(path, TEXT, 4, 3, **options)]
    answer = complete(client, {"use_beam_search": True, **options}, n=3, best_of=4, temperature=0)
    assert [choice.text for choice in answer.choices] == wanted
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 9


def test_several_prompts_beside_those_who_draw(client: openai.OpenAI, path: Path) -> None:
    prompts = [TEXT, "import os", "class A:"]
    wanted = [Tokenizer.load(path).decode(expected(path, prompt, 3, 1)[0]) for prompt in prompts]

    def draw(_: int) -> str:
        return complete(client, max_tokens=60, seed=1, temperature=1).choices[0].text

    alone = draw(0)
    with ThreadPoolExecutor(4) as pool:
        drawing = pool.map(draw, range(8))
        for _ in range(4):
            answer = complete(client, {"use_beam_search": True}, prompt=prompts, best_of=3)
            assert [choice.text for choice in answer.choices] == wanted
        assert set(drawing) == {alone}


def test_a_chat_searches_too(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=8,
        n=2,
        logprobs=True,
        top_logprobs=2,
        extra_body={"use_beam_search": True, "best_of": 4},
    )
    greedy = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=8, temperature=0, logprobs=True)

    def score(choice: Any) -> float:
        return mean([token.logprob for token in choice.logprobs.content])

    first, second = answer.choices
    assert score(first) >= score(second)
    assert score(first) >= score(greedy.choices[0]) - 1e-6
    assert first.logprobs is not None
    assert all(len(token.top_logprobs) == 2 for token in first.logprobs.content or [])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"best_of": 5}, "best_of"),
        ({"best_of": 0}, "best_of"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "stream"),
        ({"use_beam_search": True, "stream": True}, "stream"),
        ({"length_penalty": 0.5}, "length_penalty"),
        ({"early_stopping": True}, "early_stopping"),
        ({"use_beam_search": True, "early_stopping": "now"}, "early_stopping"),
        ({"use_beam_search": True, "length_penalty": 11}, "length_penalty"),
        ({"use_beam_search": True, "temperature": 0.7}, "temperature"),
        ({"use_beam_search": True, "top_k": 5}, "top_k"),
        ({"use_beam_search": True, "logit_bias": {"5": 1}}, "logit_bias"),
        ({"use_beam_search": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"use_beam_search": True, "echo": True, "logprobs": 1}, "echo"),
        ({"use_beam_search": True, "response_format": {"type": "json_object"}}, "use_beam_search"),
    ],
)
def test_what_cannot_be_had_together_is_named(client: openai.OpenAI, body: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, body)
    assert caught.value.param == param


def test_many_ends(client: openai.OpenAI) -> None:
    ends = {"use_beam_search": True, "top_p": 1, "stop_token_ids": list(range(64))}
    assert len(complete(client, ends, best_of=4, n=4).choices) == 4


def test_what_asks_for_nothing_is_taken(client: openai.OpenAI) -> None:
    nothing = {"use_beam_search": False, "length_penalty": 1.0, "early_stopping": False, "best_of": 1}
    assert complete(client, nothing, temperature=0).choices[0].text == complete(client, temperature=0).choices[0].text
