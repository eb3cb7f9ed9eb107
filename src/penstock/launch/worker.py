"""The engine process: ``python -m penstock.launch.worker ADDRESS``, settings as JSON on standard input."""

import sys

import msgspec

from penstock.engine.engine import Engine
from penstock.engine.process import run_worker
from penstock.launch.engine import build_engine
from penstock.launch.settings import Settings
from penstock.telemetry import configure_logging


def main(address: str) -> int:
    """Serve steps until the parent closes standard input; return the exit status."""

    def build(payload: bytes) -> Engine:
        settings = msgspec.json.decode(payload, type=Settings)
        configure_logging(settings.log.level, settings.log.format)
        return build_engine(settings)

    return run_worker(address, build)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
