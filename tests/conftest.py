"""Fixtures shared by all packages: tiny checkpoints, made once a session."""

import os
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.seeing_models import make_seeing_checkpoint
from tests.tiny_models import make_checkpoint

# Tiny tensors gain nothing from threads, and threads that wait for each other on a busy machine lose minutes: here, and
# in processes that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("anywhere", deadline=None)
hypothesis.settings.load_profile("anywhere")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a family's name to its tiny checkpoint."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = make_checkpoint(tmp_path_factory.mktemp(family), family)
        return made[family]

    return make


@pytest.fixture(scope="session")
def seeing_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from the name of a family that sees to its tiny checkpoint."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = make_seeing_checkpoint(tmp_path_factory.mktemp(family), family)
        return made[family]

    return make
