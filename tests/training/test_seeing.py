"""Learning to see: labels, a few steps, and the exported checkpoint."""

import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from penstock.eval.sets.drawings import ANSWERS, draw
from penstock.eval.sets.library import split_documents
from tests.training.conftest import ENTRIES, TOWER, tiny_seeing_model
from training.evaluate import exact_by_kind
from training.export import load_seeing_run, rounded, write_model
from training.looking import PATCH_CLASSES, UNKNOWN, answer_labels, patch_labels
from training.questions import training_questions
from training.see import SeeConfig, SeeTrainer, chat_rows
from training.seeing import SeeingModel, pixels_of
from training.tokenizer import ChatEncoder
from training.train import Corpus, Data


def test_patches_are_labelled_with_what_has_their_centre() -> None:
    drawing = draw("training", 3, "count")
    labels = patch_labels([drawing], 32)
    names = {PATCH_CLASSES["part"][label] for label in set(labels["part"].flatten().tolist())}
    assert names == {"", drawing.parts[0].name}
    left, top, right, bottom = (round(edge * 32 / 256) for edge in drawing.parts[0].box)
    inside = labels["colour"].view(32, 32)[top + 1 : bottom - 1, left + 1 : right - 1]
    assert {PATCH_CLASSES["colour"][label] for label in set(inside.flatten().tolist())} == {drawing.parts[0].colour}


def test_an_answer_is_a_label_where_only_one_is_right() -> None:
    drawings = [draw("training", number, "scene") for number in range(20)]
    labels = answer_labels(drawings)
    for i, drawing in enumerate(drawings):
        (first, *others) = [asked.answer for asked in drawing.questions if asked.kind == "colour"]
        known = labels["colour"][i].item()
        assert known == (UNKNOWN if others else ANSWERS["colour"].index(first))
        assert labels["word"][i].item() == UNKNOWN


def test_a_chat_has_its_drawing_in_the_first_turn(tokenizer: Tokenizer) -> None:
    encoder = ChatEncoder(tokenizer)
    drawings = [draw("training", number) for number in range(8)]
    ids, learned = chat_rows(drawings, encoder, 9, 2, random.Random(0))
    assert (ids == encoder.image_id).sum(dim=1).tolist() == [9] * 8
    for row, mask, drawing in zip(ids, learned, drawings, strict=True):
        answers = encoder.decode(row[mask].tolist())
        assert any(answers.startswith(asked.answer) for asked in drawing.questions)


def test_exact_answers_are_those_that_are_generated(tokenizer: Tokenizer) -> None:
    model, encoder = tiny_seeing_model(tokenizer), ChatEncoder(tokenizer)
    found = {}
    for answer in ("circle", "square"):
        drawing = draw("held_out", 1)
        asked = replace(drawing.questions[0], answer=answer)
        teach(model, encoder, drawing.image, asked.text, "circle")
        found[answer] = exact_by_kind(model, encoder, [replace(drawing, questions=(asked,))])[asked.kind]
    assert found == {"circle": 1.0, "square": 0.0}


def teach(model: SeeingModel, encoder: ChatEncoder, image: Image.Image, question: str, answer: str) -> None:
    """Make the model give one answer."""
    ids, learned = (torch.tensor([one]) for one in encoder.exchange(question, answer, TOWER.num_patches))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        seen = model.embeddings(pixels_of([image], TOWER.image_size))
        hidden = model.hidden(ids[:, :-1], encoder.image_id, seen)[learned[:, 1:]]
        loss = torch.nn.functional.cross_entropy(model.language_model.logits(hidden), ids[learned])
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()


def test_seeing_is_learned_saved_and_continued(library: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    training, held_out = split_documents(library)
    data = Data(tokenizer, Corpus(training, held_out, ENTRIES, training_questions(ENTRIES, seed=1)), seed=1)
    config = SeeConfig(
        look_share=0.5,
        look_batch=16,
        asked_look_batch=16,
        ask_batch=8,
        text_length=32,
        language_rate=1e-2,
        warmup_steps=1,
    )
    trainer = SeeTrainer(tmp_path, data, tiny_seeing_model(tokenizer), config)
    looks = [trainer.train_step(progress=0.1)["look"] for _ in range(8)]
    assert looks[-1] < looks[0] - 0.5
    taught = dict(trainer.model.language_model.named_parameters())["model.layers.0.mlp.up_proj.weight"]
    before = taught.detach().clone()
    asks = [trainer.train_step(progress=0.5) for _ in range(8)]
    assert asks[0]["text"] == pytest.approx(0.0, abs=1e-5)  # still its former self
    assert asks[-1]["ask"] < asks[0]["ask"] - 0.1
    assert not torch.equal(before, taught)

    trainer.save()
    other = SeeTrainer(tmp_path, data, tiny_seeing_model(tokenizer), config)
    other.resume()
    assert other.num_drawings == trainer.num_drawings
    assert other.train_step(progress=0.6) == pytest.approx(trainer.train_step(progress=0.6), rel=1e-4, abs=1e-5)


def test_export_loads_in_transformers_with_equal_logits(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = tiny_seeing_model(tokenizer)
    model.load_state_dict(rounded(model.state_dict()))
    write_model(model, tokenizer, tmp_path)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)

    drawing, encoder = draw("training", 4), ChatEncoder(tokenizer)
    asked = drawing.questions[0].text
    content = [{"type": "image"}, {"type": "text", "text": asked}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[drawing.image], text=text, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == encoder.prompt(asked, TOWER.num_patches)
    # The decoder only ever saw an image before its question, so the template puts it there.
    assert text == processor.apply_chat_template(
        [{"role": "user", "content": content[::-1]}], add_generation_prompt=True
    )
    ours = pixels_of([drawing.image], TOWER.image_size)
    torch.testing.assert_close(inputs["pixel_values"], ours, atol=0.02, rtol=0)
    with torch.no_grad():
        ids = inputs["input_ids"]
        mine = model.language_model.logits(model.hidden(ids, encoder.image_id, model.embeddings(ours)))
        torch.testing.assert_close(theirs(input_ids=ids, pixel_values=ours).logits, mine, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(theirs(input_ids=ids[:, -5:]).logits, model.language_model(ids[:, -5:]))


def test_a_chat_of_text_alone_reads_as_it_did(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_model(tiny_seeing_model(tokenizer), tokenizer, tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "What does len do?"}]
    rendered = loaded.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert rendered == (
        "<|im_start|>system\n Be brief.\n<|im_end|>\n<|im_start|>user\nWhat does len do?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = loaded.apply_chat_template(messages[1:], add_generation_prompt=True, return_dict=False)
    assert ids == ChatEncoder(tokenizer).prompt("What does len do?")
    assert loaded.eos_token == "<|im_end|>"


def test_a_run_is_read_back_rounded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = tiny_seeing_model(tokenizer)
    state = {"model": model.state_dict(), "step": 3, "num_drawings": 12, "elapsed_s": 6.0}
    torch.save(state, tmp_path / "checkpoint.pt")
    settings = {"tower": asdict(TOWER), "model": asdict(model.language_model.config)}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    run = load_seeing_run(tmp_path)
    assert (run.step, run.num_drawings) == (3, 12)
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].bfloat16().float())
