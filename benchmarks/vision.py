"""Images in the engine: `python -m benchmarks.vision`.

Measurements on a LLaVA with random weights, the same threads throughout, in float32 but for what --dtype says:

- a second question about an image, beside a first one, in the engine: seconds to the first token, by turns;
- --requests, 16 at a time, each with an image of its own, beside transformers' `generate` in padded batches of 16, each
  as long as its longest member, by turns: questions and answers uniform in 16..128 tokens, and all of 72. --dtype is
  what both run in; with --quantize, ours rounds the decoder's weights and activations so;
- how long those who decode wait when images come, in the engine's process and with an encoder in another.

Images are prepared beforehand for both. `tiny` has a few million parameters; `0.5b` a decoder of Qwen2.5-0.5B's shape
and a tower of SigLIP-base's at 384 pixels, which makes 576 tokens of an image.
"""

import argparse
import hashlib
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import transformers
from PIL import Image

from benchmarks.vs_transformers import engine_info, processor
from penstock.engine.assemble import assemble_engine
from penstock.engine.config import EngineConfig, RunnerConfig, SchedulerConfig
from penstock.engine.encoding.pool import EncoderPool
from penstock.engine.encoding.source import FeatureSource
from penstock.engine.engine import Engine
from penstock.engine.runner.encoder import LocalEncoder
from penstock.images.families import load_processor
from penstock.kernels import describe, ops_for, use_threads
from penstock.launch import encoder
from penstock.launch.settings import ModelSettings, Settings
from penstock.launch.threads import share_threads
from penstock.models import resolve_model
from penstock.models.decoder import load_model
from penstock.models.vision.load import load_vision, read_tower_shape
from penstock.protocol import GenerateRequest, Picture, SamplingParams
from penstock.text import Tokenizer

CONCURRENCY = 16
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tiny": (
        {
            "vocab_size": 6144,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
        },
        {
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "image_size": 112,
            "patch_size": 14,
        },
    ),
    "0.5b": (
        {
            "vocab_size": 151_936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 384,
            "patch_size": 16,
        },
    ),
}
IMAGE_ID = 3
"""penstock-mini's, whose tokenizer and template the models have"""
NUM_STALLS = 4
LENGTHS = {"mixed": (16, 128), "equal": (72, 72)}
"""Fewest and most tokens of questions, and of answers"""
PARTS = ["repeated", "stall", *LENGTHS]


def make_llava(path: Path, shape: str) -> Path:
    """Write a random LLaVA of a shape."""
    text, vision = SHAPES[shape]
    config = transformers.LlavaConfig(
        text_config={"model_type": "qwen2", "max_position_embeddings": 4096, **text},
        vision_config={"model_type": "siglip_vision_model", **vision},
        image_token_index=IMAGE_ID,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(path)
    side = vision["image_size"]
    transformers.SiglipImageProcessorPil(size={"height": side, "width": side}).save_pretrained(path)
    demo = resolve_model("penstock-mini")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "processor_config.json"):
        shutil.copy(demo / name, path)
    return path


@dataclass(frozen=True, slots=True)
class Shown:
    """An image as both sides take it."""

    picture: Picture
    pixel_values: torch.Tensor


class Images:
    """Draws images of noise."""

    def __init__(self, path: Path) -> None:
        found = load_processor(path)
        assert found is not None
        self._ours, self._theirs = found, transformers.SiglipImageProcessorPil.from_pretrained(path)

    def draw(self, seed: int) -> Shown:
        """Return an image that no other seed gives."""
        noise = np.random.default_rng(seed).integers(0, 256, (480, 640, 3), dtype=np.uint8)
        image = Image.fromarray(noise)
        (prepared,) = self._ours.image(image, "auto").pictures
        pixels = prepared.pixels.tobytes()
        frames, height, width, _ = prepared.pixels.shape
        picture = Picture(
            key=hashlib.blake2b(pixels, digest_size=16).digest(),
            offset=4,
            num_tokens=prepared.num_tokens,
            pixels=pixels,
            shape=(frames, height, width),
            size=prepared.size,
        )
        return Shown(picture, self._theirs(image, return_tensors="pt")["pixel_values"])


