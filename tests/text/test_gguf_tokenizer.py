"""Tokenizers rebuilt from a GGUF file cut text as the ones they were made from."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, trainers

from penstock.errors import ModelUnreadable
from penstock.text import Tokenizer
from penstock.text.chat_template import ChatTemplate

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, _, BYTE = gguf.TokenType
CORPUS = [path.read_text() for path in sorted(Path(__file__).parents[1].rglob("*.py"))[:20]]
TEXTS = [
    "Hello, world! It's 12345 o'clock; we'LL see.\n\n  Indented\tand\r\nmore   ",
    "Grüße, 東京 🎉 naïve café ½ ٣٤٥",
    "def f(x):\n    return x**2  # squared\n\n\n",
    "",
    " ",
    "<|end|>quoted<|end|> and <tool>used</tool>",
]


def write(path: Path, model: str, tokens: list[str], kinds: Sequence[int], **values: Any) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_array(f"tokenizer.{key}", value)
        elif isinstance(value, bool):
            writer.add_bool(f"tokenizer.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"tokenizer.{key}", value)
        else:
            writer.add_string(f"tokenizer.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def trained(pre: pre_tokenizers.PreTokenizer, *, composed: bool) -> tokenizers.Tokenizer:
    """A byte-level BPE with one control token and two of the vendor's."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre
    if composed:
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=1500, initial_alphabet=sorted(alphabet)))
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens(["<tool>", "</tool>"])
    return tokenizer


def byte_level(regex: str | None, digits: bool = False) -> pre_tokenizers.PreTokenizer:
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if regex is not None:
        steps.append(pre_tokenizers.Split(tokenizers.Regex(regex), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None))
    return pre_tokenizers.Sequence(steps)


QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


@pytest.mark.parametrize(
    ("name", "pre"),
    [
        ("gpt-2", byte_level(None)),
        ("smollm", byte_level(None, digits=True)),
        ("qwen2", byte_level(QWEN2)),
        ("llama-bpe", byte_level(LLAMA3)),
    ],
    ids=["gpt-2", "smollm", "qwen2", "llama-bpe"],
)
def test_byte_level(name: str, pre: pre_tokenizers.PreTokenizer, tmp_path: Path) -> None:
    original = trained(pre, composed=name == "qwen2")
    tokens = [str(original.id_to_token(i)) for i in range(original.get_vocab_size())]
    kinds = [NORMAL] * (len(tokens) - 3) + [CONTROL, USER_DEFINED, USER_DEFINED]
    merges = [" ".join(merge) for merge in json.loads(original.to_str())["model"]["merges"]]
    begins = {"ggml.bos_token_id": tokens.index("<|end|>")} if name == "llama-bpe" else {}
    path = write(tmp_path / "t.gguf", "gpt2", tokens, kinds, **{"ggml.pre": name, "ggml.merges": merges, **begins})
    found = Tokenizer.load(path)
    for text in [*TEXTS, *CORPUS[:3]]:
        expected = original.encode(text, add_special_tokens=False).ids
        assert found.encode(text, add_special_tokens=False) == expected
        assert found.encode(text, add_special_tokens=True) == [*begins.values(), *expected]
        detokenizer = found.detokenizer(skip_special_tokens=False)
        streamed = "".join(map(detokenizer.push, expected)) + detokenizer.flush()
        assert streamed == (normalizers.NFC().normalize_str(text) if name == "qwen2" else text)


PIECES = ["\u2581", "a", "b", "c", "ab", "bc", "\u2581a", "abc", "\u2581ab", "ca", "\u2581\u2581", "aa", "aaa", "bca"]
SCORES = [-1.0, -2.0, -3.0, -4.0, -0.5, -0.2, -0.9, -5.0, -0.1, -6.0, -7.0, -0.3, -0.05, -8.0]
SPM_TOKENS = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *PIECES]
SPM_KINDS = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(PIECES)]


