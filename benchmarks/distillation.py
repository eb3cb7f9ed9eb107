"""What a short distillation gives back to penstock-mini with layers removed: `python -m benchmarks.distillation`.

Each student is penstock-mini without some layers, made as `penstock compress` makes it, and then taught by the whole
model as `penstock distill` does, on the built-in texts. Perplexities are those of 24 sequences that training does not
see, with 95% bootstrap intervals over them. As a draft, each guesses up to four tokens at a time for the whole model,
which goes on greedily from the beginnings of held-out modules; the share of its guesses that come true is counted, with
what layers were removed from alone, and with the student.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from penstock.compress.calibration.texts import CalibrationOptions
from penstock.compress.distillation import Distillation, DistillOptions
from penstock.compress.recipe import parse_recipe
from penstock.compress.run import Compression, CompressOptions
from penstock.engine.config import RunnerConfig, SpeculationConfig
from penstock.engine.speculative.adaptive import DraftLengths
from penstock.engine.speculative.drafter import Offer
from penstock.eval import cut_windows, held_out_text
from penstock.eval.statistics import Estimate
from penstock.launch.engine import build_engine
from penstock.launch.settings import Settings
from penstock.models import resolve_model
from penstock.protocol import GenerateRequest, SamplingParams
from penstock.text.tokenizer import Tokenizer

_NUM_PROMPTS, _PROMPT_TOKENS, _ANSWER_TOKENS = 24, 64, 64


class _Always(DraftLengths):
    """Guesses as far as may be, whether it pays or not."""

    def choose(self, num_sequences: int, offers: Sequence[Offer], most_tokens: int) -> list[int]:
        return [min(offer.most, most_tokens) for offer in offers]


@torch.inference_mode()
def acceptance(draft: Path) -> tuple[int, int]:
    """Return how many tokens ``draft`` guessed for penstock-mini, and how many came true."""
    speculation = SpeculationConfig(method="draft", model=str(draft), max_tokens=4)
    engine = build_engine(Settings(runner=RunnerConfig(threads=1), speculation=speculation))
    assert engine._speculator is not None
    engine._speculator.lengths = _Always()
    tokenizer = Tokenizer.load(resolve_model("penstock-mini"))
    windows = cut_windows(held_out_text(), tokenizer, window=_PROMPT_TOKENS).windows
    spread = windows[:: max(len(windows) // _NUM_PROMPTS, 1)][:_NUM_PROMPTS]
    sampling = SamplingParams(max_tokens=_ANSWER_TOKENS, temperature=0.0, ignore_eos=True)
    for number, window in enumerate(spread):
        engine.add(GenerateRequest(request_id=str(number), prompt_token_ids=list(window), sampling=sampling))
        while engine.has_work:
            for delta in engine.step():
                assert delta.error is None, delta.error
    counters = engine._speculator.counters
    return counters.num_draft_tokens, counters.num_accepted_tokens


def measure(fewer: int, steps: int, work: Path) -> None:
    """Print a row on penstock-mini with so many layers fewer."""
    teacher, shorter, student = resolve_model("penstock-mini"), work / "shorter", work / "student"
    recipe = parse_recipe(f"remove: {{layers: {fewer}}}")
    calibration = CalibrationOptions(num_samples=32)
    Compression(CompressOptions(model=teacher, out=shorter, recipe=recipe, calibration=calibration)).run()
    texts = CalibrationOptions(num_samples=4000, length=128)
    options = DistillOptions(student=shorter, teacher=teacher, out=student, texts=texts, steps=steps)
    result = Distillation(options).run()
    accepted = " | ".join(f"{good / max(made, 1):.0%} of {made}" for made, good in map(acceptance, (shorter, student)))
    print(
        f"| {fewer} | {_interval(result.before)} | {_interval(result.after)} | {_interval(result.teacher)} | "
        f"{_interval(result.recovered, '.0%')} | {accepted} | {result.seconds:.0f} |",
        flush=True,
    )


def _interval(estimate: Estimate, form: str = ".1f") -> str:
    assert estimate.low is not None
    assert estimate.high is not None
    return f"{estimate.value:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--fewer", type=int, nargs="*", default=[2, 4], help="layers removed, of six")
    options = parser.parse_args()
    print("| layers fewer | before | after | teacher | recovered | accepted before | after | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for fewer in options.fewer:
        with tempfile.TemporaryDirectory() as work:
            measure(fewer, options.steps, Path(work))


if __name__ == "__main__":
    main()
