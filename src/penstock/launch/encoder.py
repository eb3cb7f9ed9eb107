"""An encoder process: `python -m penstock.launch.encoder ADDRESS`, settings as JSON on standard input."""

import sys
from collections.abc import Callable
from concurrent.futures import Future

import msgspec

from penstock.engine.encoding.messages import Encode
from penstock.engine.worker import Host, run_host
from penstock.launch.settings import Settings
from penstock.launch.threads import share_threads
from penstock.lean_torch import defer_tracing
from penstock.telemetry import configure_logging


def command() -> list[str]:
    """Return what to run; the pool appends the address."""
    return [sys.executable, "-m", "penstock.launch.encoder"]


def main() -> int:
    """Encode until standard input closes."""

    def build(payload: Future[bytes], wake: Callable[[], object]) -> Host:
        settings = msgspec.json.decode(payload.result(), type=Settings)
        configure_logging(settings.log.level, settings.log.format)
        defer_tracing()
        # Torch is imported here, where a missing one can be reported.
        from penstock.engine.encoding.host import EncoderHost
        from penstock.engine.runner.encoder import LocalEncoder
        from penstock.kernels import use_threads
        from penstock.launch.engine import load_encoder

        use_threads(share_threads(settings).encoder)
        return EncoderHost(LocalEncoder(load_encoder(settings)))

    return run_host(sys.argv[1], msgspec.msgpack.Decoder(Encode), build)


if __name__ == "__main__":
    sys.exit(main())
