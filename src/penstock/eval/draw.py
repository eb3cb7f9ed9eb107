"""Save drawings that penstock-mini was not trained on: ``python -m penstock.eval.draw drawings --count 3``."""

import argparse
import signal
import sys
from pathlib import Path

from penstock.eval.sets.drawings import draw


def main() -> None:
    """Write PNG files, and print for each what can be asked about it and the right answers."""
    # Whoever reads the questions may stop, as head does.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    parser = argparse.ArgumentParser(description="Save drawings that penstock-mini was not trained on, with questions.")
    parser.add_argument("out", type=Path, help="directory, made if missing")
    parser.add_argument("--count", type=int, default=3, help="how many  (default: 3)")
    parser.add_argument("--first", type=int, default=0, help="the number of the first  (default: 0)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for number in range(arguments.first, arguments.first + arguments.count):
        drawing = draw("held_out", number)
        file = arguments.out / f"{number}.png"
        drawing.image.save(file)
        asked = "".join(f"\n  {one.text} {one.answer}" for one in drawing.questions)
        sys.stdout.write(f"{file}{asked}\n")


if __name__ == "__main__":
    main()
