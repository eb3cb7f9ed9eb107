"""A few modules of the standard library, a tokenizer learned from them, and a model of its size."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from penstock.eval.sets.library import library_root, read_documents
from training.model import MiniModel, ModelConfig
from training.questions import Entry
from training.seeing import SeeingModel, TowerConfig
from training.tokenizer import train_tokenizer

ENTRIES = [
    Entry("textwrap.dedent", "function", "textwrap", "Remove margins.", "textwrap.dedent(text)", None, 3.0),
    Entry("shelve.open", "function", "shelve", "Open a shelf.", "shelve.open(filename)", None, 1.0),
]
TOWER = TowerConfig(image_size=24, patch_size=8, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few real files of the standard library, one of a held-out module among them."""
    root = tmp_path_factory.mktemp("library")
    for name in ("textwrap.py", "shelve.py", "bisect.py"):
        (root / name).write_bytes((library_root() / name).read_bytes())
    (root / "copy_of_bisect.py").write_bytes((root / "bisect.py").read_bytes())
    (root / "test").mkdir()
    (root / "test" / "test_bisect.py").write_text("assert True\n")
    return root


@pytest.fixture(scope="module")
def tokenizer(library: Path) -> Tokenizer:
    return train_tokenizer((document.text for document in read_documents(library)), vocab_size=600)


def tiny_model(tokenizer: Tokenizer) -> MiniModel:
    torch.manual_seed(0)
    return MiniModel(
        ModelConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            intermediate_size=48,
            max_positions=256,
        )
    )


def tiny_seeing_model(tokenizer: Tokenizer) -> SeeingModel:
    return SeeingModel(TOWER, tiny_model(tokenizer)).eval()
