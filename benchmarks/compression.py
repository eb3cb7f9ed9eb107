"""What compressing penstock-mini costs, on held-out source: `python -m benchmarks.compression`.

Each recipe is run as `penstock compress` runs it, with the built-in calibration set; what was written is read back and
read the held-out modules of the running Python's standard library, as `training/` splits them, in windows of 512
tokens, in float32. Intervals are 95% paired bootstrap intervals over windows: of the increase over the original, and of
the difference from rounding to nearest with the same bits, group and symmetry, or from zeros by magnitude. ``auto at
NAME`` is the recipe found for the size of the recipe NAME, which has to be measured before it, and its difference is
that from NAME.
"""

import argparse
import json
import math
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from penstock.cli.compress import use_all_threads
from penstock.compress.auto.search import Goal, Search
from penstock.compress.calibration.texts import CalibrationOptions
from penstock.compress.recipe import NAMED, Recipe, Step, parse_recipe
from penstock.compress.run import Compression, CompressOptions
from penstock.eval import cut_windows, held_out_text, window_nats
from penstock.eval.statistics import Estimate, Metric, Table, paired_increase
from penstock.models import resolve_model
from penstock.models.decoder import load_model
from penstock.text.tokenizer import Tokenizer

WINDOW = 512
PERPLEXITY = Metric("perplexity", lambda sums: np.exp(sums[..., 0] / sums[..., 1]), better="lower")


def _uniform(method: str, bits: int, group: int | None, *, symmetric: bool) -> Recipe:
    return Recipe(steps=[Step(match="decoder", method=method, bits=bits, group=group, symmetric=symmetric)])  # type: ignore[arg-type]


RECIPES: dict[str, Recipe] = {
    **{
        f"{method} {bits} bits g{group}{'' if symmetric else ' asymmetric'}": _uniform(
            method, bits, group, symmetric=symmetric
        )
        for bits, group, symmetric in ((4, 128, True), (4, 128, False), (3, 128, True), (3, 128, False))
        for method in ("rtn", "gptq", "awq")
    },
    **{
        f"{method} {kind}": parse_recipe(f"steps: [{{match: decoder, method: {method}, {setting}}}]")
        for kind, setting in (("50%", "sparsity: 0.5"), ("2:4", "pattern: '2:4'"))
        for method in ("magnitude", "wanda", "sparsegpt")
    },
    **{f"{n} layers fewer": parse_recipe(f"remove: {{layers: {n}}}") for n in (1, 2)},
    **{
        f"{share:.1%} of channels fewer": parse_recipe(f"remove: {{channels: {share}}}") for share in (0.125, 0.25, 0.5)
    },
    "50.0% of heads fewer": parse_recipe("remove: {heads: 0.5}"),
    **{
        f"svd {size:.0%}": parse_recipe(f"steps: [{{match: decoder, method: svd, size: {size}}}]")
        for size in (0.9, 0.7)
    },
    **{
        f"w8a8-smooth static {observer}{' with zeros' if zeros else ''}": parse_recipe(
            "steps: [{match: decoder, method: rtn, bits: 8, group: null, smooth: 0.5, activations: static, "
            f"observer: {observer}, activation_zeros: {str(zeros).lower()}}}]"
        )
        for observer in ("min-max", "percentile", "mse")
        for zeros in (False, True)
    },
    **{
        f"gptq 4 bits g128 and embeddings {codes}": parse_recipe(
            f"steps: [{{match: decoder, method: gptq}}, {{match: embeddings, method: rtn, {codes}}}]"
        )
        for codes in ("bits: 8, group: null", "bits: 4, group: 32")
    },
    "int8": NAMED["int8"],
    "w8a8-smooth": NAMED["w8a8-smooth"],
}
AUTO = "auto at "
NAMES = (*RECIPES, *(f"{AUTO}{name}" for name in RECIPES if name.startswith("gptq")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One recipe's figures."""

    recipe: str
    perplexity: float
    increase: Estimate | None
    """Over the original, as a share"""
    over_baseline: Estimate | None
    """Over rounding with the same bits, zeros by magnitude, or what a found recipe is as large as"""
    weights_bytes: int
    seconds: float


def _nats(path: Path, num_windows: int) -> Table:
    """Return [windows, 2]: nats and predicted tokens of each."""
    model = load_model(path, dtype="float32")
    cut = cut_windows(held_out_text(), Tokenizer.load(path), window=WINDOW)
    nats = window_nats(model, cut.windows[:num_windows])
    return np.array([(value, cut.num_predicted) for value in nats])


def _perplexity(table: Table) -> float:
    return math.exp(table[:, 0].sum() / table[:, 1].sum())


def measure(num_windows: int, num_samples: int, names: list[str]) -> list[Row]:
    """Return a row for each recipe, the original first."""
    original = resolve_model("penstock-mini")
    reference = _nats(original, num_windows)
    size = (original / "model.safetensors").stat().st_size
    rows = [
        Row(
            recipe="none",
            perplexity=_perplexity(reference),
            increase=None,
            over_baseline=None,
            weights_bytes=size,
            seconds=0,
        )
    ]
    measured: dict[str, tuple[Table, int]] = {}
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "model"
            like = name.removeprefix(AUTO)
            options = CompressOptions(
                model=original, out=out, recipe=RECIPES[like], calibration=CalibrationOptions(num_samples=num_samples)
            )
            start = time.perf_counter()
            if like != name:
                found = Search(options, Goal(target_bytes=measured[like][1])).run()
                options = replace(options, recipe=found.recipe)
            report = Compression(options).run()
            seconds = time.perf_counter() - start
            table = _nats(out, num_windows)
        measured[name] = table, report.bytes_after
        method, _, kind = name.partition(" ")
        zeros = method in ("magnitude", "wanda", "sparsegpt")
        baseline = like if like != name else f"{'magnitude' if zeros else 'rtn'} {kind}"
        rows.append(
            Row(
                recipe=name,
                perplexity=_perplexity(table),
                increase=paired_increase(table, reference, PERPLEXITY),
                over_baseline=paired_increase(table, measured[baseline][0], PERPLEXITY)
                if baseline in measured and baseline != name
                else None,
                weights_bytes=report.bytes_after,
                seconds=seconds,
            )
        )
        print(_line(rows[-1]), flush=True)
    return rows


def _line(row: Row) -> str:
    def share(value: Estimate | None) -> str:
        return "" if value is None else f"{value.value:+.2%} ({value.low:+.2%} to {value.high:+.2%})"

    megabytes = row.weights_bytes / 1e6
    return (
        f"| {row.recipe} | {row.perplexity:.3f} | {share(row.increase)} | {share(row.over_baseline)} | "
        f"{megabytes:.2f} | {row.seconds:.0f} |"
    )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--recipes", nargs="*", default=list(NAMES), choices=NAMES)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    use_all_threads()
    print("| recipe | perplexity | increase | over baseline | MB | seconds |\n|---|---|---|---|---|---|")
    rows = measure(options.windows, options.samples, options.recipes)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    print(f"\nThe original: {rows[0].perplexity:.3f}, {rows[0].weights_bytes / 1e6:.2f} MB; torch {torch.__version__}")


if __name__ == "__main__":
    main()
