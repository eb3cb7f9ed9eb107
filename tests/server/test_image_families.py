"""Every family's images through the API: the tokens and pictures that its processor and tokenizer make of them."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from PIL import Image
from prometheus_client import CollectorRegistry
from transformers.models.paligemma.processing_paligemma import PaliGemmaProcessor

from penstock.images.config import ImageConfig
from penstock.images.families import load_processor
from penstock.images.reader import ImageReader
from penstock.server import ServerConfig
from penstock.server.app import create_app
from penstock.text import Tokenizer
from penstock.text.chat_template import ChatTemplate
from tests.images.files import animated, data_url, encoded
from tests.seeing_models import SEEING, THREE_AXES, drawing, make_seeing_checkpoint, token_ids_of, with_images
from tests.server.fakes import saying

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<before>IMAGE<after>{% elif part['type'] == 'video' %}<before>VIDEO<after>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}.{% endfor %}"
)


@pytest.mark.parametrize("family", [*SEEING, *THREE_AXES])
async def test_prompts_are_what_the_family_makes_of_them(seeing_checkpoint: Callable[[str], Path], family: str) -> None:
    path = seeing_checkpoint(family)
    processor = load_processor(path)
    assert processor is not None
    source = TEMPLATE.replace("IMAGE", processor.image_marker).replace("VIDEO", processor.video_marker or "")
    engine = saying("fine")
    app = create_app(
        client=engine,
        tokenizer=Tokenizer.load(path),
        template=ChatTemplate({"default": source}),
        config=ServerConfig(),
        registry=CollectorRegistry(),
        images=ImageReader(processor, ImageConfig()),
    )
    images: list[Any] = [drawing(60, 44), drawing(44, 90, seed=1)]
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_url(encoded(image))}} for image in images
    ]
    content.insert(1, {"type": "text", "text": " and "})
    shown = "user: <before>@<after> and <before>@<after>"
    if processor.video_marker is not None:
        colours = ["red", "lime", "blue", "white"]
        content.append({"type": "video_url", "video_url": {"url": data_url(animated("GIF", colours, 500, (64, 48)))}})
        images.append([Image.new("RGB", (64, 48), colour) for colour in colours])
        shown += "<before>@<after>"
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://fake") as client:
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
        answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    (request,) = engine.requests
    token_ids, pictures = with_images(path, processor, f"{shown}.", images)
    assert request.prompt_token_ids == token_ids
    assert len(request.pictures) == len(pictures)
    for picture, expected in zip(request.pictures, pictures, strict=True):
        for name in ("offset", "num_tokens", "pixels", "shape", "size", "grid", "time_step"):
            assert getattr(picture, name) == getattr(expected, name), name
    image_tokens = answer.json()["usage"]["prompt_tokens_details"]["image_tokens"]
    assert image_tokens == sum(picture.num_tokens for picture in pictures)


async def test_paligemma_without_a_chat_template_reads_upstreams_layout(tmp_path: Path) -> None:
    path = make_seeing_checkpoint(tmp_path, "paligemma")
    (path / "tokenizer_config.json").write_text('{"bos_token": "<|im_start|>"}')
    processor, template = load_processor(path), ChatTemplate.load(path)
    assert processor is not None
    engine, image = saying("fine"), drawing(60, 44)
    upstream = object.__new__(PaliGemmaProcessor)
    upstream.tokenizer = SimpleNamespace(bos_token="<|im_start|>")
    shown = {"type": "image_url", "image_url": {"url": data_url(encoded(image))}}
    question = {"type": "text", "text": "answer en what is <image>?"}
    app = create_app(
        client=engine,
        tokenizer=Tokenizer.load(path),
        template=template,
        config=ServerConfig(),
        registry=CollectorRegistry(),
        images=ImageReader(processor, ImageConfig()),
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://fake") as client:

        async def ask(*messages: dict[str, Any]) -> httpx.Response:
            return await client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1})

        for content in ([shown, question], [question, shown]):
            assert (await ask({"role": "user", "content": content})).status_code == 200
            _, texts, *_ = upstream.prepare_inputs_layout([image], ["answer en what is < image>?"])
            token_ids, pictures = with_images(path, processor, texts[0].replace("<image>", "@"), [image])
            assert engine.requests[-1].prompt_token_ids == token_ids
            assert engine.requests[-1].pictures[0].offset == pictures[0].offset == 0
        assert (await ask({"role": "user", "content": "of text alone"})).status_code == 200
        assert engine.requests[-1].prompt_token_ids == token_ids_of(path, "<|im_start|>of text alone\n")
        answer = await ask({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    assert answer.status_code == 400
    assert "holds no conversation" in answer.json()["error"]["message"]
