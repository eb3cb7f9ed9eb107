"""Reading a vocabulary without the library that encodes gives what the library gives."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from penstock.errors import ModelUnreadable
from penstock.text import Tokenizer
from penstock.text.vocabulary import read_vocabulary
from tests.fakes.tokenizer_files import byte_fallback_tokenizer, byte_level_tokenizer, write_tokenizer

TOKENS = ["a", "b", "Ġc", "é", '"\\', "<0x41>", "你好", "<s>"]


def words_tokenizer() -> Backend:
    backend = Backend(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="a"))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>"])
    backend.add_tokens([AddedToken("new é")])
    backend.add_special_tokens(["<new>"])
    return backend


def unigram_tokenizer() -> Backend:
    backend = Backend(models.Unigram([(token, -float(i)) for i, token in enumerate(TOKENS)], 0, False))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def word_piece_tokenizer() -> Backend:
    backend = Backend(models.WordPiece({token: i for i, token in enumerate(TOKENS)}, unk_token="a"))
    backend.decoder = decoders.Sequence([decoders.ByteLevel()])
    return backend


def same(path: Path, *, num_ids: int = 0) -> None:
    """Check that the tokenizer in ``path`` gives the same, read in either way."""
    late, whole = Tokenizer.load_late(path, num_ids=num_ids), Tokenizer.load(path, num_ids=num_ids)
    assert late.special_token_ids == whole.special_token_ids
    assert (late.bos_token_id, late.eos_token_id) == (whole.bos_token_id, whole.eos_token_id)
    ids = range(whole.vocab_size + 5)
    assert [late.vocab_entry(i) for i in ids] == [whole.vocab_entry(i) for i in ids]
    assert [late.token_bytes(i) for i in ids] == [whole.token_bytes(i) for i in ids]
    assert late.has_tokens_of(whole, num_ids=len(ids))
    for skip in (False, True):
        for token_id in ids:
            texts = []
            for tokenizer in (late, whole):
                detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
                texts.append(detokenizer.push(token_id) + detokenizer.flush())
            assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "make", [byte_level_tokenizer, byte_fallback_tokenizer, words_tokenizer, unigram_tokenizer, word_piece_tokenizer]
)
@pytest.mark.parametrize(
    "roles",
    [{}, {"bos_token": None, "eos_token": "<|gone|>"}, {"bos_token": "a", "eos_token": "<new>", "pad_token": "b"}],
)
def test_reads_what_the_library_reads(make: Callable[[], Backend], roles: dict[str, Any], tmp_path: Path) -> None:
    write_tokenizer(tmp_path, make(), **roles)
    assert read_vocabulary(tmp_path / "tokenizer.json", {}) is not None
    same(tmp_path)


def test_reads_it_without_the_library(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load_late(write_tokenizer(tmp_path))
    text = tokenizer.detokenizer(skip_special_tokens=False).push(65)
    assert text == tokenizer.token_text(65)
    assert "_backend" not in vars(tokenizer)
    assert tokenizer.encode(text, add_special_tokens=False) == [65]


def test_ids_that_the_model_has_and_the_vocabulary_lacks(tmp_path: Path) -> None:
    filled = read_vocabulary(write_tokenizer(tmp_path, unigram_tokenizer()) / "tokenizer.json", {}, num_ids=12)
    assert filled is not None
    assert filled.spell(11) == "<11>"
    same(write_tokenizer(tmp_path, byte_fallback_tokenizer()), num_ids=400)
    # What is added comes behind what is filled up, and so at other ids than the file says.
    same(write_tokenizer(tmp_path, byte_level_tokenizer()), num_ids=400)


def last_added(raw: dict[str, Any], **values: Any) -> dict[str, Any]:
    """Return the last added token with other ``values``."""
    return {**raw["added_tokens"][-1], **values}


@pytest.mark.parametrize(
    "changed",
    [
        lambda raw: {"decoder": None},
        lambda raw: {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}},
        lambda raw: {"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}]}},
        lambda raw: {"added_tokens": [*raw["added_tokens"][:-1], last_added(raw, id=30)]},
        lambda raw: {"added_tokens": [*raw["added_tokens"], last_added(raw, special=False)]},
        lambda raw: {"model": raw["model"] | {"vocab": {"a": 0, "b": 9, "c": 5}}},
    ],
)
def test_what_only_the_library_can_tell_it_is_asked(
    changed: Callable[[dict[str, Any]], dict[str, Any]], tmp_path: Path
) -> None:
    file = write_tokenizer(tmp_path, words_tokenizer()) / "tokenizer.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps(raw | changed(raw)))
    assert read_vocabulary(file, {}) is None
    same(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", '{"model": ', "[1]", '{"model": {"vocab": {"a": -1}}}', "\ud800"])
def test_a_broken_file_is_named_by_whoever_uses_it(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content.encode(errors="surrogatepass"))
    tokenizer = Tokenizer.load_late(tmp_path)
    with pytest.raises(ModelUnreadable, match=r"tokenizer\.json is not a tokenizer"):
        tokenizer.detokenizer(skip_special_tokens=True)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelUnreadable, match=r"has no tokenizer\.json"):
        tokenizer.token_bytes(0)
