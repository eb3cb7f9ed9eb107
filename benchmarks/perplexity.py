"""What precisions cost: perplexity of penstock-mini on held-out source: `python -m benchmarks.perplexity`.

The text of `penstock eval --task source` in windows of 512 tokens, read by models without an engine around them.
"""

import argparse

from penstock.eval import TextWindows, cut_windows, held_out_text, perplexity
from penstock.kernels import QUANTIZATIONS, Ops, ops_for
from penstock.models import resolve_model
from penstock.models.decoder import load_model
from penstock.text import Tokenizer

WINDOW = 512
PRECISIONS: dict[str, tuple[str, str, Ops]] = {
    "float32": ("float32", "auto", ops_for("float32")),
    "bfloat16 weights and cache (the checkpoint's own)": ("bfloat16", "auto", ops_for("bfloat16")),
    "bfloat16 weights, int8 cache": ("bfloat16", "int8", ops_for("bfloat16")),
} | {
    f"{name}, {kv_dtype} cache": ("bfloat16", kv_dtype, ops_for("bfloat16", name))
    for name in QUANTIZATIONS
    for kv_dtype in ("bfloat16", "int8")
}


def perplexity_in(dtype: str, kv_dtype: str, ops: Ops, cut: TextWindows, num_windows: int) -> float:
    """Return the perplexity over the first windows of the text."""
    model = load_model(resolve_model("penstock-mini"), dtype=dtype, kv_dtype=kv_dtype, ops=ops)
    return perplexity(model, cut, limit=num_windows)


def main() -> None:
    """Print a row for each precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=256)
    num_windows = parser.parse_args().windows
    cut = cut_windows(held_out_text(), Tokenizer.load(resolve_model("penstock-mini")), window=WINDOW)
    print("| precision | perplexity |\n|---|---|")
    for name, (dtype, kv_dtype, ops) in PRECISIONS.items():
        print(f"| {name} | {perplexity_in(dtype, kv_dtype, ops, cut, num_windows):.3f} |", flush=True)


if __name__ == "__main__":
    main()
