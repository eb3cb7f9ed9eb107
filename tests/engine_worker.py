"""An engine process over a tiny checkpoint, whose path is the payload: `python -m tests.engine_worker ADDRESS`."""

import sys
from concurrent.futures import Future
from pathlib import Path

import torch

from penstock.engine.worker import run_worker
from penstock.errors import ModelUnreadable
from tests.engines import build_engine

if __name__ == "__main__":
    torch.set_num_threads(1)

    def build(payload: Future[bytes]) -> object:
        path = Path(payload.result().decode())
        if not path.is_dir():
            raise ModelUnreadable(f"{path} is not there")
        return build_engine(path, max_adapters=2)

    sys.exit(run_worker(sys.argv[1], build))  # type: ignore[arg-type]
