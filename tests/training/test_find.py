"""Learning to find which shape is meant: what learns, what rests, and what a run directory then holds."""

import copy
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from penstock.eval.sets.library import split_documents
from tests.training.conftest import ENTRIES, TOWER, tiny_seeing_model
from training.export import load_seeing_run
from training.find import FindConfig, FindTrainer
from training.questions import training_questions
from training.train import Corpus, Data

CONFIG = FindConfig(
    batch=8, first_layer=0, text_length=32, text_chat_share=0.0, attention_rate=1e-2, mlp_rate=1e-2, warmup_steps=1
)


def _data(library: Path, tokenizer: Tokenizer) -> Data:
    training, held_out = split_documents(library)
    return Data(tokenizer, Corpus(training, held_out, ENTRIES, training_questions(ENTRIES, seed=1)), seed=1)


def test_layers_above_learn_where_to_look_and_the_rest_rests(
    library: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    data, model = _data(library, tokenizer), tiny_seeing_model(tokenizer)
    before = copy.deepcopy(model.state_dict())
    former = copy.deepcopy(model.language_model)
    trainer = FindTrainer(tmp_path, data, model, former, CONFIG)
    steps = [trainer.train_step(progress=0.1) for _ in range(24)]
    assert steps[0]["text"] == pytest.approx(0.0, abs=1e-5)  # still its former self
    for name in ("ask", "name", "answer", "read", "read_again"):
        assert steps[-1][name] < steps[0][name] - 0.1
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "language_model.model.layers" in name and "norm" not in name}

    trainer.save()
    settings = {"tower": asdict(TOWER), "model": asdict(model.language_model.config), "find": asdict(CONFIG)}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    run = load_seeing_run(tmp_path)
    assert (run.step, run.num_drawings) == (24, 192)


def test_answers_of_text_are_learned_too(library: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = tiny_seeing_model(tokenizer)
    former = copy.deepcopy(model.language_model)
    config = replace(CONFIG, text_chat_share=1.0)
    trainer = FindTrainer(tmp_path, _data(library, tokenizer), model, former, config)
    steps = [trainer.train_step(progress=0.1) for _ in range(12)]
    assert steps[-1]["text"] < steps[0]["text"] - 0.1
