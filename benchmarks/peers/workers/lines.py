"""The loop of a worker: requests in as lines of JSON, what each step added out as lines of JSON.

In:  {"id": "r1", "prompt": [token ids], "num_tokens": 3}      an answer of exactly that length, greedy
Out: {"id": "r1", "num_tokens": 1, "finished": false}

Runs in a peer's environment, so it needs nothing but Python.
"""

import json
import os
import queue
import sys
import threading
from collections.abc import Iterable
from typing import NamedTuple, Protocol


class Added(NamedTuple):
    """What a step added to one request."""

    request_id: str
    num_tokens: int
    finished: bool


class Stepped(Protocol):
    """An engine with continuous batching, stepped by the loop."""

    def add(self, request_id: str, prompt: list[int], num_tokens: int) -> None:
        """Queue a request."""

    def step(self) -> Iterable[Added]:
        """Run one step."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""


def take_output() -> int:
    """Return a copy of standard output, and send whatever else is printed there to standard error."""
    lines = os.dup(1)
    os.dup2(2, 1)
    return lines


def run(engine: Stepped, output: int) -> None:
    """Serve until standard input closes; ``output`` is what ``take_output`` returned."""
    arrived: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            arrived.put(line)
        arrived.put(None)

    threading.Thread(target=read, daemon=True).start()
    with os.fdopen(output, "w") as lines:
        while True:
            while not (engine.has_work and arrived.empty()):
                line = arrived.get()
                if line is None:
                    return
                request = json.loads(line)
                engine.add(request["id"], request["prompt"], request["num_tokens"])
            for added in engine.step():
                event = {"id": added.request_id, "num_tokens": added.num_tokens, "finished": added.finished}
                lines.write(json.dumps(event) + "\n")
            lines.flush()
