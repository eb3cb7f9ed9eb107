"""What compressing each part of a model that sees costs: `python -m benchmarks.compression_seeing`.

penstock-mini, whose parts are treated one at a time and as `vlm-mixed` does, calibrated with texts and with drawings it
was trained on. Each line is made by `penstock compress` and `penstock eval`, as a user would: perplexity on held-out
source, and right answers to one question about each of the held-out drawings. Intervals are those of the report.
"""

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.compression_table import run
from penstock.eval.sets.drawings import draw

_PART = "steps: [{{match: {part}, method: {method}, bits: {bits}{group}}}]"


@dataclass(frozen=True, slots=True)
class Case:
    """A line of the table."""

    name: str
    recipe: str
    """A named one, or a file's text"""
    sees_drawings: bool = False
    """Whether it is calibrated with drawings"""


CASES = (
    Case("vision encoder 8 bits", _PART.format(part="vision_encoder", method="rtn", bits=8, group="")),
    Case("vision encoder 4 bits g32", _PART.format(part="vision_encoder", method="rtn", bits=4, group=", group: 32")),
    Case("projector 8 bits", _PART.format(part="projector", method="rtn", bits=8, group="")),
    Case("projector 4 bits g32", _PART.format(part="projector", method="rtn", bits=4, group=", group: 32")),
    Case("decoder gptq 4 bits g128", _PART.format(part="decoder", method="gptq", bits=4, group=", group: 128")),
    Case("`vlm-mixed`", "vlm-mixed"),
    Case("`vlm-mixed`, shown drawings", "vlm-mixed", sees_drawings=True),
)


def write_drawings(directory: Path, num: int) -> Path:
    """Write calibration pairs: drawings of the training split, a question about each and its answer."""
    lines = []
    for number in range(num):
        drawing = draw("training", number)
        file = directory / f"{number}.png"
        drawing.image.save(file)
        asked = drawing.questions[0]
        content = [{"type": "image", "image": str(file)}, {"type": "text", "text": asked.text}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": asked.answer}]
        lines.append(json.dumps({"messages": messages}))
    # Chats about drawings are short, and the decoder has text to say as well.
    source = Path(json.__file__).parent.parent
    texts = [(source / name).read_text(encoding="utf-8") for name in ("textwrap.py", "os.py", "shutil.py", "heapq.py")]
    lines += [json.dumps({"text": text[start : start + 2000]}) for text in texts for start in range(0, len(text), 2000)]
    file = directory / "calibration.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=200, help="drawings, and windows of source")
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences")
    options = parser.parse_args()
    print("| treated | perplexity | increase | right about drawings | of the original's | MB |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        drawings = write_drawings(work, options.samples)
        for number, case in enumerate(CASES):
            recipe = case.recipe
            if ":" in recipe:
                (work / "recipe.yaml").write_text(recipe, encoding="utf-8")
                recipe = str(work / "recipe.yaml")
            shown = ["--calibration", str(drawings), "--force"] if case.sees_drawings else []
            out = work / str(number)
            words = ["--recipe", recipe, "--samples", str(options.samples), *shown]
            report = run("compress", "penstock-mini", "--out", out, *words).answer["report"]
            tasks = ["--task", "source", "--task", "drawings", "--limit", str(options.limit)]
            found = run("eval", out, "--against", "penstock-mini", *tasks, "--within", "loss=1000%").answer
            figures = {(task["name"], one["name"]): one for task in found["tasks"] for one in task["figures"]}
            perplexity, right = figures["source", "token_perplexity"], figures["drawings", "exact_match"]
            grown = perplexity["increase"]
            print(
                f"| {case.name} | {perplexity['candidate']['value']:.2f} | {grown['value']:+.2%} "
                f"({grown['low']:+.2%} to {grown['high']:+.2%}) | {right['candidate']['value']:.1%} | "
                f"{right['reference']['value']:.1%} | {report['bytes_after'] / 1e6:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
