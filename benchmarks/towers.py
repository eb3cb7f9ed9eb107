"""Qwen2-VL's and Qwen2.5-VL's vision towers, ours beside transformers': `python -m benchmarks.towers`.

16 images at once, of one size and of eight, on random float32 weights, pixels prepared beforehand, by turns on the same
threads; ours cuts and normalizes pixels too. Ratios are taken within a turn, ours below; a first turn is dropped.
Beside seconds stand the processor's, which others on the machine change less.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from penstock.kernels import describe, use_threads
from penstock.models.vision.load import load_vision
from penstock.protocol import Picture

SHAPES: dict[str, tuple[int, int, int]] = {"tiny": (64, 3, 4), "0.5b": (768, 4, 12)}
"""Width, layers and heads; the latter a tower beside a decoder of Qwen2.5-0.5B's width, with fewer layers"""
GRIDS = {"one size": [(8, 8)] * 16, "eight sizes": [(6 + i, 11 - i) for i in range(8)] * 2}
"""Rows and columns of tokens, each 28 x 28 pixels"""
NORMALIZATION = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "rescale_factor": 1 / 255}


def save(path: Path, family: str, shape: str) -> Any:
    """Write a checkpoint to ``path`` and return transformers' model of its tower."""
    width, num_layers, num_heads = SHAPES[shape]
    text = {"vocab_size": 400, "hidden_size": 896, "intermediate_size": 64, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 14, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    vision: dict[str, Any] = {"depth": num_layers, "num_heads": num_heads}
    if family == "Qwen2VL":
        vision |= {"embed_dim": width, "hidden_size": 896}
    else:
        vision |= {"hidden_size": width, "out_hidden_size": 896, "intermediate_size": width * 8 // 3}
        vision |= {"fullatt_block_indexes": [num_layers - 1]}
    ids = {"image_token_id": 300, "video_token_id": 301}
    config = getattr(transformers, f"{family}Config")(
        text_config={**text, "rope_parameters": rope}, vision_config=vision, **ids
    )
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    model.save_pretrained(path)
    transformers.Qwen2VLImageProcessorPil(**NORMALIZATION).save_pretrained(path)
    return model.model.visual


def pictures_of(grids: list[tuple[int, int]]) -> tuple[list[Picture], dict[str, torch.Tensor]]:
    """Return images of these sizes for ours, and as many of no content for transformers."""
    pictures = []
    for rows, columns in grids:
        pixels = np.random.default_rng(0).integers(0, 256, (1, rows * 28, columns * 28, 3), dtype=np.uint8)
        pictures.append(
            Picture(
                key=b"",
                offset=0,
                num_tokens=rows * columns,
                pixels=pixels.tobytes(),
                shape=(1, rows * 28, columns * 28),
                size=(rows * 28, columns * 28),
                grid=(1, rows, columns),
            )
        )
    num_patches = 4 * sum(rows * columns for rows, columns in grids)
    in_patches = torch.tensor([(1, 2 * rows, 2 * columns) for rows, columns in grids])
    return pictures, {"hidden_states": torch.randn(num_patches, 3 * 2 * 14 * 14), "grid_thw": in_patches}


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Return seconds and the processor's seconds of a call."""
    began, busy = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - busy


@torch.inference_mode()
def main() -> None:
    """Print a row for each tower, shape and set of images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{describe()}, {arguments.threads} threads, transformers {transformers.__version__}\n")
    print("| tower | shape | images | transformers, ms | ours, ms | ratio | of processor time | from..to |")
    print("|---|---|---|---|---|---|---|---|")
    for family in ("Qwen2VL", "Qwen2_5_VL"):
        for shape in SHAPES:
            with tempfile.TemporaryDirectory() as folder:
                theirs, ours = save(Path(folder), family, shape), load_vision(Path(folder), "float32")
            assert ours is not None
            for name, grids in GRIDS.items():
                pictures, inputs = pictures_of(grids)
                turns = []
                for _ in range(arguments.turns + 1):
                    torch.set_num_threads(arguments.threads)
                    upstream = seconds(partial(theirs, **inputs))
                    use_threads(arguments.threads)
                    own = seconds(partial(ours.encode, pictures))
                    turns.append((*upstream, *own))
                _, *kept = turns
                busy = [upstream / own for _, upstream, _, own in kept]
                middle = [statistics.median(column) * 1e3 for column in zip(*kept, strict=True)]
                ratio = statistics.median(upstream / own for upstream, _, own, _ in kept)
                print(
                    f"| {family} | {shape} | {name} | {middle[0]:.0f} | {middle[2]:.0f} | {ratio:.2f} | "
                    f"{statistics.median(busy):.2f} | {min(busy):.2f}..{max(busy):.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
