"""Answers held to a schema, a pattern or a grammar, through OpenAI's own client, on a model that says random things."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, Field

from penstock.server import ServerConfig
from tests.servers import RunningServer, serve_checkpoint

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


class Dish(BaseModel):
    """What a random model will order."""

    name: str = Field(max_length=12)
    course: Literal["starter", "main", "dessert"]
    price: int = Field(ge=1, le=99)
    spicy: bool
    allergens: list[Literal["nuts", "milk", "fish"]] = Field(max_length=3)


SCHEMA: dict[str, Any] = {**Dish.model_json_schema(), "additionalProperties": False}
FORMAT: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "dish", "schema": SCHEMA, "strict": True}}


def chat(client: openai.OpenAI, **request: Any) -> ChatCompletion:
    answer: ChatCompletion = client.chat.completions.create(
        **{"model": "tiny", "messages": HELLO, "max_tokens": 300, **request}
    )
    return answer


def ask(client: openai.OpenAI, wanted: dict[str, Any], **request: Any) -> list[tuple[str, str]]:
    answer = chat(client, extra_body={"structured_outputs": wanted}, **request)
    return [(choice.message.content or "", choice.finish_reason) for choice in answer.choices]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
def test_answers_satisfy_the_schema(client: openai.OpenAI, temperature: float) -> None:
    answer = chat(client, response_format=FORMAT, n=4, temperature=temperature, seed=5)
    assert [choice.finish_reason for choice in answer.choices] == ["stop"] * 4
    for choice in answer.choices:
        Dish.model_validate_json(choice.message.content or "", strict=True)


def test_the_sdks_parse_helper(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="tiny", messages=HELLO, response_format=Dish, max_tokens=300, temperature=1, seed=3
    )
    assert isinstance(answer.choices[0].message.parsed, Dish)


def test_streamed_as_whole(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"response_format": FORMAT, "n": 2, "temperature": 1, "seed": 8}
    whole = [choice.message.content for choice in chat(client, **request).choices]
    texts, reasons = ["", ""], ["", ""]
    for chunk in client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=300, stream=True, **request):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == whole
    assert reasons == ["stop", "stop"]


def test_any_json_object(client: openai.OpenAI) -> None:
    # Random letters in a string seldom end it: the bias makes the model end what it began.
    bias = {str(ord('"') - 33): 6, str(ord("}") - 33): 8}
    for request in (
        {"response_format": {"type": "json_object"}},
        {"extra_body": {"structured_outputs": {"json_object": True}}},
    ):
        answer = chat(client, **request, n=4, temperature=1, seed=2, logit_bias=bias)
        finished = [choice for choice in answer.choices if choice.finish_reason == "stop"]
        assert finished
        for choice in finished:
            assert isinstance(json.loads(choice.message.content or ""), dict)


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ({"regex": r"[a-f]{3}-[0-9]{2,4}"}, r"[a-f]{3}-[0-9]{2,4}"),
        ({"regex": "(é|ß)+x"}, "(é|ß)+x"),
        ({"choice": ["yes", "no", 'may"be\n']}, 'yes|no|may"be\n'),
        ({"grammar": 'start: "x" NUMBER ("," NUMBER){2}\nNUMBER: /[0-9]{3}/'}, r"x\d{3},\d{3},\d{3}"),
        ({"grammar": 'root ::= "<" item{1,3} ">"\nitem ::= [a-z] | "(" item ")"'}, r"<[a-z()]+>"),
        ({"json": {"type": "array", "items": {"type": "null"}, "maxItems": 2}}, r"\[\s*(null\s*(,\s*null\s*)?)?\]"),
        ({"json": '{"enum": [1, "two", null]}'}, r'1|"two"|null'),
    ],
)
def test_every_kind_on_both_endpoints(client: openai.OpenAI, wanted: dict[str, Any], pattern: str) -> None:
    for text, reason in ask(client, wanted, n=3, temperature=1, seed=1):
        assert re.fullmatch(pattern, text), text
        assert reason == "stop"
    completion = client.completions.create(
        model="tiny", prompt="abc", max_tokens=300, extra_body={"structured_outputs": wanted}
    )
    assert re.fullmatch(pattern, completion.choices[0].text)


def test_an_answer_that_was_cut_says_so_and_matches_all_the_same(client: openai.OpenAI) -> None:
    whole = chat(client, response_format=FORMAT, temperature=0).choices[0]
    assert whole.finish_reason == "stop"
    text = whole.message.content or ""
    num_tokens = len(text.encode())
    for max_tokens in (1, num_tokens // 3, num_tokens // 2, num_tokens - 1):
        answer = chat(client, response_format=FORMAT, temperature=0, max_tokens=max_tokens)
        cut = answer.choices[0]
        assert cut.finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == max_tokens
        Dish.model_validate_json(cut.message.content or "", strict=True)
        said = text.encode()[:max_tokens].decode(errors="ignore")
        assert (cut.message.content or "").startswith(said)
    exact = chat(client, response_format=FORMAT, temperature=0, max_tokens=num_tokens).choices[0]
    assert (exact.message.content, exact.finish_reason) == (text, "stop")


def test_what_was_cut_is_ended_in_a_stream_too(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": "tiny", "messages": HELLO, "response_format": FORMAT, "max_tokens": 20, "n": 3}
    stream = client.chat.completions.create(**request, temperature=1, seed=2, stream=True)
    texts = ["", "", ""]
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    for text in texts:
        Dish.model_validate_json(text, strict=True)


def test_end_of_sequence_only_where_the_grammar_may_end(client: openai.OpenAI) -> None:
    wanted = {"regex": "ab(cd)*"}
    # Everything speaks for the end from the first token on.
    assert ask(client, wanted, logit_bias={"258": 100}) == [("ab", "stop")]
    # And everything against it.
    assert ask(client, wanted, logit_bias={"258": -100}, max_tokens=9) == [("abcdcdcdcd", "length")]


def test_min_tokens_lengthens_what_can_be_longer(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"logit_bias": {"258": 100}}
    for wanted, text in (({"regex": "ab(cd)*"}, "abcdcd"), ({"choice": ["ab"]}, "ab")):
        answer = chat(client, extra_body={"structured_outputs": wanted, "min_tokens": 6}, **request)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (text, "stop")


def test_stop_strings_and_stop_tokens(client: openai.OpenAI) -> None:
    wanted = {"regex": "abc;def;ghi"}
    assert ask(client, wanted, stop="f;") == [("abc;de", "stop")]
    answer = chat(client, extra_body={"structured_outputs": wanted, "stop": [";"], "include_stop_str_in_output": True})
    assert answer.choices[0].message.content == "abc;"


def test_logprobs_are_the_models_own(client: openai.OpenAI) -> None:
    answer = chat(
        client, extra_body={"structured_outputs": {"regex": "[ab]{4}"}}, logprobs=True, top_logprobs=2, temperature=0
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(one.token for one in logprobs.content) == answer.choices[0].message.content
    for one in logprobs.content:
        assert len(one.top_logprobs) == 2, "what the model would have said, allowed or not"
        assert one.logprob <= one.top_logprobs[0].logprob


def test_beside_others_nothing_changes(client: openai.OpenAI) -> None:
    """Requests with and without a grammar, all at once, answer as each does alone."""
    requests: list[dict[str, Any]] = [
        {"temperature": 0, "max_tokens": 40},
        {"temperature": 0, "response_format": FORMAT},
        {"temperature": 1, "seed": 4, "max_tokens": 40, "extra_body": {"top_k": 5}},
        {"temperature": 1, "seed": 4, "extra_body": {"structured_outputs": {"regex": "[a-z]{30}"}, "top_k": 3}},
        {"temperature": 1, "seed": 6, "extra_body": {"structured_outputs": {"choice": ["one", "two"]}}},
        {"temperature": 1, "seed": 7, "n": 2, "response_format": FORMAT, "frequency_penalty": 0.5},
    ]

    def contents(request: dict[str, Any]) -> list[str | None]:
        return [choice.message.content for choice in chat(client, **request).choices]

    alone = [contents(request) for request in requests]
    together: dict[int, list[str | None]] = {}
    threads = [
        threading.Thread(target=lambda i=i, request=request: together.__setitem__(i, contents(request)))
        for i, request in enumerate(requests * 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[i] for i in range(len(threads))] == alone * 2


# ---- what is refused


NESTED = {"type": "object", "properties": {"a": {"type": "array", "items": {"anyOf": [{"type": "null"}, {"not": {}}]}}}}


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": NESTED}}},
            "response_format.json_schema.schema.properties.a.items.anyOf.1",
            'Unimplemented keys: ["not"]',
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "missing",
        ),
        (
            {"structured_outputs": {"json": {"$defs": {"d": {"type": "thing"}}, "$ref": "#/$defs/d"}}},
            "structured_outputs.json.$defs.d",
            "thing",
        ),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "not valid JSON"),
        ({"structured_outputs": {"json": "[]"}}, "structured_outputs.json", "JSON object"),
        ({"structured_outputs": {"json": {"$ref": "#"}}}, "structured_outputs.json", "no text that it matches"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex", "unclosed group"),
        ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs.regex", "look-around"),
        ({"structured_outputs": {"grammar": "start: other"}}, "structured_outputs.grammar", 'unknown name: "other"'),
        ({"structured_outputs": {"grammar": "root ::= other"}}, "structured_outputs.grammar", "'other' not found"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1 item"),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice.0", "at least 1 character"),
        ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern", "unknown"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs", ""),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos", "leave it out"),
        ({"guided_json": {}}, "guided_json", "structured_outputs.json"),
        ({"guided_regex": "a"}, "guided_regex", "structured_outputs.regex"),
        ({"guided_choice": ["a"]}, "guided_choice", "structured_outputs.choice"),
        ({"guided_grammar": "start: A"}, "guided_grammar", "structured_outputs.grammar"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_followed_is_refused_where_it_stands(
    client: openai.OpenAI, body: dict[str, Any], param: str, message: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, stream=stream, extra_body=body)
    assert caught.value.param == param
    assert message in caught.value.message


@pytest.fixture(scope="module")
def hasty(checkpoint: Callable[[str], Path]) -> Iterator[RunningServer]:
    config = ServerConfig(served_names=("tiny",), max_grammar_chars=5000, grammar_timeout_s=0.5)
    with serve_checkpoint(checkpoint("llama"), config) as running:
        yield running


def test_size_and_time_are_bounded(hasty: RunningServer) -> None:
    with openai.OpenAI(base_url=f"{hasty.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="at most 5000"):
            ask(client, {"choice": ["a" * 6000]})
        with pytest.raises(openai.BadRequestError, match=r"longer than 0\.5 s"):
            # The product of two automata of 2^15 states, by complement.
            ask(client, {"grammar": "start: A\nA: ~/(?s:.*)a(.|\\n){14}(?s:.*)/ & /(?s:.*)b(.|\\n){15}/"})
        assert ask(client, {"choice": ["still here"]}) == [("still here", "stop")]