def ask(name: str, shown: Shown | None, seed: int, num_tokens: int, question_tokens: int = 32) -> GenerateRequest:
    """Return a greedy request of four tokens, an image if there is one, and a question."""
    draw = random.Random(seed)
    question = [draw.randrange(10, 4000) for _ in range(question_tokens)]
    pictures = () if shown is None else (shown.picture,)
    image = [IMAGE_ID] * sum(picture.num_tokens for picture in pictures)
    return GenerateRequest(
        request_id=name,
        prompt_token_ids=[2, 4, 5, 6, *image, *question],
        sampling=SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True),
        pictures=pictures,
    )


def make_engine(
    path: Path, source: FeatureSource | None = None, dtype: str = "float32", quantize: str | None = None
) -> Engine:
    """Return an engine with the defaults but for 16 running sequences."""
    model = load_model(path, dtype=dtype, ops=ops_for(dtype, quantize))
    if source is None:
        found = load_vision(path, dtype)
        assert found is not None
        source = LocalEncoder(found, step_patches=SchedulerConfig().encoder_patches)
    info = engine_info(path, model, max_model_tokens=4096, encoder_cache_bytes=256 << 20)
    config = EngineConfig(scheduler=SchedulerConfig(max_running=CONCURRENCY))
    return assemble_engine(model, Tokenizer.load(resolve_model("penstock-mini")), config, info=info, source=source)


def first_token_s(engine: Engine, request: GenerateRequest) -> float:
    """Return the seconds from a request's arrival to its first token, alone."""
    began = time.perf_counter()
    engine.add(request)
    first_s = 0.0
    while engine.has_work:
        if engine.step() and not first_s:
            first_s = time.perf_counter() - began
    return first_s


def measure_repeated(engine: Engine, images: Images, pairs: int) -> dict[str, Any]:
    """Return how much sooner a second question about an image is answered than a first."""
    first_token_s(engine, ask("warm", images.draw(1), 1, 2))
    first, second = [], []
    for pair in range(pairs):
        shown = images.draw(100 + pair)
        first.append(first_token_s(engine, ask(f"first-{pair}", shown, 2 * pair, 2)))
        second.append(first_token_s(engine, ask(f"second-{pair}", shown, 2 * pair + 1, 2)))
    return {"first_s": first, "second_s": second, "ratios": _ratios(first, second)}


def run_penstock(engine: Engine, requests: Sequence[GenerateRequest], threads: int) -> float:
    """Return tokens per second."""
    use_threads(threads)
    began = time.perf_counter()
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
    return sum(request.sampling.max_tokens for request in requests) / (time.perf_counter() - began)


@torch.no_grad()
def run_transformers(model: Any, requests: Sequence[GenerateRequest], shown: Sequence[Shown], threads: int) -> float:
    """Return tokens per second of left-padded batches, each generating as many tokens as its longest answer."""
    torch.set_num_threads(threads)
    began = time.perf_counter()
    for start in range(0, len(requests), CONCURRENCY):
        batch = requests[start : start + CONCURRENCY]
        width = max(len(request.prompt_token_ids) for request in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, width - len(request.prompt_token_ids) :] = torch.tensor(request.prompt_token_ids)
            mask[row, width - len(request.prompt_token_ids) :] = 1
        longest = max(request.sampling.max_tokens for request in batch)
        model.generate(
            input_ids=ids,
            pixel_values=torch.cat([one.pixel_values for one in shown[start : start + CONCURRENCY]]),
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=longest,
            min_new_tokens=longest,
            eos_token_id=None,
            pad_token_id=0,
        )
    return sum(request.sampling.max_tokens for request in requests) / (time.perf_counter() - began)


def measure_throughput(
    engine: Engine, model: Any, images: Images, lengths: str, settings: argparse.Namespace
) -> dict[str, Any]:
    """Return tokens per second of both, by turns, after one request each that warms up."""
    ours, theirs = [], []
    first_seed = 10_000 * (1 + list(LENGTHS).index(lengths))
    warm = images.draw(first_seed - 1)
    run_penstock(engine, [ask(f"{lengths}-warm", warm, 49, 2)], settings.threads)
    run_transformers(model, [ask(f"{lengths}-warm", warm, 49, 2)], [warm], settings.threads)
    for pair in range(settings.pairs):
        draw = random.Random(pair)
        shown = [images.draw(first_seed + settings.requests * pair + i) for i in range(settings.requests)]
        requests = [
            ask(f"{lengths}-{pair}-{i}", one, 50 + i, draw.randint(*LENGTHS[lengths]), draw.randint(*LENGTHS[lengths]))
            for i, one in enumerate(shown)
        ]
        ours.append(run_penstock(engine, requests, settings.threads))
        theirs.append(run_transformers(model, requests, shown, settings.threads))
    return {"penstock": ours, "transformers": theirs, "ratios": _ratios(ours, theirs)}


