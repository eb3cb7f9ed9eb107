"""A real server over a tiny random LLaVA: what it says of images is what transformers says."""

import base64
import concurrent.futures
import http.server
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import numpy as np
import openai
import psutil
import pytest
import torch
from PIL import Image

from penstock.images.families import load_processor
from penstock.text import Tokenizer
from penstock.text.chat_template import ChatTemplate
from tests.commands import PENSTOCK, Server, run, serving
from tests.images.files import data_url, encoded, png_of_size
from tests.seeing_models import drawing, upstream_image_processor, upstream_model, with_images

NUM_TOKENS = 12


@pytest.fixture(scope="module")
def model(seeing_checkpoint: Callable[[str], Path]) -> Path:
    return seeing_checkpoint("llava")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """Yield a directory and where a server has its files."""
    path = tmp_path_factory.mktemp("files")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(path))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    host = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=host.serve_forever)
    thread.start()
    yield path, f"http://127.0.0.1:{host.server_port}"
    host.shutdown()
    thread.join()
    host.server_close()


@pytest.fixture(scope="module")
def server(model: Path, files: tuple[Path, str]) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PENSTOCK__IMAGES__ALLOWED_HOSTS", files[1].removeprefix("http://"))
        patched.setenv("PENSTOCK__IMAGES__ALLOW_PRIVATE_ADDRESSES", "true")
        with serving(str(model), "--dtype", "float32", "--served-model-name", "tiny") as running:
            yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def part(image: Image.Image | str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": image if isinstance(image, str) else data_url(encoded(image))}}


def user(*parts: str | Image.Image) -> Any:
    return {
        "role": "user",
        "content": [{"type": "text", "text": one} if isinstance(one, str) else part(one) for one in parts],
    }


def said(client: openai.OpenAI, *messages: Any, **more: Any) -> Any:
    return client.chat.completions.create(
        model="tiny",
        messages=list(messages),
        max_tokens=NUM_TOKENS,
        temperature=0,
        extra_body={"ignore_eos": True},
        **more,
    )


def expected(model: Path, *messages: Any, images: list[Image.Image]) -> str:
    """Return what transformers says to the messages, in which an @ is an image."""
    template = ChatTemplate.load(model)
    processor = load_processor(model)
    assert template is not None
    assert processor is not None
    text = template.render(list(messages), add_generation_prompt=True)
    token_ids, _ = with_images(model, processor, text, images)
    seen = upstream_image_processor("llava")(images, return_tensors="pt") if images else {}
    with torch.no_grad():
        output = upstream_model(model).generate(
            input_ids=torch.tensor([token_ids]),
            attention_mask=torch.ones(1, len(token_ids), dtype=torch.int64),
            **seen,
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
        )
    return Tokenizer.load(model).decode(output[0, len(token_ids) :].tolist(), skip_special_tokens=True)


ONE, TWO = drawing(100, 60), drawing(80, 90, seed=1)


def test_one_image(client: openai.OpenAI, model: Path) -> None:
    answer = said(client, user("what is ", ONE, "?"))
    assert answer.choices[0].message.content == expected(model, {"role": "user", "content": "what is @?"}, images=[ONE])
    assert answer.usage.prompt_tokens_details.model_dump()["image_tokens"] == 16
    other = said(client, user("what is ", TWO, "?"))
    assert other.choices[0].message.content == expected(model, {"role": "user", "content": "what is @?"}, images=[TWO])
    assert other.choices[0].message.content != answer.choices[0].message.content


def test_several_images_in_several_turns(client: openai.OpenAI, model: Path) -> None:
    messages = [user(ONE, " and ", TWO), {"role": "assistant", "content": "so"}, user("and ", ONE)]
    shown = [
        {"role": "user", "content": "@ and @"},
        {"role": "assistant", "content": "so"},
        {"role": "user", "content": "and @"},
    ]
    answer = said(client, *messages)
    assert answer.choices[0].message.content == expected(model, *shown, images=[ONE, TWO, ONE])
    assert answer.usage.prompt_tokens_details.model_dump()["image_tokens"] == 48
    pieces = said(client, *messages, stream=True, stream_options={"include_usage": True})
    chunks = list(pieces)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].message.content
    assert chunks[-1].usage.prompt_tokens_details.model_dump()["image_tokens"] == 48
    # All but the last block, images included, was there already.
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens >= answer.usage.prompt_tokens - 16


def test_a_second_question_about_a_picture_reuses_it(client: openai.OpenAI, model: Path) -> None:
    picture = drawing(70, 70, seed=2)
    said(client, user(picture, "a first long question about the same picture"))
    second = said(client, user(picture, "another"))
    assert second.usage.prompt_tokens_details.cached_tokens >= 16
    assert second.choices[0].message.content == expected(
        model, {"role": "user", "content": "@another"}, images=[picture]
    )
    # The same words about another picture have nothing to reuse but what comes before it.
    other = said(client, user(drawing(70, 70, seed=3), "another"))
    assert other.usage.prompt_tokens_details.cached_tokens < 16


def test_the_other_forms_say_the_same(client: openai.OpenAI, server: Server) -> None:
    answer = said(client, user("what is ", ONE)).choices[0].message.content
    response = client.responses.create(
        model="tiny",
        input=[
            {
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "what is "},
                    {"type": "input_image", "image_url": data_url(encoded(ONE)), "detail": "auto"},
                ],
            }
        ],
        max_output_tokens=NUM_TOKENS,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert response.output_text == answer
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as claude:
        source: Any = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(encoded(ONE)).decode()}
        message = claude.messages.create(
            model="tiny",
            max_tokens=NUM_TOKENS,
            messages=[
                {"role": "user", "content": [{"type": "text", "text": "what is "}, {"type": "image", "source": source}]}
            ],
            extra_body={"temperature": 0, "ignore_eos": True},
        )
    assert [block.text for block in message.content if block.type == "text"] == [answer]