def spm(path: Path, **values: Any) -> Path:
    scores = [0.0] * 259 + SCORES
    ends = {"ggml.bos_token_id": 1, "ggml.eos_token_id": 2, "ggml.unknown_token_id": 0}
    return write(path, "llama", SPM_TOKENS, SPM_KINDS, **{"ggml.scores": scores, **ends, **values})


def merged_by_score(text: str) -> list[str]:
    """SentencePiece's BPE: join the neighbours that make the best piece, the leftmost first, until none do."""
    pieces, score_of = list("\u2581" + text.replace(" ", "\u2581")), dict(zip(PIECES, SCORES, strict=True))
    while True:
        scored = [(-score_of[a + b], i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in score_of]
        if not scored:
            return pieces
        _, i = min(scored)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(spm(tmp_path_factory.mktemp("spm") / "t.gguf"))


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet="abc ", min_size=1, max_size=12))
@example(text="abcab  caaa")
def test_sentence_piece_merges_by_score(text: str, sentence_piece: Tokenizer) -> None:
    ids = sentence_piece.encode(text, add_special_tokens=False)
    assert [sentence_piece.vocab_entry(i) for i in ids] == merged_by_score(text)
    assert sentence_piece.decode(ids) == text


def test_sentence_piece_falls_back_to_bytes_and_begins(sentence_piece: Tokenizer) -> None:
    ids = sentence_piece.encode("aé", add_special_tokens=True)
    assert [sentence_piece.vocab_entry(i) for i in ids] == ["<s>", "\u2581a", "<0xC3>", "<0xA9>"]
    assert sentence_piece.decode(ids, skip_special_tokens=True) == "aé"
    assert sentence_piece.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    detokenizer = sentence_piece.detokenizer(skip_special_tokens=True)
    assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == "aé"


def test_no_space_in_front_where_the_file_says_so(tmp_path: Path) -> None:
    path = spm(tmp_path / "t.gguf", **{"ggml.add_space_prefix": False, "ggml.add_eos_token": True})
    found = Tokenizer.load(path)
    ids = found.encode("ab a", add_special_tokens=True)
    assert [found.vocab_entry(i) for i in ids] == ["<s>", "ab", "\u2581a", "</s>"]
    assert found.decode(ids, skip_special_tokens=True) == "ab a"


def test_templates(tmp_path: Path) -> None:
    assert ChatTemplate.load(spm(tmp_path / "none.gguf")) is None
    values = {"chat_template": "{{ bos_token }}{{ messages[0].content }}", "chat_template.tool_use": "tools"}
    template = ChatTemplate.load(spm(tmp_path / "t.gguf", **values))
    assert template is not None
    messages = [{"role": "user", "content": "hi"}]
    assert template.render(messages, add_generation_prompt=True) == "<s>hi"
    assert template.render(messages, add_generation_prompt=True, tools=[{}]) == "tools"


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        ("bert", {}, "kind 'bert' is not read from GGUF; serve the model from a directory with tokenizer.json"),
        ("gpt2", {"ggml.pre": "parrot"}, "as 'parrot' says, and Penstock knows gpt-2"),
        ("gpt2", {"ggml.pre": "gpt-2", "ggml.merges": ["x y"]}, "broken tokenizer"),
        ("gpt2", {"ggml.pre": "gpt-2", "ggml.merges": ["alone"]}, "broken tokenizer"),
        ("llama", {}, "broken tokenizer"),
        ("llama", {"ggml.scores": [1.0]}, "broken tokenizer"),
        ("gpt2", {"ggml.pre": "gpt-2", "ggml.bos_token_id": 9, "ggml.add_bos_token": True}, "broken tokenizer"),
    ],
)
def test_what_is_broken_or_unknown(model: str, values: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "t.gguf", model, ["a", "b"], [NORMAL, NORMAL], **values)
    with pytest.raises(ModelUnreadable, match=message):
        Tokenizer.load(path)


def test_two_tokens_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(ModelUnreadable, match="no list of different tokens"):
        Tokenizer.load(write(tmp_path / "t.gguf", "gpt2", ["a", "a"], [NORMAL, NORMAL]))
