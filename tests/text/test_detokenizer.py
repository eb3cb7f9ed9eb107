import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from penstock.text import Detokenizer, Tokenizer
from penstock.text.detokenizer import (
    REPLACEMENT,
    ByteLevelDetokenizer,
    PieceDetokenizer,
    WindowDetokenizer,
)
from tests.fakes.tokenizer_files import CHINESE_PIECES, byte_fallback_tokenizer, byte_level_tokenizer

BYTE_LEVEL = Tokenizer.of(byte_level_tokenizer())
BYTE_FALLBACK = Tokenizer.of(byte_fallback_tokenizer())


def words_tokenizer(decoder: decoders.Decoder | None) -> Tokenizer:
    tokens = ["the", "play", "##ing", "##s", "a</w>", "b</w>", "c", "▁x", "▁", "y"]
    backend = Backend(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="the"))
    if decoder is not None:
        backend.decoder = decoder
    return Tokenizer.of(backend)


def stream(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@given(st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 3), max_size=40), st.booleans())
def test_byte_level_equals_decode_for_any_ids(ids: list[int], skip: bool) -> None:
    detokenizer = BYTE_LEVEL.detokenizer(skip_special_tokens=skip)
    assert isinstance(detokenizer, ByteLevelDetokenizer)
    assert "".join(stream(detokenizer, ids)) == BYTE_LEVEL.decode(ids, skip_special_tokens=skip)


@given(st.text(max_size=20))
def test_byte_level_emits_whole_characters_only(text: str) -> None:
    text = text.encode(errors="ignore").decode()
    pieces = stream(
        BYTE_LEVEL.detokenizer(skip_special_tokens=False), BYTE_LEVEL.encode(text, add_special_tokens=False)
    )
    assert "".join(pieces) == text
    assert REPLACEMENT in text or not any(REPLACEMENT in piece for piece in pieces)


def test_an_emoji_split_over_tokens_comes_whole_with_its_last_byte() -> None:
    ids = BYTE_LEVEL.encode("👍!", add_special_tokens=False)
    assert stream(BYTE_LEVEL.detokenizer(skip_special_tokens=False), ids) == ["", "", "👍", "!", ""]


def test_half_a_character_at_the_end_becomes_a_replacement_character() -> None:
    ids = BYTE_LEVEL.encode("ok👍", add_special_tokens=False)[:-1]
    assert stream(BYTE_LEVEL.detokenizer(skip_special_tokens=False), ids)[-1] == REPLACEMENT


def is_settled(ids: list[int]) -> bool:
    """No run of byte tokens shows a character and then turns out not to be UTF-8."""
    run = b""
    for token_id in [*ids, -1]:
        if token_id >= 0 and BYTE_FALLBACK.vocab_entry(token_id).startswith("<0x"):
            run += BYTE_FALLBACK.token_bytes(token_id)
        elif token_id < BYTE_FALLBACK.vocab_size:
            try:
                run.decode()
            except UnicodeDecodeError as error:
                if error.start > 0:
                    return False
            run = b""
    return True


def last_ids(pieces: list[str]) -> list[int]:
    return [ids[-1] for ids in BYTE_FALLBACK.encode_batch(pieces, add_special_tokens=False)]


@given(
    st.lists(
        st.integers(0, BYTE_FALLBACK.vocab_size - 1) | st.sampled_from(last_ids([*CHINESE_PIECES, "a", " a"])),
        max_size=30,
    ).filter(is_settled)
)
def test_byte_fallback_equals_decode(ids: list[int]) -> None:
    detokenizer = BYTE_FALLBACK.detokenizer(skip_special_tokens=False)
    assert isinstance(detokenizer, PieceDetokenizer)
    assert "".join(stream(detokenizer, ids)) == BYTE_FALLBACK.decode(ids)


@given(st.text(max_size=20), st.booleans())
def test_byte_fallback_equals_decode_for_text(text: str, skip: bool) -> None:
    ids = BYTE_FALLBACK.encode(text.encode(errors="ignore").decode() + "</s>é", add_special_tokens=False)
    streamed = "".join(stream(BYTE_FALLBACK.detokenizer(skip_special_tokens=skip), ids))
    assert streamed == BYTE_FALLBACK.decode(ids, skip_special_tokens=skip)


def test_a_byte_run_that_breaks_keeps_what_was_shown() -> None:
    entries = {BYTE_FALLBACK.vocab_entry(i): i for i in range(BYTE_FALLBACK.vocab_size)}
    ids = [entries[f"<0x{byte:02X}>"] for byte in (*"é".encode(), 0xE4, 0xFF, 0x41)] + [entries["a"]]
    assert stream(BYTE_FALLBACK.detokenizer(skip_special_tokens=False), ids) == [
        "", "é", "", REPLACEMENT * 2, REPLACEMENT, "a", ""
    ]  # fmt: skip


@pytest.mark.parametrize(
    "decoder", [None, decoders.WordPiece(), decoders.BPEDecoder(), decoders.Metaspace(), decoders.ByteFallback()]
)
@given(data=st.data())
def test_other_decoders_equal_decode(decoder: decoders.Decoder | None, data: st.DataObject) -> None:
    tokenizer = words_tokenizer(decoder)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=60))
    detokenizer = tokenizer.detokenizer(skip_special_tokens=False)
    assert isinstance(detokenizer, WindowDetokenizer)
    assert "".join(stream(detokenizer, ids)) == tokenizer.decode(ids)


def test_a_window_stays_bounded_when_nothing_is_ever_whole() -> None:
    tokenizer = Tokenizer.of(byte_level_tokenizer())
    sizes = []

    def decode(ids: list[int]) -> str:
        sizes.append(len(ids))
        return tokenizer.decode(ids)

    broken = tokenizer.encode("👍", add_special_tokens=False)[-1]
    streamed = "".join(stream(WindowDetokenizer(decode), [broken] * 1000))
    assert streamed == REPLACEMENT * 1000
    assert max(sizes) <= WindowDetokenizer.MAX_PENDING + 2 * WindowDetokenizer.NUM_CONTEXT


def test_a_token_costs_a_few_microseconds() -> None:
    ids = BYTE_LEVEL.encode("hello world, 你好 " * 500, add_special_tokens=False)

    def seconds_per_token() -> float:
        push = BYTE_LEVEL.detokenizer(skip_special_tokens=True).push
        start = time.process_time()
        for token_id in ids:
            push(token_id)
        return (time.process_time() - start) / len(ids)

    assert min(seconds_per_token() for _ in range(5)) < 5e-6
