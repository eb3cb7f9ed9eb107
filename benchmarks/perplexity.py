"""What precisions cost: perplexity of penstock-mini on held-out source: `python -m benchmarks.perplexity`.

The held-out modules of the running Python's standard library, as `training/` splits them, in windows of 512 tokens.
"""

import argparse
import math

import torch
import torch.nn.functional as F

from penstock.kernels import QUANTIZATIONS, Ops, ReferenceOps, ops_for
from penstock.models import resolve_model
from penstock.models.decoder import load_model
from tests.packing import layout_of
from training.corpus import library_root, split_documents
from training.tokenizer import ChatEncoder, load_tokenizer

WINDOW = 512
PRECISIONS: dict[str, tuple[str, str, Ops]] = {
    "float32, torch reference": ("float32", "auto", ReferenceOps()),
    "float32": ("float32", "auto", ops_for(torch.float32)),
    "bfloat16 weights and cache (the checkpoint's own)": ("bfloat16", "auto", ops_for(torch.bfloat16)),
    "bfloat16 weights, int8 cache": ("bfloat16", "int8", ops_for(torch.bfloat16)),
} | {
    f"{name}, {kv_dtype} cache": ("bfloat16", kv_dtype, ops_for(torch.bfloat16, name))
    for name in QUANTIZATIONS
    for kv_dtype in ("bfloat16", "int8")
}


@torch.inference_mode()
def perplexity(dtype: str, kv_dtype: str, ops: Ops, num_windows: int) -> float:
    """Return the perplexity over the first windows of the held-out source."""
    path = resolve_model("penstock-mini")
    model = load_model(path, dtype=dtype, kv_dtype=kv_dtype, ops=ops)
    _, held_out = split_documents(library_root())
    ids = ChatEncoder(load_tokenizer(path / "tokenizer.json")).documents([document.text for document in held_out])
    cache = model.new_cache(WINDOW // 16, 16)
    layout = layout_of([WINDOW], [WINDOW], [list(range(WINDOW // 16))], 16)
    losses = []
    for start in range(0, min(num_windows * WINDOW, len(ids) - WINDOW), WINDOW):
        window = torch.from_numpy(ids[start : start + WINDOW]).long()
        logits = model.logits(model.forward(window, layout, cache))
        losses.append(F.cross_entropy(logits[:-1], window[1:]).item())
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    """Print a row for each precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=256)
    num_windows = parser.parse_args().windows
    print("| precision | perplexity |\n|---|---|")
    for name, (dtype, kv_dtype, ops) in PRECISIONS.items():
        print(f"| {name} | {perplexity(dtype, kv_dtype, ops, num_windows):.3f} |", flush=True)


if __name__ == "__main__":
    main()
