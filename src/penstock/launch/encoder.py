"""An encoder process: `python -m penstock.launch.encoder ADDRESS`, settings as JSON on standard input."""

import sys
from collections.abc import Callable

import msgspec

from penstock.engine.encoding.messages import Encode
from penstock.engine.worker import Host, run_host
from penstock.estimate.system import usable_cores
from penstock.launch.settings import Settings
from penstock.lean_torch import defer_tracing
from penstock.telemetry import configure_logging


def command() -> list[str]:
    """Return what to run; the pool appends the address."""
    return [sys.executable, "-m", "penstock.launch.encoder"]


def share_threads(settings: Settings) -> tuple[int, int]:
    """Return how many threads the engine's steps use, and each encoder process.

    All cores but one, which the API's process needs, each for one thread: two that share one stall the others.
    """
    num_workers, num_cores = settings.runner.encoder_workers, max(1, usable_cores() - 1)
    if settings.runner.threads is not None:
        num_left = num_cores - settings.runner.threads
        return settings.runner.threads, max(1, num_left // num_workers) if num_workers else 0
    each = max(1, num_cores // (num_workers + 1))
    return max(1, num_cores - num_workers * each), each


def main() -> int:
    """Encode until standard input closes."""

    def build(data: bytes, wake: Callable[[], object]) -> Host:
        settings = msgspec.json.decode(data, type=Settings)
        configure_logging(settings.log.level, settings.log.format)
        defer_tracing()
        # Torch is imported here, where a missing one can be reported.
        from penstock.engine.encoding.host import EncoderHost
        from penstock.engine.runner.encoder import LocalEncoder
        from penstock.kernels import use_threads
        from penstock.launch.engine import load_encoder

        _, num_threads = share_threads(settings)
        use_threads(num_threads)
        return EncoderHost(LocalEncoder(load_encoder(settings)))

    return run_host(sys.argv[1], msgspec.msgpack.Decoder(Encode), build)


if __name__ == "__main__":
    sys.exit(main())
