"""What encoding the largest image takes, in a process of its own, beside what the memory plan has for it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from penstock.images.config import ImageConfig
from penstock.images.families import load_processor
from penstock.images.reader import _picture
from penstock.images.shown import Detail
from tests.kernels.backends import needs_native

_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 400,
}
_MEASURE = """
import ctypes, json, sys
from pathlib import Path
import msgspec, torch
from penstock.engine.runner.encoder import LocalEncoder
from penstock.images.families import load_processor
from penstock.launch.engine import encoding_bytes
from penstock.kernels import use_threads
from penstock.launch.settings import RunnerConfig, Settings
from penstock.models.vision.load import load_vision
from penstock.protocol import Picture

def kib(*names):
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return [int(lines[name].split()[0]) for name in names]

path = Path(sys.argv[1])
small, large = (msgspec.msgpack.decode(Path(file).read_bytes(), type=Picture) for file in sys.argv[2:])
use_threads(2)
source = LocalEncoder(load_vision(path, "float32"), step_patches=512)
planned = encoding_bytes(Settings(runner=RunnerConfig(threads=2)), path, "float32")

def encode(number, picture):
    source.submit([(number, picture)])
    while source.is_behind:
        source.submit([])
    return source.take()

def measure(number):
    (before,) = kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    ((_, features),) = encode(number, large)
    return 1024 * (kib("VmHWM")[0] - before), features.nbytes

encode(0, small)
most, features = measure(1)
# What was left free hides what is taken of it, and here a small image is as large as any for some towers.
ctypes.CDLL(None).malloc_trim(0)
taken, _ = measure(2)
print(json.dumps([most, taken, planned, features]))
"""


def _write_qwen(path: Path) -> None:
    vision = {"depth": 2, "embed_dim": 256, "hidden_size": 64, "num_heads": 4}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
    config = transformers.Qwen2VLConfig(
        text_config={**_TEXT, "num_key_value_heads": 2, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=300,
        video_token_id=301,
    )
    transformers.Qwen2VLForConditionalGeneration(config).save_pretrained(path)
    # As the published checkpoints have it.
    transformers.Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 12_845_056}).save_pretrained(
        path
    )


def _write_siglip(path: Path) -> None:
    vision: dict[str, Any] = {"model_type": "siglip_vision_model", "image_size": 896, "patch_size": 14}
    vision |= {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Gemma3Config(
        text_config={**_TEXT, "num_key_value_heads": 2, "head_dim": 32},
        vision_config=vision,
        mm_tokens_per_image=256,
        image_token_index=300,
    )
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(path)
    transformers.Gemma3ImageProcessorPil(size={"height": 896, "width": 896}).save_pretrained(path)


def _write_llava_next(path: Path) -> None:
    vision = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, "hidden_size": 192}
    vision |= {"intermediate_size": 768, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.LlavaNextConfig(
        text_config={"model_type": "llama", **_TEXT}, vision_config=vision, image_token_index=300
    )
    transformers.LlavaNextForConditionalGeneration(config).save_pretrained(path)
    sizes = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    transformers.LlavaNextImageProcessorPil(**sizes).save_pretrained(path)


def _write_picture(path: Path, file: Path, side: int, detail: Detail) -> None:
    processor = load_processor(path)
    assert processor is not None
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    picture = processor.image(Image.fromarray(noise), detail).pictures[0]
    assert picture.pixels[0].size <= 3 * processor.most_pixels
    assert len(picture.pixels) <= processor.most_tiles
    file.write_bytes(msgspec.msgpack.encode(_picture(picture, "")))


@pytest.mark.parametrize("kernels", [pytest.param("auto", marks=needs_native), "reference"])
@pytest.mark.parametrize("write", [_write_qwen, _write_siglip, _write_llava_next])
def test_encoding_the_largest_image_stays_within_the_plan(write: Any, kernels: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    write(tmp_path)
    most = ImageConfig().max_seen_pixels
    side = int(most**0.5)
    files = [tmp_path / name for name in ("small", "large")]
    _write_picture(tmp_path, files[0], 56, "low")
    _write_picture(tmp_path, files[1], 2 * side, "high")
    command = [sys.executable, "-c", _MEASURE, str(tmp_path), *map(str, files)]
    chosen = {} if kernels == "auto" else {"PENSTOCK_KERNELS": kernels}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | chosen)
    assert done.returncode == 0, done.stderr
    most, taken, planned, features = json.loads(done.stdout.splitlines()[-1])
    assert most <= planned + features
    assert planned < 5 * taken, "a plan that sets much more aside serves fewer"
