"""`penstock distill`: show who learns from whom, train, show what came out."""

import json
import sys
from dataclasses import asdict

from rich.console import Console

from penstock.cli.compress import progress_bars, use_all_threads
from penstock.compress.distillation import NUM_JUDGED, Distillation, Distilled, DistillOptions
from penstock.eval.statistics import Estimate
from penstock.units import format_bytes, format_duration


def run_distill(options: DistillOptions, *, as_json: bool) -> int:
    """Distill and return the exit status. Text and progress go to stderr where JSON goes to stdout."""
    use_all_threads()
    console = Console(stderr=as_json)
    distillation = Distillation(options)
    texts = distillation.texts
    console.print(
        f"texts        {len(texts.sequences)} sequences, {texts.num_tokens:,} tokens, {NUM_JUDGED} sequences to judge "
        f"by; {texts.source}",
        highlight=False,
    )
    console.print(f"estimate     {format_bytes(distillation.memory_bytes)} of memory, and activations", highlight=False)
    with progress_bars() as progress:
        result = distillation.run(progress)
    _show(result, options, console)
    if as_json:
        sys.stdout.write(json.dumps(asdict(result), indent=2) + "\n")
    return 0


def _show(result: Distilled, options: DistillOptions, console: Console) -> None:
    if result.first_step:
        console.print(f"went on from step {result.first_step}", highlight=False)
    console.print(
        f"perplexity   {_interval(result.before)} before, {_interval(result.after)} after; the teacher's "
        f"{_interval(result.teacher)}",
        highlight=False,
    )
    console.print(
        f"KL           {_interval(result.kl_before)} before, {_interval(result.kl_after)} after", highlight=False
    )
    console.print(f"recovered    {_interval(result.recovered, '.0%')} of the loss between student and teacher")
    console.print(
        f"written      {options.out}, in {format_duration(result.seconds)}; read back, logits within "
        f"{result.largest_difference:.1g} of what was trained",
        highlight=False,
    )


def _interval(estimate: Estimate, form: str = ".3f") -> str:
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:{form}}"
    return f"{estimate.value:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"