def measure_stall(engine: Engine, images: Images, num_images: int) -> dict[str, float]:
    """Return the gaps between tokens of eight who decode while images come, one every eighth token."""
    news = threading.Event()
    engine.on_news(news.set)
    for i in range(8):
        engine.add(ask(f"decoding-{i}", None, 900 + i, 12 + 16 * num_images))
    gaps_s: list[float] = []
    usual_s: list[float] = []
    num_shown, num_steps, last_s = 0, 0, time.perf_counter()
    while engine.has_work or engine._requests:
        if not engine.has_work:
            news.wait()
        news.clear()
        deltas = engine.step()
        if not any(delta.request_id == "decoding-0" for delta in deltas):
            continue
        now_s = time.perf_counter()
        num_steps += 1
        if num_steps > 2:
            (gaps_s if num_shown else usual_s).append(now_s - last_s)
        last_s = now_s
        if num_steps >= 12 and num_steps % 8 == 4 and num_shown < num_images:
            engine.add(ask(f"seeing-{num_steps}", images.draw(2000 + num_steps), num_steps, 2))
            num_shown += 1
    seeing = engine.status().seeing
    assert seeing is not None
    return {
        "usual_s": statistics.median(usual_s),
        "median_beside_images_s": statistics.median(gaps_s),
        "longest_s": max(gaps_s),
        "encode_s_per_image": seeing.encode_s / seeing.num_encoded_pictures,
    }


@contextmanager
def open_pool(path: Path) -> Iterator[EncoderPool]:
    """Run one encoder process."""
    runner = RunnerConfig(dtype="float32", encoder_workers=1)
    settings = Settings(model=ModelSettings(name=str(path)), runner=runner)
    pool = EncoderPool(
        encoder.command(),
        msgspec.json.encode(settings),
        num_workers=1,
        step_bytes=settings.scheduler.encoder_patches * read_tower_shape(path).patch_bytes,
        timeout_s=settings.runner.encoder_timeout_s,
    )
    pool.start()
    try:
        yield pool
    finally:
        pool.close()


def measure(shape: str, path: Path, settings: argparse.Namespace) -> dict[str, Any]:
    """Return what is asked for of a shape."""
    images = Images(make_llava(path, shape))
    use_threads(settings.threads)
    engine = make_engine(path, dtype=settings.dtype, quantize=settings.quantize)
    result: dict[str, Any] = {"model": shape, "image_tokens": images.draw(0).picture.num_tokens}
    if "repeated" in settings.parts:
        result["repeated question"] = measure_repeated(engine, images, max(settings.pairs, 5))
    if "stall" in settings.parts:
        result["stall, encoded in the step"] = measure_stall(engine, images, NUM_STALLS)
        with open_pool(path) as pool:
            threads = share_threads(Settings(runner=RunnerConfig(encoder_workers=1)))
            use_threads(threads.few_rows, many_rows_threads=threads.many_rows)
            result["stall, one encoder process"] = measure_stall(make_engine(path, pool), images, NUM_STALLS)
    compared = [lengths for lengths in LENGTHS if lengths in settings.parts]
    if compared:
        dtype = getattr(torch, settings.dtype)
        model = transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=dtype).eval()
        for lengths in compared:
            result[f"16 at a time, {lengths} lengths, tokens per s"] = measure_throughput(
                engine, model, images, lengths, settings
            )
    return result


def _ratios(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    ratios = [one / other for one, other in zip(numerators, denominators, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def main() -> None:
    """Measure the shapes and print or write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--threads", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--quantize", choices=["int8", "int4"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = []
    for shape in arguments.models:
        with tempfile.TemporaryDirectory() as directory:
            results.append(measure(shape, Path(directory), arguments))
        print(json.dumps(results[-1], indent=2), flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit.stdout.strip(),
        "command": " ".join(["python -m benchmarks.vision", *sys.argv[1:]]),
        "machine": {"processor": processor(), "threads": arguments.threads, "kernels": describe()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "results": results,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
