"""Questions as rows of branches: each as if it were alone, names that point at their parts, and other words."""

import math
import random

import pytest
import torch
from tokenizers import Tokenizer

from penstock.eval.sets.drawings import HELD_OUT_PHRASINGS, PHRASINGS, draw
from tests.training.conftest import TOWER, tiny_seeing_model
from training.asking import MORE_PHRASINGS, NOT_WANTED, asked_rows, pointing_loss, two_shapes
from training.looking import PATCH_CLASSES, patch_labels
from training.seeing import pixels_of
from training.tokenizer import ChatEncoder

DRAWINGS = [two_shapes(0), *(draw("training", number, "scene") for number in range(4)), draw("training", 1, "word")]
PATCHES = patch_labels(DRAWINGS, TOWER.image_size // TOWER.patch_size)


def test_words_for_training_are_not_held_out_ones() -> None:
    assert MORE_PHRASINGS.keys() == PHRASINGS.keys()
    for name, phrasings in MORE_PHRASINGS.items():
        every = (*PHRASINGS[name], *phrasings, HELD_OUT_PHRASINGS[name])
        assert len(set(every)) == len(every)


def test_two_shapes_are_others_for_each_number() -> None:
    drawings = [two_shapes(number) for number in range(6)]
    assert {len(drawing.parts) for drawing in drawings} == {2}
    assert len({drawing.parts for drawing in drawings}) == 6


@torch.no_grad()
def test_each_branch_reads_as_a_chat_of_its_own(tokenizer: Tokenizer) -> None:
    model, encoder = tiny_seeing_model(tokenizer), ChatEncoder(tokenizer)
    seen = model.embeddings(pixels_of([drawing.image for drawing in DRAWINGS], TOWER.image_size))
    rows = asked_rows(DRAWINGS, encoder, PATCHES, random.Random(0))
    streams = model.language_model.streams(model.inserted(rows.ids, encoder.image_id, seen), rows.layout)
    found = model.language_model.model.norm(streams[-1])
    for i, drawing in enumerate(DRAWINGS):
        positions = rows.layout.positions[i].tolist()
        opening = max(at for at, token in enumerate(rows.ids[i].tolist()) if token == encoder.image_id) + 1
        starts = [at for at, position in enumerate(positions) if at and position == opening]
        assert len(starts) >= 3
        for start, end in zip(starts, [*starts[1:], rows.ids.shape[1]], strict=True):
            ids = torch.cat((rows.ids[i, :opening], rows.ids[i, start:end]))
            alone = model.hidden(ids[None], encoder.image_id, seen[i : i + 1])[0, opening:]
            wanted = rows.wanted[i, start:end]
            is_answer = wanted != NOT_WANTED
            torch.testing.assert_close(found[i, start:end][is_answer], alone[is_answer], atol=1e-5, rtol=1e-4)
            assert encoder.decode(wanted[is_answer].tolist()).startswith(
                tuple(asked.answer for asked in drawing.questions)
            )


def test_a_name_points_at_its_shape_and_the_answer_at_the_name(tokenizer: Tokenizer) -> None:
    encoder = ChatEncoder(tokenizer)
    rows = asked_rows(DRAWINGS, encoder, PATCHES, random.Random(0), most_questions=6)
    first_patch = rows.ids[0].tolist().index(encoder.image_id)
    assert set(rows.names.rows.tolist()) == set(range(5))  # the word has no name
    assert (rows.names.rows == 0).sum() == 6
    named = {}
    for row, token, at in zip(rows.names.rows.tolist(), rows.names.tokens.tolist(), rows.names.at, strict=True):
        said = encoder.decode(rows.ids[row, : token + 1].tolist())
        (part,) = (part for part in DRAWINGS[row].parts if said.endswith((f" {part.name}", f" {part.colour}")))
        of_part = PATCHES["part"][row] == PATCH_CLASSES["part"].index(part.name)
        assert torch.equal(at[first_patch : first_patch + TOWER.num_patches], of_part)
        assert at.sum() == of_part.sum()
        named[row, token] = part
    assert list(named.values()) == rows.names.parts
    answers = rows.answers
    of_answers = zip(answers.rows.tolist(), answers.tokens.tolist(), answers.at, answers.parts, strict=True)
    for row, token, at, part in of_answers:
        assert part == named[row, int(at.nonzero())]
        assert rows.wanted[row, token] != NOT_WANTED
        assert rows.ids[row, token + 1] == rows.wanted[row, token]
    assert {row for row, _ in named} == set(answers.rows.tolist())


def test_heads_that_look_everywhere_lose_by_the_share_of_the_shape(tokenizer: Tokenizer) -> None:
    model, encoder = tiny_seeing_model(tokenizer).language_model, ChatEncoder(tokenizer)
    rows = asked_rows(DRAWINGS[:1], encoder, {name: labels[:1] for name, labels in PATCHES.items()}, random.Random(0))
    torch.nn.init.zeros_(dict(model.named_parameters())["model.layers.1.self_attn.q_proj.weight"])
    stream = torch.randn(*rows.ids.shape, model.config.hidden_size)
    num_seen = rows.layout.positions[rows.answers.rows, rows.answers.tokens] + 1
    losses = [-math.log(share) for share in (model.config.num_heads / num_seen).tolist()]
    found = pointing_loss(model, stream, 1, rows.layout, rows.answers).item()
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-4)
