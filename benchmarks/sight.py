"""What a model sees of held-out drawings, by kind of question: `python -m benchmarks.sight`.

Asks penstock-mini, or --model, in this process, each question as a chat's first, in a phrasing that was trained on and
in the one that was held out; right is the expected answer word for word. The first drawings were looked at while
penstock-mini was trained, none of those from the default on. In brackets Wilson's interval for a share, of 95%
("Probable Inference", 1927).
"""

import argparse
import asyncio
import math
from collections import defaultdict

from penstock.eval.sets.drawings import Asked, Drawing, draw
from penstock.eval.subject import Subject, each
from penstock.launch.local import open_engine
from penstock.launch.settings import ModelSettings, Settings
from training.evaluate import FIRST_DRAWING, NUM_DRAWINGS, kinds_of


async def ask(model: str, drawings: list[Drawing]) -> dict[str, list[tuple[bool, bool]]]:
    """Return, by kind, whether each question was answered right in either phrasing."""
    async with open_engine(Settings(model=ModelSettings(name=model))) as engine:
        subject = Subject(engine.client, engine.tokenizer, engine.template, engine.images)

        async def is_right(drawing: Drawing, question: str, answer: str) -> bool:
            prompt, pictures = await subject.shown(drawing.image, question)
            return (await subject.answer(prompt, max_tokens=16, pictures=pictures)).strip() == answer

        async def both(item: tuple[Drawing, Asked]) -> tuple[bool, bool]:
            drawing, asked = item
            return (
                await is_right(drawing, asked.text, asked.answer),
                await is_right(drawing, asked.held_out_text, asked.answer),
            )

        kinds, items = zip(*((kind, (one, asked)) for one in drawings for kind, asked in kinds_of(one)), strict=True)
        found = defaultdict(list)
        for kind, right in zip(kinds, await each(items, both, lambda *_: None), strict=True):
            found[kind].append(right)
        return found


def share(rights: list[bool]) -> str:
    """Return the share that is right, with its interval."""
    n, z = len(rights), 1.96
    p = sum(rights) / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return f"{p:.1%} ({low:.1%}..{high:.1%})"


def main() -> None:
    """Print a row for each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="penstock-mini")
    parser.add_argument("--first", type=int, default=FIRST_DRAWING, help="number of the first drawing")
    parser.add_argument("--count", type=int, default=NUM_DRAWINGS, help="how many drawings")
    arguments = parser.parse_args()
    drawings = [draw("held_out", number) for number in range(arguments.first, arguments.first + arguments.count)]
    found = asyncio.run(ask(arguments.model, drawings))
    print("| kind (questions) | trained phrasings | held-out phrasing |")
    print("|---|---|---|")
    for kind, rights in sorted(found.items()):
        trained, held_out = zip(*rights, strict=True)
        print(f"| {kind} ({len(rights):,}) | {share(list(trained))} | {share(list(held_out))} |")


if __name__ == "__main__":
    main()
