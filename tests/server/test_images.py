"""Images through every wire form, over a fake engine and a fake family."""

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import structlog

from penstock.images.config import ImageConfig
from penstock.images.reader import ImageReader
from penstock.protocol import Picture
from penstock.server import ServerConfig
from tests.fakes.vision import LIST_TEMPLATE, FakeProcessor, seeing_tokenizer
from tests.images.files import animated, data_url, drawing, encoded
from tests.server.fakes import FakeEngine, anthropic_over, http_over, openai_over, saying

URL = data_url(encoded(drawing()))
OTHER_URL = data_url(encoded(drawing(80, 80)))
GIF = data_url(animated("GIF", ["red", "lime", "blue"], duration_ms=500), "image/gif")
TOKENIZER = seeing_tokenizer()
IMAGE_ID, FRAME_ID = (TOKENIZER.encode(token, add_special_tokens=False)[0] for token in ("<image>", "<frame>"))


def image(url: str = URL, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def reader(**config: Any) -> ImageReader:
    return ImageReader(FakeProcessor(), ImageConfig(**config))


@pytest.fixture
def engine() -> FakeEngine:
    return saying("fine")


@pytest.fixture
async def client(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with http_over(engine, ServerConfig(max_body_bytes=1000), template=LIST_TEMPLATE, images=reader()) as client:
        yield client


async def chat(client: httpx.AsyncClient, *messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    response = await client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 4, **more})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def error(client: httpx.AsyncClient, *messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    response = await client.post("/v1/chat/completions", json={"messages": messages, **more})
    assert response.status_code == 400, response.text
    found: dict[str, Any] = response.json()["error"]
    return found


def prompt(engine: FakeEngine, at: int = -1) -> str:
    return TOKENIZER.decode(engine.requests[at].prompt_token_ids)


def placed(engine: FakeEngine, at: int = -1) -> tuple[Picture, ...]:
    """Return a request's pictures, after checking that each is where its placeholders are and that none is left."""
    request = engine.requests[at]
    ids = list(request.prompt_token_ids)
    for picture in request.pictures:
        run = ids[picture.offset : picture.offset + picture.num_tokens]
        assert set(run) in ({IMAGE_ID}, {FRAME_ID})
        ids[picture.offset : picture.offset + picture.num_tokens] = [0] * picture.num_tokens
    assert not {IMAGE_ID, FRAME_ID} & set(ids)
    return request.pictures


async def test_images_stand_where_they_were_shown(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await chat(
        client,
        {"role": "system", "content": "Look."},
        user(text("one "), image(), text(" two "), text("more "), image(OTHER_URL, detail="high")),
        {"role": "assistant", "content": "I see."},
        user(image(detail="low"), text(" again")),
    )
    four, three = "<image>" * 4, "<image>" * 3
    assert prompt(engine) == (
        f"<|im_start|>system\nLook.<|im_end|>\n<|im_start|>user\none [{four}] two more [{four}|{three}]<|im_end|>\n"
        f"<|im_start|>assistant\nI see.<|im_end|>\n<|im_start|>user\n[{four}] again<|im_end|>\n<|im_start|>assistant\n"
    )
    first, second, closer, third = placed(engine)
    assert first.key == third.key != second.key
    assert [one.num_tokens for one in (first, second, closer, third)] == [4, 4, 3, 4]
    assert (first.size, second.size) == ((48, 64), (80, 80))
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(engine.requests[-1].prompt_token_ids)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0, "image_tokens": 15}
    assert "warnings" not in usage


async def test_text_alone_is_as_ever(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await chat(client, {"role": "user", "content": "hello"}, user(text("a"), text("b")))
    assert prompt(engine) == (
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
    )
    assert placed(engine) == ()
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


async def test_a_template_that_reads_text_alone(engine: FakeEngine) -> None:
    async with http_over(engine, images=reader()) as client:
        await chat(client, user(text("one "), image(), text(" two")))
    assert f"user\none [{'<image>' * 4}] two<|im_end|>" in prompt(engine)
    assert len(placed(engine)) == 1


async def test_a_tool_shows_an_image(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "camera", "arguments": "{}"}}
    await chat(
        client,
        {"role": "user", "content": "look"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": [text("taken: "), image()]},
    )
    assert f"<|im_start|>tool\ntaken: [{'<image>' * 4}]" in prompt(engine)
    assert len(placed(engine)) == 1


async def test_videos(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    video = {"type": "video_url", "video_url": {"url": GIF}}
    answer = await chat(client, user(image(), video, text("?"), image(OTHER_URL)))
    assert [one.shape[0] for one in placed(engine)] == [1, 3, 1]
    assert f"[{'<image>' * 4}]({'<frame>' * 6})?[" in prompt(engine)
    assert answer["usage"]["prompt_tokens_details"]["image_tokens"] == 14


@pytest.mark.parametrize("word", ["<image>", "<frame>", "<video>"])
async def test_words_that_look_like_an_image_are_words(
    client: httpx.AsyncClient, engine: FakeEngine, word: str
) -> None:
    spaced = f"< {word[1:]}"
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": json.dumps({"a": [word]})}}
    await chat(
        client,
        {"role": "system", "content": f"sys {word}"},
        user(text(f"before {word}{word} "), image(), text(f" <{word}>")),
        {"role": "assistant", "content": word, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": word},
        chat_template_kwargs={"extra": {word: word}},
    )
    shown = prompt(engine)
    assert f"before {spaced}{spaced} [" in shown
    assert f" <{spaced}>" in shown
    assert len(placed(engine)) == 1
    # And where nothing is shown at all.
    await chat(client, {"role": "user", "content": f"what is {word}"})
    assert f"what is {spaced}<|im_end|>" in prompt(engine)
    assert placed(engine) == ()


async def test_words_that_a_template_puts_together_are_refused(engine: FakeEngine) -> None:
    template = LIST_TEMPLATE.replace("{{ message['role'] }}", "{{ message['role'] }}{{ message['name'] }}age>")
    async with http_over(engine, template=template, images=reader()) as client:
        found = await error(client, {**user(image()), "name": "<im"})
    assert found["param"] == "messages"
    assert "does not show the 1 images" in found["message"]
    assert engine.requests == []


async def test_a_template_that_passes_over_images_is_refused(engine: FakeEngine) -> None:
    async with http_over(engine, template=LIST_TEMPLATE.replace("<image>", ""), images=reader()) as client:
        assert "does not show the 1 images" in (await error(client, user(image())))["message"]


@pytest.mark.parametrize(
    ("message", "param", "said"),
    [
        (
            user(text("a"), image("data:image/png;base64,AAAA")),
            "messages.0.content.1.image_url",
            "no image that is known",
        ),
        (user(image("")), "messages.0.content.0.image_url", "its URL must be data:"),
        (user(image(data_url(encoded(drawing())[:90]))), "messages.0.content.0.image_url", "is cut off after"),
        (user(image("http://127.0.0.1/a.png")), "messages.0.content.0.image_url", "send it as a data: URL"),
        (user({"type": "image_url", "image_url": URL}), "messages.0.content.0.image_url", "must be a JSON object"),
        (user({"type": "image_url"}), "messages.0.content.0.image_url", "is missing"),
        (user(image(URL, detail="most")), "messages.0.content.0.image_url.detail", "'low'"),
        (
            user({"type": "video_url", "video_url": {"url": "http://a/b.mp4"}}),
            "messages.0.content.0.video_url",
            "not fetched",
        ),
        (
            user({"type": "input_audio", "input_audio": {}}),
            "messages.0.content.0",
            "'input_audio' cannot be read here; text, image_url and video_url can",
        ),
        *(
            (
                {"role": "user", "content": [part]},
                "messages.0.content.0",
                "a part of the content must be a JSON object with a type; those of text, image_url and video_url can",
            )
            for part in ("text", 7, None, {"text": "a"})
        ),
        (
            {"role": "system", "content": [image()]},
            "messages.0.content.0.image_url",
            "message of system shows no images",
        ),
        ({"role": "assistant", "content": [image()]}, "messages.0.content.0.image_url", "assistant shows no images"),
        (user(*[image()] * 33), "messages.0.content.32.image_url", "at most 32 in a request; show fewer"),
    ],
)
async def test_what_is_wrong_is_said(
    client: httpx.AsyncClient, engine: FakeEngine, message: dict[str, Any], param: str, said: str
) -> None:
    found = await error(client, message)
    assert found["type"] == "invalid_request_error"
    assert found["param"] == param
    assert said in found["message"]
    assert engine.requests == []


async def test_codes_tell_images_from_other_faults(client: httpx.AsyncClient) -> None:
    assert (await error(client, user(image("data:image/png;base64,AAAA"))))["code"] == "invalid_image"


async def test_a_model_that_sees_nothing_says_so(engine: FakeEngine) -> None:
    async with http_over(engine) as client:
        found = await error(client, user(text("a"), image()))
    assert found["param"] == "messages.0.content.1.image_url"
    assert "this model sees no images; send text alone, or serve a model that sees" in found["message"]


async def test_prompts_that_are_cut_have_no_images(client: httpx.AsyncClient) -> None:
    assert (await error(client, user(image()), truncate_prompt_tokens=5))["param"] == "truncate_prompt_tokens"


async def test_limits_count_picture_tokens(engine: FakeEngine) -> None:
    config = ServerConfig(max_prompt_tokens=60)
    async with http_over(engine, config, template=LIST_TEMPLATE, images=reader()) as client:
        await chat(client, user(image()))
        found = await error(client, user(*[image()] * 8))
        assert found["code"] == "context_length_exceeded"
        assert "this server takes 60" in found["message"]
        found = await error(client, user(*[image()] * 16))
    assert found["code"] == "context_length_exceeded"
    assert found["param"].startswith("messages.0.content.")
    assert "images take 64 tokens, and a prompt has at most 60" in found["message"]


async def test_bodies_are_larger_where_images_come(engine: FakeEngine) -> None:
    async with http_over(
        engine, ServerConfig(max_body_bytes=1000), template=LIST_TEMPLATE, images=reader(max_body_bytes=5000)
    ) as client:
        long = await client.post("/v1/chat/completions", json={"messages": [user(text("x" * 2000))]})
        assert long.json()["error"]["code"] == "context_length_exceeded"
        assert (
            await client.post("/v1/chat/completions", json={"messages": [user(text("x" * 6000))]})
        ).status_code == 413


async def test_warnings_stand_in_the_usage(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    blank = data_url(encoded(drawing(64, 64).point(lambda _: 255)))
    tiny = data_url(encoded(drawing(9, 40)))
    body = {"messages": [user(image(), image(blank)), user(image(tiny))], "max_tokens": 4}
    answer = (await client.post("/v1/chat/completions", json=body)).json()
    warnings = answer["usage"]["warnings"]
    assert [(one["code"], one["param"]) for one in warnings] == [
        ("image_blank", "messages.0.content.1.image_url"),
        ("image_small", "messages.1.content.0.image_url"),
    ]
    assert "#ffffff" in warnings[0]["message"]
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    lines = (await client.post("/v1/chat/completions", json=streamed)).text.split("\n\n")
    usage = json.loads(lines[-3].removeprefix("data: "))["usage"]
    assert usage["warnings"] == warnings
    assert usage["prompt_tokens_details"]["image_tokens"] == 12
    anthropics = {
        "model": "fake",
        "max_tokens": 4,
        "messages": [{"role": "user", "content": [block(tiny)]}],
    }
    answer = (await client.post("/v1/messages", json=anthropics)).json()
    assert answer["usage"]["warnings"][0]["param"] == "messages.0.content.0.source"


async def test_tokens_are_counted_with_images(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    messages = [user(text("a"), image())]
    answer = await chat(client, *messages)
    tokenized = (await client.post("/tokenize", json={"messages": messages})).json()
    assert tokenized["count"] == answer["usage"]["prompt_tokens"]
    assert tokenized["tokens"] == engine.requests[0].prompt_token_ids
    counted = await client.post(
        "/v1/messages/count_tokens",
        json={"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, block(URL)]}]},
    )
    assert counted.json() == {"input_tokens": tokenized["count"]}


async def test_go_on_with_the_last_message(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await chat(
        client,
        user(image()),
        {"role": "assistant", "content": "It is"},
        continue_final_message=True,
        add_generation_prompt=False,
    )
    assert prompt(engine).endswith("<|im_start|>assistant\nIt is")


def block(url: str) -> dict[str, Any]:
    media_type, _, data = url.removeprefix("data:").partition(";base64,")
    return {"type": "image", "source": {"type": "base64", "media_type": media_type, "data": data}}


async def test_anthropics_client(engine: FakeEngine) -> None:
    result = {
        "type": "tool_result",
        "tool_use_id": "t",
        "content": [{"type": "text", "text": "taken: "}, block(OTHER_URL)],
    }
    call = {"type": "tool_use", "id": "t", "name": "camera", "input": {}}
    messages: Any = [
        {"role": "user", "content": [{"type": "text", "text": "look "}, block(URL)]},
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result, {"type": "text", "text": "and?"}]},
    ]
    async with anthropic_over(engine, template=LIST_TEMPLATE, images=reader()) as claude:
        answer = await claude.messages.create(model="fake", max_tokens=4, messages=messages)
        async with claude.messages.stream(model="fake", max_tokens=4, messages=messages) as stream:
            final = await stream.get_final_message()
    four = "<image>" * 4
    assert f"user\nlook [{four}]<|im_end|>" in prompt(engine)
    assert f"tool\ntaken: [{four}]<|im_end|>\n<|im_start|>user\nand?<|im_end|>" in prompt(engine)
    assert [one.size for one in placed(engine)] == [(48, 64), (80, 80)]
    assert (answer.usage.model_extra or {})["image_tokens"] == 8
    assert (final.usage.model_extra or {})["image_tokens"] == 8


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([block("data:image/png;base64,AAAA")], "messages.0.content.0.source: it is no image that is known"),
        (
            [{"type": "image", "source": {"type": "url", "url": "http://a/b"}}],
            "messages.0.content.0.source: this server fetches",
        ),
        (
            [{"type": "image", "source": {"type": "file", "file_id": "x"}}],
            "messages.0.content.0.source: this server keeps no files",
        ),
        ([{"type": "image", "source": {"type": "base64", "media_type": "image/tiff", "data": ""}}], "media_type"),
        ([{"type": "document", "source": {}}], "'document' cannot be read here"),
    ],
)
async def test_what_is_wrong_is_said_in_messages(client: httpx.AsyncClient, content: Any, said: str) -> None:
    body = {"model": "fake", "max_tokens": 4, "messages": [{"role": "user", "content": content}]}
    response = await client.post("/v1/messages", json=body)
    assert response.status_code == 400
    assert said in response.json()["error"]["message"]


async def test_what_messages_can_hold_where_images_cannot_is_said(client: httpx.AsyncClient) -> None:
    body = {"model": "fake", "max_tokens": 4, "messages": [{"role": "user", "content": "x"}], "system": [block(URL)]}
    response = await client.post("/v1/messages", json=body)
    assert response.json()["error"]["message"] == "system.0: content of type 'image' cannot be read here; text can"


async def test_openais_client(engine: FakeEngine) -> None:
    shown: Any = {"type": "input_image", "image_url": URL, "detail": "high"}
    result: Any = {
        "type": "function_call_output",
        "call_id": "c",
        "output": [{"type": "input_image", "image_url": OTHER_URL}],
    }
    call: Any = {"type": "function_call", "call_id": "c", "name": "camera", "arguments": "{}"}
    async with openai_over(engine, template=LIST_TEMPLATE, images=reader()) as client:
        answer = await client.responses.create(
            model="fake",
            input=[{"role": "user", "content": [{"type": "input_text", "text": "look "}, shown]}, call, result],
        )
        chat_answer = await client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": URL}}]}]
        )
    assert [one.num_tokens for one in placed(engine, 0)] == [4, 3, 4]
    assert f"user\nlook [{'<image>' * 4}|{'<image>' * 3}]" in prompt(engine, 0)
    assert answer.usage is not None
    assert (answer.usage.input_tokens_details.model_extra or {})["image_tokens"] == 11
    assert chat_answer.usage is not None
    assert chat_answer.usage.prompt_tokens_details is not None
    assert chat_answer.usage.prompt_tokens_details.model_dump()["image_tokens"] == 4


@pytest.mark.parametrize(
    ("part", "param", "said"),
    [
        ({"type": "input_image", "image_url": "data:image/png;base64,AAAA"}, "input.0.content.0.image_url", "no image"),
        ({"type": "input_image", "file_id": "x"}, "input.0.content.0.file_id", "keeps no files"),
        ({"type": "input_image"}, "input.0.content.0.image_url", "is missing"),
        ({"type": "input_file", "file_id": "x"}, "input.0.content.0", "'input_file' cannot be read here"),
    ],
)
async def test_what_is_wrong_is_said_in_responses(
    client: httpx.AsyncClient, part: dict[str, Any], param: str, said: str
) -> None:
    response = await client.post("/v1/responses", json={"input": [{"role": "user", "content": [part]}]})
    assert response.status_code == 400
    found = response.json()["error"]
    assert (found["param"], said in found["message"]) == (param, True), found


async def test_logs_have_numbers_alone(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with structlog.testing.capture_logs() as events, caplog.at_level(logging.DEBUG):
        await chat(client, user(text("secret words"), image()))
        await error(client, user(image(data_url(encoded(drawing())[:90]))))
    done, failed = [event for event in events if event["event"] == "request"]
    assert (done["num_images"], done["num_image_tokens"]) == (1, 4)
    assert failed["error"] == "invalid_image"
    out = capsys.readouterr()
    everything = f"{events}{caplog.text}{out.out}{out.err}"
    assert "secret" not in everything
    assert URL[30:60] not in everything
