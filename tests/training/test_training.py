"""The demo model's recipe: data split, tokenizer, learning and export."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from penstock.eval.sets.docstrings import HELD_OUT_PHRASINGS, summarize
from penstock.eval.sets.library import HELD_OUT_MODULES, is_held_out, library_root, split_documents
from tests.training.conftest import ENTRIES, tiny_model
from training.evaluate import exact_match, generate
from training.muon import orthogonalize
from training.questions import NEARBY_PHRASINGS, TRAINING_PHRASINGS, Question, phrased, training_questions
from training.tokenizer import SPECIAL_TOKENS, ChatEncoder
from training.train import Corpus, Data, TrainConfig, Trainer


def test_split_is_disjoint_and_repeatable(library: Path) -> None:
    training, held_out = split_documents(library)
    assert [document.path for document in training] == ["bisect.py", "textwrap.py"]
    assert [document.path for document in held_out] == ["shelve.py"]
    assert split_documents(library) == (training, held_out)


def test_every_held_out_module_exists() -> None:
    root = library_root()
    assert all((root / name).is_dir() or (root / f"{name}.py").is_file() for name in HELD_OUT_MODULES)


def test_questions_leave_out_held_out_modules_and_phrasings() -> None:
    questions = training_questions(ENTRIES, seed=1)
    assert questions == training_questions(ENTRIES, seed=1)
    prompts = {question.prompt for question in questions}
    assert "What does textwrap.dedent do?" in prompts
    assert not any("shelve" in question.prompt or "shelf" in question.answer for question in questions)
    assert prompts.isdisjoint(question.prompt for question in phrased(ENTRIES, HELD_OUT_PHRASINGS))
    assert set(NEARBY_PHRASINGS).isdisjoint((*HELD_OUT_PHRASINGS, *TRAINING_PHRASINGS))
    assert is_held_out("xmlrpc.client.dumps")
    assert not is_held_out("xml.dom")


@pytest.mark.parametrize(
    ("doc", "summary"),
    [
        ("Return the length.\n\nMore text.", "Return the length."),
        ("D.pop(k[,d]) -> v, remove specified key and return the value.", "Remove specified key and return the value."),
        ("D.items() -> a view on D's items", "Return a view on D's items."),
        ("f(x) -> value\nf(x, y) -> value\n\nDo it well. Or not.", "Do it well."),
        ("Use it, e.g. often. Then rest.", "Use it, e.g. often."),
        ("short", None),
        ("", None),
    ],
)
def test_summary_is_the_first_sentence(doc: str, summary: str | None) -> None:
    assert summarize(doc) == summary


@pytest.mark.parametrize("text", ["def f(x):\n        return x\n\n\n", "naïve ☃ 你好 👍 \t\r\n x", "<|im_end|> 12345"])
def test_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_special_tokens_come_first(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))


def test_exchange_learns_the_answer_and_its_end_only(tokenizer: Tokenizer) -> None:
    encoder = ChatEncoder(tokenizer)
    ids, learned = encoder.exchange("What?", "That.")
    taught = [token for token, flag in zip(ids, learned, strict=True) if flag]
    assert taught == [*encoder.plain("That."), encoder.im_end_id]
    assert ids[: len(encoder.prompt("What?"))] == encoder.prompt("What?")


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_orthogonalize_moves_singular_values_to_about_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_training_lowers_the_loss_and_resumes(library: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    training, held_out = split_documents(library)
    corpus = Corpus(training, held_out, ENTRIES, training_questions(ENTRIES, seed=1))
    data = Data(tokenizer, corpus, seed=1)
    config = TrainConfig(batch_tokens=256, short_length=32, long_length=64, warmup_steps=1)
    trainer = Trainer(tmp_path, data, tiny_model(tokenizer), config)
    losses = [trainer.train_step(progress=0.0) for _ in range(12)]
    assert losses[-1] < losses[0] - 0.1
    trainer.report(losses, progress=0.5)
    assert json.loads((tmp_path / "log.jsonl").read_text())["step"] == 12

    trainer.save()
    other = Trainer(tmp_path, data, tiny_model(tokenizer), config)
    other.resume()
    assert other.step == 12
    assert other.train_step(progress=0.6) == pytest.approx(trainer.train_step(progress=0.6), rel=1e-5)


def test_exact_match_agrees_with_generating(tokenizer: Tokenizer) -> None:
    model, encoder = tiny_model(tokenizer), ChatEncoder(tokenizer)
    prompts = [f"What is {n}?" for n in range(8)]
    # An untrained model's own first tokens stand for the right answer of every other question.
    questions, right = [], 0
    for n, prompt in enumerate(prompts):
        ids = generate(model, encoder, encoder.prompt(prompt), max_tokens=3)
        questions.append(Question(prompt, encoder.decode(ids) if n % 2 else "No.", 1.0))
        again = generate(model, encoder, encoder.prompt(prompt), max_tokens=8)
        right += again == encoder.plain(questions[-1].answer)
    assert exact_match(model, encoder, questions) == pytest.approx(right / len(prompts))
