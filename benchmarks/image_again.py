"""A second question about an image, as a client sees it: `python -m benchmarks.image_again`.

Starts `penstock serve` on a LLaVA of random weights, or on a model that is named, and streams answers over one
connection: for each image a first question and a second one, by turns, timed from before the request is sent to the
first event of the answer. Images are JPEGs of a photo's kind, each another.
"""

import argparse
import base64
import http.client
import io
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.vision import SHAPES, make_llava

QUESTIONS = ("What is in this picture?", "And which colour is it?")
SIZES = ((320, 240), (1024, 768), (4032, 3024))
"""Width and height: a thumbnail, a screen's, a phone's"""


def photo(size: tuple[int, int], seed: int) -> bytes:
    """Return a JPEG with edges and grain of its own."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    grain = draw.integers(-4, 5, (size[1], size[0], 1), dtype=np.int16)
    pixels = np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    return file.getvalue()


@contextmanager
def serving(model: str) -> Iterator[http.client.HTTPConnection]:
    """Run a server until it is ready and yield a connection to it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = "from penstock.cli.main import main; main()"
    command = [sys.executable, "-c", code, "serve", model, "--port", str(port), "--log-level", "error"]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while not _is_ready(port):
            if server.poll() is not None:
                raise SystemExit(f"the server ended: run {' '.join(command)}")
            time.sleep(0.05)
        yield http.client.HTTPConnection("127.0.0.1", port)
    finally:
        server.terminate()
        server.wait()


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def first_text_s(connection: http.client.HTTPConnection, image: bytes, question: str) -> float:
    """Return the seconds until the first event, which comes with the first token."""
    url = f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    asked = {"messages": [{"role": "user", "content": content}], "max_tokens": 2, "temperature": 0, "stream": True}
    body = json.dumps(asked | {"ignore_eos": True}).encode()
    began_s = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise SystemExit(answer.read().decode())
    answer.readline()
    first_s = time.perf_counter() - began_s
    answer.read()
    return first_s


def main() -> None:
    """Print a row for each model and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), help=f"{', '.join(SHAPES)}, or any that is served")
    parser.add_argument("--pairs", type=int, default=15)
    arguments = parser.parse_args()
    print("| model | image | file | first question, ms | second, ms | ratio, median (least..most) |")
    print("|---|---|---|---|---|---|")
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as directory:
            model = str(make_llava(Path(directory), name)) if name in SHAPES else name
            with serving(model) as connection:
                for size in SIZES:
                    pairs = []
                    for pair in range(arguments.pairs + 1):
                        image = photo(size, pair)
                        pairs.append([first_text_s(connection, image, question) for question in QUESTIONS])
                    _, *kept = pairs
                    first, second = (statistics.median(column) * 1e3 for column in zip(*kept, strict=True))
                    ratios = [one / other for one, other in kept]
                    print(
                        f"| {name} | {size[0]} x {size[1]} | {len(image) >> 10} KiB | {first:.1f} | {second:.1f} | "
                        f"{statistics.median(ratios):.1f} ({min(ratios):.1f}..{max(ratios):.1f}) |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
