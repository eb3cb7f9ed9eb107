"""What an engine's process does while others import: it reads its settings and a vocabulary, and packs weights.

No torch here.
"""

import contextlib
import os
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import msgspec

from penstock.errors import ModelUnreadable
from penstock.estimate.system import available_memory_bytes
from penstock.kernels.native import MAX_REPLAYED_TOKENS
from penstock.launch.settings import Settings
from penstock.launch.text import load_tokenizer
from penstock.launch.threads import share_threads
from penstock.models.ahead import Ahead
from penstock.models.source import DEMO_MODEL, resolve_model
from penstock.telemetry import configure_logging
from penstock.text import Tokenizer
from penstock.threads import WorkThread

_MOST_SHARE = 0.5
"""Of the available memory, files that are packed before anybody has planned what fits"""
_PROCESSES_BYTES = 200 << 20
"""What the engine's process and the API's take from here on beside weights, cache and a step's activations: the
interpreters' modules, a tokenizer, and torch's ops where something needs them (docs/decisions/0019-cold-start.md)."""


@dataclass(frozen=True, slots=True)
class Begun:
    """What was begun for an engine."""

    settings: Settings
    available_bytes: int
    """Of memory, before anything was packed, less what the processes themselves take"""
    weights: Ahead | None = None
    """None where the model is not here, or is no directory"""
    tokenizer: Tokenizer | None = None
    """None likewise; it can make text of ids once its vocabulary is read"""

    @property
    def needs_torch(self) -> bool:
        """Whether torch will be needed at once, so that it had better be imported meanwhile."""
        return (
            self.weights is None
            or self.weights.needs_torch
            or self.settings.speculation.model is not None
            or self.settings.scheduler.step_tokens > MAX_REPLAYED_TOKENS
        )

    def read_vocabulary(self) -> None:
        """Have the tokenizer make text of ids. It takes the interpreter, a tenth of a second for 150,000 tokens."""
        with contextlib.suppress(ModelUnreadable):
            if self.tokenizer is not None:
                self.tokenizer.detokenizer(skip_special_tokens=True)

    def close(self) -> None:
        """End what was begun."""
        if self.weights is not None:
            self.weights.close()


def prefetch(name: str) -> int:
    """Have the system begin to read the weights of a model that is here, and return how many files they are in."""
    path = Path(name).expanduser()
    files = list(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
    return len(files)


def begin(payload: Future[bytes]) -> Begun:
    """Begin to pack the weights of the model that the settings name, which come as JSON.

    Raises ``ConfigError``.
    """
    settings = msgspec.json.decode(payload.result(), type=Settings)
    configure_logging(settings.log.level, settings.log.format, is_late=True)
    # Both take seconds where files are not in the page cache.
    WorkThread("prefetch").submit(prefetch, settings.model.name)
    name, runner = settings.model.name, settings.runner
    available_bytes = max(0, available_memory_bytes() - _PROCESSES_BYTES)
    if name != DEMO_MODEL and not Path(name).expanduser().is_dir():
        return Begun(settings, available_bytes)
    weights = Ahead(
        resolve_model(name),
        dtype=runner.dtype,
        quantize=runner.quantize,
        adaptable=runner.max_adapters > 0,
        num_threads=share_threads(settings).few_rows,
        most_bytes=int(available_bytes * _MOST_SHARE),
    )
    tokenizer = None
    # Whoever uses it says what is wrong.
    with contextlib.suppress(ModelUnreadable):
        tokenizer = load_tokenizer(settings.model, is_late=True)
    return Begun(settings, available_bytes, weights, tokenizer)
