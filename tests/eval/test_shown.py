"""Questions that show an image: what transformers answers counts as right."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from penstock.errors import InvalidSetting
from penstock.eval import Subject
from penstock.eval.sets.drawings import draw
from penstock.eval.tasks import GenerationTask, Question
from penstock.images.config import ImageConfig
from penstock.images.families import load_processor
from penstock.images.reader import ImageReader
from penstock.text import Tokenizer
from penstock.text.chat_template import ChatTemplate
from tests.eval.conftest import OpenSubject
from tests.seeing_models import upstream_image_processor, upstream_model, with_images

NUM_TOKENS = 6


def answer_of_transformers(path: Path, question: str, image: Image.Image) -> str:
    template, processor = ChatTemplate.load(path), load_processor(path)
    assert template is not None
    assert processor is not None
    text = template.render([{"role": "user", "content": f"@{question}"}], add_generation_prompt=True)
    token_ids, _ = with_images(path, processor, text, [image])
    with torch.no_grad():
        output = upstream_model(path).generate(
            input_ids=torch.tensor([token_ids]),
            attention_mask=torch.ones(1, len(token_ids), dtype=torch.int64),
            **upstream_image_processor("llava")([image], return_tensors="pt"),
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            pad_token_id=0,
        )
    return Tokenizer.load(path).decode(output[0, len(token_ids) :].tolist(), skip_special_tokens=True)


async def test_answers_about_images_are_those_of_transformers(
    seeing_checkpoint: Callable[[str], Path], open_subject: OpenSubject, no_progress: Callable[[int, int], None]
) -> None:
    path = seeing_checkpoint("llava")
    processor = load_processor(path)
    assert processor is not None
    drawings = [draw("held_out", number) for number in range(3)]
    asked = [drawing.questions[0].text for drawing in drawings]
    right = [answer_of_transformers(path, text, one.image) for text, one in zip(asked, drawings, strict=True)]
    assert len(set(right)) > 1
    questions = [Question(asked[i], (right[i],), drawings[i].image) for i in range(3)]
    # Asked about another drawing, the same answer is wrong.
    other = next(i for i in (1, 2) if right[i] != right[0])
    questions.append(Question(asked[other], (right[0],), drawings[other].image))
    task = GenerationTask("shown", questions, max_tokens=NUM_TOKENS, stop=())
    async with open_subject(path) as plain:
        images = ImageReader(processor, ImageConfig())
        subject = Subject(plain.client, plain.tokenizer, plain.template, images)
        table = await task.score(subject, limit=None, on_item=no_progress)
        with pytest.raises(InvalidSetting, match="sees none"):
            await task.score(plain, limit=None, on_item=no_progress)
    assert table[:, 0].tolist() == [1.0, 1.0, 1.0, 0.0]


def test_a_task_is_known_by_its_images() -> None:
    first, second = (draw("held_out", number).image for number in range(2))
    hashes = {
        GenerationTask("shown", [Question("what?", ("this",), image)]).data_sha256 for image in (first, second, None)
    }
    assert len(hashes) == 3
