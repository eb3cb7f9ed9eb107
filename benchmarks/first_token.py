"""From the command to the first token: `python -m benchmarks.first_token`.

Starts `penstock serve` on the demo model, or on --model, and asks for a streamed answer until one comes. Prints seconds
from starting the process to the first token's arrival and the processor time of all its processes until then, several
times; `--timeline` prints instead when each step of one start was done.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks.peers.adapters.penstock import compile_sources

_HOOK = r"""
import os, sys, time
from importlib.machinery import PathFinder

STEPS = {
    "penstock.launch.process": {"spawn": "engine process spawned", "start": "engine process told its settings"},
    "penstock.launch.ahead": {"begin": "packing begun"},
    "penstock.launch.server": {},
    "torch": {},
    "penstock.launch.engine": {"_choose": "sizes read", "_load": "weights packed", "assemble_engine": "assembled"},
    "penstock.server.app": {"create_app": "routes made"},
    "penstock.engine.host": {},
}

def note(what):
    with open(os.environ["PENSTOCK_TIMELINE"], "a") as file:
        file.write(f"{time.time()}\t{'engine' if 'worker' in ' '.join(sys.orig_argv) else 'API'}\t"
                   f"{time.process_time():.2f}\t{what}\n")

def noting(function, what):
    def noted(*args, **kwargs):
        result = function(*args, **kwargs)
        note(what)
        return result
    return noted

class Finder:
    def find_spec(self, name, path, target=None):
        if name not in STEPS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module
        def executed(module):
            execute(module)
            note(f"{name} imported")
            for function, what in STEPS[name].items():
                if what:
                    setattr(module, function, noting(getattr(module, function), what))
        spec.loader.exec_module = executed
        return spec

sys.meta_path.insert(0, Finder())
note("interpreter up")
"""
"""What both processes run first for a timeline: notes the ends of some imports and calls"""


def measure(model: Sequence[str], timeline: Path | None = None) -> tuple[float, float]:
    """Return the seconds of one start and its processor time; ``timeline`` gets a line for each step."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    body = {"messages": [{"role": "user", "content": "What does len do?"}], "temperature": 0, "stream": True}
    if model:
        body = {"prompt": [300, 301, 302, 303], "max_tokens": 2, "temperature": 0, "stream": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/{'completions' if model else 'chat/completions'}",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    began = time.time()
    code = "from penstock.cli.main import main; main()"
    command = [sys.executable, "-c", code, "serve", *model, "--port", str(port), "--log-level", "error"]
    environment = dict(os.environ)
    if timeline is not None:
        (timeline.parent / "sitecustomize.py").write_text(_HOOK)
        environment |= {"PYTHONPATH": str(timeline.parent), "PENSTOCK_TIMELINE": str(timeline)}
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
    try:
        while True:
            try:
                with urllib.request.urlopen(request) as answer:
                    for line in answer:
                        if b'"text":"' in line or (b'"content":"' in line and b'"content":""' not in line):
                            return time.time() - began, _processor_s(server.pid)
            except urllib.error.HTTPError as error:
                if error.code != 503:
                    raise
            except (urllib.error.URLError, ConnectionError):
                if server.poll() is not None:
                    raise
            time.sleep(0.005)
    finally:
        if timeline is not None:
            with timeline.open("a") as file:
                file.write(f"{time.time()}\tclient\t0\tfirst token came\n")
        server.terminate()
        server.wait()


def _processor_s(pid: int) -> float:
    root = psutil.Process(pid)
    times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def _print_timeline(model: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "timeline"
        began = time.time()
        measure(model, file)
        print("seconds  processor's  process  step")
        for line in sorted(file.read_text().splitlines()):
            at_s, process, processor_s, step = line.split("\t")
            print(f"{float(at_s) - began:7.2f} {processor_s:>12}  {process:7}  {step}")


def main() -> None:
    """Print each start and the median, or a timeline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--timeline", action="store_true")
    parser.add_argument("model", nargs="*", help="after --, a model and options of `penstock serve`")
    arguments = parser.parse_args()
    compile_sources()
    if arguments.timeline:
        _print_timeline(arguments.model)
        return
    starts = [measure(arguments.model) for _ in range(arguments.repetitions + 1)][1:]
    print(", ".join(f"{one:.2f}" for one, _ in starts), f"s; median {statistics.median(s for s, _ in starts):.2f} s")
    print(f"processor time: median {statistics.median(cpu for _, cpu in starts):.2f} s")


if __name__ == "__main__":
    main()
