"""The engine process: `python -m penstock.launch.worker ADDRESS`, settings as JSON on standard input.

What it is told is here as well, for whoever starts it: this imports little.
"""

import sys
from concurrent.futures import Future

import msgspec

from penstock.launch.settings import Settings
from penstock.uncollected import uncollected


def payload(settings: Settings) -> bytes:
    """Return the settings as the worker reads them."""
    return msgspec.json.encode(settings)


def main() -> int:
    """Serve until standard input closes."""
    from penstock.engine.worker import run_worker
    from penstock.lean_torch import defer_torch
    from penstock.threads import WorkThread

    def build(payload: Future[bytes]) -> object:
        # The native kernels come with it, where wrong ones can be reported.
        from penstock.launch.ahead import begin

        ahead = WorkThread("ahead")
        beginning = ahead.submit(begin, payload)
        # What fails here fails again where it is asked for, and is said there.
        ahead.submit(lambda: beginning.result().read_vocabulary())
        try:
            with uncollected():
                defer_torch()
                # A missing torch is reported here, and by it.
                from penstock.launch.engine import build_engine

                begun = beginning.result()
                return build_engine(begun.settings, ahead=begun)
        finally:
            beginning.result().close()

    return run_worker(sys.argv[1], build)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main())
