"""Peak memory against what cannot be done without: `python -m benchmarks.memory --out FILE`.

Starts `penstock serve` in each precision, asks for a first token, then fills the cache to its last block with distinct
prompts. Beside the peaks stand the bytes of weights in memory and of the cache, as the server plans them, and what the
processes would take without a model: an interpreter that imported what the API's process, and the engine's, import.
"""

import argparse
import asyncio
import json
import random
import signal
import subprocess
import sys
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.adapters.penstock import PRECISIONS, Penstock
from benchmarks.peers.machine import describe_machine, source_commit
from benchmarks.peers.model import SHAPES, make_model, prompt_token_ids
from benchmarks.peers.peer import REPOSITORY, Limits
from benchmarks.peers.running import Running
from penstock.bench import BenchRequest

_MAX_MODEL_TOKENS = 4096
_IMPORTS = {
    "API": "import penstock.launch.serve, penstock.launch.server, penstock.server.app, penstock.launch.text, uvicorn",
    "engine": "from penstock.lean_torch import defer_torch; defer_torch(); import penstock.launch.engine",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One precision; all in bytes."""

    precision: str
    weights: int
    cache: int
    activations: int
    """The most that a step may work in, as the server plans it"""
    first_token_peak: int
    """All processes, when the first token came."""
    peaks: list[int]
    """Of each process with its cache full, the API's first."""

    @property
    def ratio(self) -> float:
        """Peak with the cache full over weights and cache."""
        return sum(self.peaks) / (self.weights + self.cache)


async def measure(precision: str, model: Path, token_ids: range, limits: Limits) -> Measured:
    """Start one server and fill its cache."""
    peer = Penstock()
    launch = peer.launch(Path(), precision, model, Path(), limits)
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as directory:
        async with Running(launch, Path(directory) / "log") as running:
            first_token_peak = sum(running.peaks_bytes)
            plan = await asyncio.to_thread(_planned, f"http://127.0.0.1:{launch.port}/health")
            num_left = plan["num_blocks"] * plan["block_size"]
            while num_left > 0:
                length = min(num_left, limits.max_model_tokens - 1)
                prompt = tuple(draw.choices(token_ids, k=length))
                request = BenchRequest(prompt_token_ids=prompt, num_output_tokens=1, arrival_s=0.0)
                await running.target.generate(request, f"fill-{num_left}", lambda: None)
                num_left -= length
            return Measured(
                precision=precision,
                weights=plan["weights_bytes"],
                cache=plan["num_blocks"] * plan["block_bytes"],
                activations=plan["activation_peak_bytes"],
                first_token_peak=first_token_peak,
                peaks=running.peaks_bytes,
            )


def _planned(url: str) -> dict[str, int]:
    with urllib.request.urlopen(url) as answer:
        plan: dict[str, int] = json.load(answer)["model"]["memory"]
    return plan


def imported_bytes(code: str) -> int:
    """Return the peak of an interpreter that runs ``code`` and does nothing else."""
    print_peak = "import re; print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{print_peak}"], capture_output=True, text=True, check=True)
    return 1024 * int(done.stdout)


def report(measured: list[Measured], imported: dict[str, int], limits: Limits, conditions: str) -> str:
    """Return Markdown."""
    megabytes = {name: num_bytes / 1e6 for name, num_bytes in imported.items()}
    lines = [
        f"# Peak memory with {limits.cache_tokens} tokens of cache, all written",
        "",
        conditions,
        "",
        "| | weights | cache | planned with activations | peak at the first token | peak, cache full "
        "| of it the API's process | the engine's | over weights + cache |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in measured:
        planned = one.weights + one.cache + one.activations
        engine = sum(one.peaks[1:])
        figures = [one.weights, one.cache, planned, one.first_token_peak, sum(one.peaks), one.peaks[0], engine]
        cells = " | ".join(f"{figure / 1e6:.0f} MB" for figure in figures)
        lines.append(f"| {one.precision} | {cells} | {one.ratio:.2f} |")
    lines += [
        "",
        "Interpreters that import the same and load nothing: "
        + ", ".join(f"the {name}'s process {size:.0f} MB" for name, size in megabytes.items())
        + " (resident, files of libraries included).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure each precision, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="with commas")
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--cache-tokens", type=int, default=32_768)
    parser.add_argument("--threads", type=int, default=3)
    parser.add_argument("--home", type=Path, default=REPOSITORY / "runs", help="models")
    parser.add_argument("--out", type=Path, help="write this Markdown")
    arguments = parser.parse_args()
    # A stop asked for by another process ends the server too, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    shape = SHAPES[arguments.shape]
    limits = Limits(
        threads=arguments.threads,
        cache_tokens=arguments.cache_tokens,
        kv_bytes_per_token=shape.kv_bytes_per_token,
        max_running=1,
        max_model_tokens=min(_MAX_MODEL_TOKENS, arguments.cache_tokens),
    )
    model = make_model(arguments.home.resolve() / "models" / arguments.shape, shape)
    measured: list[Measured] = []
    for precision in arguments.precisions.split(","):
        measured.append(asyncio.run(measure(precision, model, prompt_token_ids(shape), limits)))
        print(f"{measured[-1]}: {measured[-1].ratio:.2f}", flush=True)
    imported = {name: imported_bytes(code) for name, code in _IMPORTS.items()}
    machine = describe_machine()
    conditions = (
        f"`python -m benchmarks.memory {' '.join(sys.argv[1:])}` at {source_commit()}; {arguments.shape}, "
        f"random weights, {limits.threads} threads; {machine['processor']}. Peak resident memory of each process; "
        "what several of them have of a file counts once."
    )
    text = report(measured, imported, limits, conditions)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
