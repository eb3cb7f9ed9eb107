import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from penstock.errors import InvalidRequest, ModelUnreadable
from penstock.text import Tokenizer
from tests.fakes.tokenizer_files import byte_fallback_tokenizer, byte_level_tokenizer, write_tokenizer

BYTE_LEVEL = Tokenizer.of(byte_level_tokenizer())


def test_load_reads_roles_and_marks_them_special(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, pad_token={"content": "<think > é"}))
    assert tokenizer.vocab_entry(tokenizer.bos_token_id or 0) == "<|begin|>"
    assert tokenizer.vocab_entry(tokenizer.eos_token_id or 0) == "<|end|>"
    assert tokenizer.special_token_ids == set(range(tokenizer.vocab_size - 5, tokenizer.vocab_size))


def test_a_role_nobody_plays_is_none(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, bos_token=None, eos_token="<|gone|>"))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (None, None)


def test_missing_file_names_it_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ModelUnreadable, match=r"has no tokenizer\.json.*save_pretrained"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", '{"model": ', "[1]"])
def test_broken_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelUnreadable, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_broken_config_is_named(tmp_path: Path, content: str) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ModelUnreadable, match=r"tokenizer_config\.json"):
        Tokenizer.load(tmp_path)


def test_encodes_as_transformers_does(tmp_path: Path) -> None:
    ours = Tokenizer.load(write_tokenizer(tmp_path))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in ("hello world", "", "<|im_start|>user <|im_end|> é <think > é", "  two\n\nlines", "你好 👍"):
        for special in (False, True):
            assert ours.encode(text, add_special_tokens=special) == theirs.encode(text, add_special_tokens=special)
        for skip in (False, True):
            ids = theirs.encode(text)
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_limits_meant_for_training_do_not_cut_prompts(tmp_path: Path) -> None:
    backend = byte_level_tokenizer()
    backend.enable_truncation(4)
    backend.enable_padding()
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, backend))
    assert [len(ids) for ids in tokenizer.encode_batch(["x" * 100, "x"], add_special_tokens=False)] == [100, 1]


def test_a_lone_surrogate_is_the_callers_fault() -> None:
    with pytest.raises(InvalidRequest, match=r"surrogate '\\ud800' at character 2"):
        BYTE_LEVEL.encode("ab\ud800", add_special_tokens=False)


def test_token_bytes_of_a_part_of_a_character() -> None:
    ids = BYTE_LEVEL.encode("👍", add_special_tokens=False)
    assert len(ids) > 1
    assert b"".join(BYTE_LEVEL.token_bytes(token_id) for token_id in ids) == "👍".encode()
    assert BYTE_LEVEL.token_text(ids[0]) == "\ufffd"
    assert BYTE_LEVEL.vocab_entry(BYTE_LEVEL.encode(" w", add_special_tokens=False)[0]) == "Ġw"


def test_token_bytes_with_byte_fallback() -> None:
    tokenizer = Tokenizer.of(byte_fallback_tokenizer())
    ids = tokenizer.encode("hi é", add_special_tokens=False)
    assert [tokenizer.token_bytes(token_id) for token_id in ids] == [b" hi", b" ", b"\xc3", b"\xa9"]


def test_ids_beyond_the_vocabulary_name_nothing() -> None:
    beyond = BYTE_LEVEL.vocab_size
    assert (BYTE_LEVEL.token_bytes(beyond), BYTE_LEVEL.token_text(beyond), BYTE_LEVEL.decode([beyond])) == (
        b"",
        "",
        "",
    )


@given(st.text(max_size=60))
def test_any_unicode_survives_the_round_trip(text: str) -> None:
    text = text.encode(errors="ignore").decode()
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(text, add_special_tokens=False)) == text


def test_special_tokens_map_fills_in_where_the_config_is_silent(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.vocab_entry(tokenizer.eos_token_id or 0) == "<|im_end|>"
