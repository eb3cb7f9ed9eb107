"""One large image in an engine's process: `python -m benchmarks.long_image`.

A Qwen2-VL of random float32 weights: a decoder of Qwen2.5-0.5B's shape, and a tower of 12 layers of width 768.

- how long eight who decode wait at most for a token beside an image, encoded in one step and in slices of
  `--encoder-patches`, by turns on the same threads; then the prompt's own chunks, which both have alike;
- what encoding the largest image that is shown takes at its peak, beside what the memory plan sets aside for it.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import transformers

from benchmarks.vision import SHAPES, ask
from benchmarks.vs_transformers import engine_info
from penstock.engine.assemble import assemble_engine
from penstock.engine.config import EngineConfig, RunnerConfig, SchedulerConfig
from penstock.engine.engine import Engine
from penstock.engine.runner.encoder import LocalEncoder
from penstock.images.config import ImageConfig
from penstock.kernels import describe, use_threads
from penstock.launch.engine import encoding_bytes
from penstock.launch.settings import Settings
from penstock.models import resolve_model
from penstock.models.decoder import load_model
from penstock.models.vision import VisionEncoder
from penstock.models.vision.load import load_vision
from penstock.protocol import GenerateRequest, Picture
from penstock.text import Tokenizer

IMAGE_ID = 1
SIDE = 28
"""Pixels of a token"""


def make_qwen2_vl(path: Path) -> Path:
    """Write a checkpoint."""
    text, _ = SHAPES["0.5b"]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    config = transformers.Qwen2VLConfig(
        text_config={**text, "max_position_embeddings": 4096, "rope_parameters": rope},
        vision_config={"depth": 12, "embed_dim": 768, "hidden_size": text["hidden_size"], "num_heads": 12},
        image_token_id=IMAGE_ID,
        video_token_id=2,
    )
    torch.manual_seed(0)
    transformers.Qwen2VLForConditionalGeneration(config).save_pretrained(path)
    # As the published checkpoints have it, so that it is the setting that bounds images.
    transformers.Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 12_845_056}).save_pretrained(
        path
    )
    return path


def image_of(rows: int, columns: int, seed: int = 0) -> Picture:
    """Return an image of so many tokens, of noise."""
    shape = (1, rows * SIDE, columns * SIDE)
    pixels = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    return Picture(
        key=f"{seed}".encode(),
        offset=4,
        num_tokens=rows * columns,
        pixels=pixels.tobytes(),
        shape=shape,
        size=shape[1:],
        grid=(1, rows, columns),
    )


def question(name: str, picture: Picture) -> GenerateRequest:
    """Return a request of two tokens about an image."""
    text = ask(name, None, 1, 2)
    first, rest = text.prompt_token_ids[:4], text.prompt_token_ids[4:]
    prompt = [*first, *[IMAGE_ID] * picture.num_tokens, *rest]
    return msgspec.structs.replace(text, prompt_token_ids=prompt, pictures=(picture,))


def longest_gaps_s(path: Path, encoder: VisionEncoder, step_patches: int | None, picture: Picture) -> dict[str, Any]:
    """Return what eight who decode wait for a token at most: usually, and while an image is encoded or read."""
    model = load_model(path, dtype="float32")
    source = LocalEncoder(encoder, step_patches=step_patches)
    info = engine_info(path, model, max_model_tokens=4096, encoder_cache_bytes=256 << 20)
    config = EngineConfig(scheduler=SchedulerConfig(max_running=16))
    tokenizer = Tokenizer.load(resolve_model("penstock-mini"))
    engine: Engine = assemble_engine(model, tokenizer, config, info=info, source=source)
    for i in range(8):
        engine.add(ask(f"decoding-{i}", None, 900 + i, 2000))
    usual: list[float] = []
    encoding: list[float] = []
    reading: list[float] = []
    for _ in range(8):
        began = time.perf_counter()
        engine.step()
        usual.append(time.perf_counter() - began)
    engine.add(question("seeing", picture))
    while "seeing" in engine._requests:
        before = source.counters.seconds
        began = time.perf_counter()
        deltas = engine.step()
        assert any(delta.request_id == "decoding-0" for delta in deltas)
        (reading if source.counters.seconds == before else encoding).append(time.perf_counter() - began)
    return {
        "usual_s": statistics.median(usual[2:]),
        "longest_encoding_s": max(encoding),
        "longest_reading_s": max(reading),
        "encoding_steps": len(encoding),
        "encode_s": source.counters.seconds,
    }


def measure_peak(path: Path, encoder: VisionEncoder, threads: int) -> dict[str, int]:
    """Return bytes of the plan, and of this process's high-water mark while it encodes the largest image."""
    settings = Settings(runner=RunnerConfig(threads=threads))
    num_tokens = ImageConfig().max_seen_pixels // SIDE**2
    picture = image_of(32, num_tokens // 32)
    encoder.encode([image_of(2, 2)])
    before = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    (features,) = encoder.encode([picture])
    return {
        "tokens": num_tokens,
        "peak_bytes": _status_bytes("VmHWM") - before,
        "planned_bytes": encoding_bytes(settings, path, "float32") + features.nbytes,
    }


def _status_bytes(name: str) -> int:
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=3)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--rows", type=int, default=32, help="rows of tokens, and columns, of the image beside others")
    arguments = parser.parse_args()
    print(f"{describe()}, {arguments.threads} threads")
    with tempfile.TemporaryDirectory() as folder:
        path = make_qwen2_vl(Path(folder))
        use_threads(arguments.threads)
        encoder = load_vision(path, "float32")
        assert encoder is not None
        print(json.dumps(measure_peak(path, encoder, arguments.threads)), flush=True)
        for turn in range(arguments.turns):
            picture = image_of(arguments.rows, arguments.rows, turn)
            for step_patches in (None, SchedulerConfig().encoder_patches):
                gaps = longest_gaps_s(path, encoder, step_patches, picture)
                print(json.dumps({"step_patches": step_patches, **gaps}), flush=True)


if __name__ == "__main__":
    main()