def test_an_image_by_url(client: openai.OpenAI, files: tuple[Path, str]) -> None:
    path, url = files
    (path / "one.png").write_bytes(encoded(ONE))
    fetched = said(client, {"role": "user", "content": [{"type": "text", "text": "see "}, part(f"{url}/one.png")]})
    assert fetched.choices[0].message.content == said(client, user("see ", ONE)).choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="its host answers 404"):
        said(client, {"role": "user", "content": [part(f"{url}/two.png")]})
    with pytest.raises(openai.BadRequestError, match="fetches no images from localhost"):
        said(client, {"role": "user", "content": [part("http://localhost/one.png")]})


def test_text_alone(client: openai.OpenAI, model: Path) -> None:
    answer = said(client, {"role": "user", "content": "hello"})
    assert answer.choices[0].message.content == expected(model, {"role": "user", "content": "hello"}, images=[])


def test_good_and_bad_images_at_once(client: openai.OpenAI, model: Path) -> None:
    pictures = [drawing(40 + 8 * i, 64, seed=i) for i in range(4)]
    alone = [said(client, user(picture, "?")).choices[0].message.content for picture in pictures]

    def ask(number: int) -> bool:
        if number % 4 == 3:
            broken = data_url(encoded(pictures[0])[: 40 + number])
            with pytest.raises(openai.BadRequestError, match="is cut off after"):
                said(client, {"role": "user", "content": [part(broken)]})
            return True
        which = number % 3
        return bool(said(client, user(pictures[which], "?")).choices[0].message.content == alone[which])

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(48)))


def hostile_files() -> list[bytes]:
    """Return files that are spoiled at random, cut off, or made to cost more than they should."""
    random = np.random.default_rng(0)
    whole = [encoded(ONE), encoded(ONE, "JPEG", progressive=True), encoded(ONE, "WEBP"), encoded(ONE, "GIF")]
    files = [png_of_size(60_000, 60_000), png_of_size(5000, 5000), b"", b"GIF89a\xff\xff\xff\xff"]
    scans = whole[1]
    files.append(scans[:-2] + scans[scans.rindex(b"\xff\xda") : -2] * 500)
    for number in range(120):
        file = bytearray(whole[number % 4])
        for place in random.integers(0, min(len(file), 200 if number % 2 else len(file)), 6):
            file[place] = random.integers(256)
        files.append(bytes(file[: random.integers(1, len(file)) if number % 3 == 0 else None]))
    return files


def test_hostile_files_neither_crash_nor_stall_it(client: openai.OpenAI, server: Server) -> None:
    process = psutil.Process(server.process.pid)
    before = said(client, user(ONE, "?")).choices[0].message.content
    slowest_s = 0.0

    def send(file: bytes) -> int:
        body = {"messages": [{"role": "user", "content": [part(data_url(file)), part(ONE)]}], "max_tokens": 1}
        return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).status_code

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        sent = [pool.submit(send, file) for file in hostile_files()]
        held_bytes = 0
        while not all(one.done() for one in sent):
            began_s = time.perf_counter()
            assert httpx.get(f"{server.url}/health/live", timeout=30).status_code == 200
            slowest_s = max(slowest_s, time.perf_counter() - began_s)
            held_bytes = max(held_bytes, process.memory_info().rss)
        statuses = {one.result() for one in sent}
    assert statuses == {200, 400}
    assert slowest_s < 5
    assert held_bytes < 1 << 30
    assert said(client, user(ONE, "?")).choices[0].message.content == before


def test_bench_sends_images(server: Server) -> None:
    sizes = [
        "--num-requests",
        "4",
        "--repetitions",
        "1",
        "--warmup",
        "1",
        "--prompt-tokens",
        "8",
        "--output-tokens",
        "4",
    ]
    result = run("bench", server.url, *sizes, "--images", "2", "--image-size", "80x64", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["conditions"]["workload"]["num_images"] == 2
    assert report["conditions"]["workload"]["image_size"] == {"width": 80, "height": 64}
    assert report["runs"][0]["errors"] == {}
    assert report["runs"][0]["num_output_tokens"] == 16
    refused = run("bench", "--images", "1")
    assert refused.returncode == 2
    assert "serve the model and give its URL" in refused.stderr


def test_chat_shows_images(client: openai.OpenAI, server: Server, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "one.png"
    file.write_bytes(encoded(ONE))
    asked = ["--image", str(file), "--prompt", "?", "--max-tokens", "6"]
    (tmp_path / "not.png").write_bytes(b"II*\0 no")
    with_server, here = run("chat", server.url, *asked), run("chat", str(model), *asked)
    assert (with_server.returncode, here.returncode) == (0, 0), with_server.stderr + here.stderr
    assert with_server.stdout.strip()
    assert here.stdout.strip()
    typed = f"/image {tmp_path}/not.png\n/image {file}\n?\n/quit\n"
    talked = subprocess.run(
        [*PENSTOCK, "chat", server.url, "--max-tokens", "6"], input=typed, capture_output=True, text=True, timeout=60
    )
    assert talked.returncode == 0
    assert "not.png: it is TIFF" in talked.stderr
    assert with_server.stdout in talked.stdout
    plain = run("chat", server.url, *asked[2:])
    assert plain.stdout != with_server.stdout
    for name, message in (("missing.png", "cannot be read"), ("not.png", "it is TIFF")):
        refused = run("chat", server.url, "--image", str(tmp_path / name), "--prompt", "?")
        assert refused.returncode == 1
        assert name in refused.stderr
        assert message in refused.stderr
