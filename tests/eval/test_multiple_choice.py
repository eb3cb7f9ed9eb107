"""Multiple choice beside a direct computation, by lm-evaluation-harness's definitions of acc and acc_norm."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from penstock.errors import InvalidSetting
from penstock.eval.tasks import ChoiceItem, MultipleChoiceTask
from penstock.eval.tasks.base import Format
from penstock.text import Tokenizer
from penstock.text.chat_template import ChatTemplate
from tests.eval.conftest import OpenSubject
from tests.tiny_models import reference_logits

ITEMS = [
    ChoiceItem(question, tuple(choices), right)
    for question, choices, right in [
        ("What is red", ["blood", "the sky on a clear day", "x"], 0),
        ("Two and two", ["is four", "five", "nothing at all, or so they say"], 1),
        ("Count", ["1", "22", "333", "4444"], 2),
        ("Who", ["me", "you and everybody else", "it"], 0),
        ("Where", ["there", "a", "bb"], 1),
    ]
]


def likelihoods(path: Path, item: ChoiceItem, chat: bool) -> list[float]:
    """Return each choice's log-likelihood as transformers has it."""
    tokenizer = Tokenizer.load(path)
    if chat:
        template = ChatTemplate.load(path)
        assert template is not None
        context = template.render([{"role": "user", "content": item.question}], add_generation_prompt=True)
    else:
        context = f"Question: {item.question}\nAnswer:"
    found = []
    for choice in item.choices:
        ids = tokenizer.encode(context + ("" if chat else " ") + choice, add_special_tokens=not chat)
        start = len(tokenizer.encode(context, add_special_tokens=not chat))
        logprobs = torch.log_softmax(reference_logits(path, ids), -1)
        found.append(sum(float(logprobs[i - 1, ids[i]]) for i in range(start, len(ids))))
    return found


@pytest.mark.parametrize(("form", "chat"), [("auto", True), ("chat", True), ("plain", False)])
async def test_accuracies_are_what_lm_eval_would_count(
    form: Format,
    chat: bool,
    checkpoint: Callable[[str], Path],
    open_subject: OpenSubject,
    no_progress: Callable[[int, int], None],
) -> None:
    path = checkpoint("qwen2")
    async with open_subject(path) as subject:
        found = await MultipleChoiceTask("own", ITEMS, form=form).score(subject, limit=None, on_item=no_progress)
    expected = []
    for item in ITEMS:
        values = likelihoods(path, item, chat)
        normed = [value / len(choice) for value, choice in zip(values, item.choices, strict=True)]
        expected.append((values.index(max(values)) == item.right, normed.index(max(normed)) == item.right, True))
    assert [tuple(map(bool, row)) for row in found] == expected
    # The two must be able to disagree, or one would not be tested.
    assert any(plain != normed for plain, normed, _ in expected)


async def test_a_model_without_a_template_is_asked_in_plain_text(
    bos_checkpoint: Path, open_subject: OpenSubject, no_progress: Callable[[int, int], None]
) -> None:
    async with open_subject(bos_checkpoint) as subject:
        auto, plain = [
            await MultipleChoiceTask("own", ITEMS, form=form).score(subject, limit=3, on_item=no_progress)
            for form in ("auto", "plain")
        ]
        assert (auto == plain).all()
        assert len(auto) == 3
        with pytest.raises(InvalidSetting, match="no chat template"):
            await MultipleChoiceTask("own", ITEMS, form="chat").score(subject, limit=1, on_item=no_progress)
