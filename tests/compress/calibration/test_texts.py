"""Calibration texts: which are taken, and which are refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from penstock.compress.calibration.texts import Calibration, CalibrationOptions, read_calibration, require_likely
from penstock.errors import CalibrationUnfit
from penstock.text.chat_template import ChatTemplate
from penstock.text.tokenizer import Tokenizer

Read = Callable[..., Calibration]


@pytest.fixture
def read(checkpoint: Callable[[str], Path], tmp_path: Path) -> Read:
    path = checkpoint("llama")
    tokenizer, template = Tokenizer.load(path), ChatTemplate.load(path)

    def read_lines(*records: Any, num_inputs: int = 8, template: ChatTemplate | None = template, **options: Any) -> Any:
        file = tmp_path / "texts.jsonl"
        file.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in records))
        return read_calibration(CalibrationOptions(path=file, **options), tokenizer, template, num_inputs=num_inputs)

    return read_lines


def test_texts_are_cut_and_chats_rendered(read: Read) -> None:
    text, chat = {"text": "x" * 50}, {"messages": [{"role": "user", "content": "hello, who are you?"}]}
    found = read(text, chat, num_samples=8, length=20)
    assert sorted(len(sequence) for sequence in found.sequences) == [20, 20, 20]
    assert sum(258 in sequence or 257 in sequence for sequence in found.sequences) >= 1
    assert read(text, chat, num_samples=8, length=20).digest == found.digest
    assert any("not the 8 asked for" in warning for warning in found.warnings)


def test_the_built_in_set_has_as_many_as_are_asked_for(checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint("llama")
    options = CalibrationOptions(num_samples=12, length=64)
    found = read_calibration(options, Tokenizer.load(path), None, num_inputs=96)
    assert len(found.sequences) == 12
    assert found.warnings == ()


@pytest.mark.parametrize(
    ("line", "complaint"),
    [("{", "line 2 is not JSON"), ({"txt": "a"}, "line 2 has neither"), ([], "line 2 has neither")],
)
def test_lines_that_are_no_records_are_named(line: Any, complaint: str, read: Read) -> None:
    with pytest.raises(CalibrationUnfit, match=complaint):
        read({"text": "x" * 50}, line)


def test_a_chat_needs_a_template(read: Read) -> None:
    with pytest.raises(CalibrationUnfit, match="no chat template"):
        read({"messages": [{"role": "user", "content": "hello"}]}, template=None)


def test_too_little_is_refused_unless_forced_and_little_is_warned_about(read: Read) -> None:
    text = {"text": "what is written here is short"}
    with pytest.raises(CalibrationUnfit, match="fewer than the 64 inputs"):
        read(text, num_inputs=64)
    assert read(text, num_inputs=64, force=True).num_tokens == 29
    assert any("are few" in warning for warning in read(text, num_inputs=8).warnings)
    with pytest.raises(CalibrationUnfit, match="no text of 16 tokens"):
        read({"text": "short"})


def test_one_token_over_and_over_is_warned_about(read: Read) -> None:
    assert any("one and the same" in warning for warning in read({"text": "a" * 500}).warnings)


def test_what_the_model_knows_no_better_than_frequencies_do_is_refused_unless_forced(read: Read) -> None:
    found = read({"text": "ab" * 100})
    assert found.entropy == pytest.approx(math.log(2))
    require_likely(0.5, found, CalibrationOptions())
    with pytest.raises(CalibrationUnfit, match=r"0\.70 and 0\.69 nats"):
        require_likely(0.7, found, CalibrationOptions())
    require_likely(0.7, found, CalibrationOptions(force=True))
