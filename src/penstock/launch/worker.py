"""The engine process: `python -m penstock.launch.worker ADDRESS`, settings as JSON on standard input.

How it is started is here as well, for whoever wants to do so before anything else: this imports little.
"""

import os
import sys
from pathlib import Path

import msgspec

from penstock.launch.settings import Settings
from penstock.uncollected import uncollected


def command() -> list[str]:
    """Return what to run; the client appends the address."""
    return [sys.executable, "-m", "penstock.launch.worker"]


def payload(settings: Settings) -> bytes:
    """Return the settings as the worker reads them."""
    return msgspec.json.encode(settings)


def prefetch(name: str) -> int:
    """Have the system begin to read the weights of a model that is here, and return how many files they are in."""
    path = Path(name).expanduser()
    files = list(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
    return len(files)


def main() -> int:
    """Serve until standard input closes."""
    from penstock.engine.worker import run_worker
    from penstock.lean_torch import defer_tracing
    from penstock.telemetry import configure_logging
    from penstock.threads import WorkThread

    def build(data: bytes) -> object:
        settings = msgspec.json.decode(data, type=Settings)
        configure_logging(settings.log.level, settings.log.format)
        # Both take seconds where files are not in the page cache.
        WorkThread("prefetch").submit(prefetch, settings.model.name)
        with uncollected():
            defer_tracing()
            # Torch is imported here, where a missing one can be reported.
            from penstock.launch.engine import build_engine

            return build_engine(settings)

    return run_worker(sys.argv[1], build)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main())
