"""The tokenizer and the chat templates that a GGUF file carries.

Two kinds under ``tokenizer.ggml.model`` are read: ``gpt2``, byte-level BPE with its merges, whose way of cutting text
into words is only named; and ``llama``, SentencePiece's BPE, where the score of what two pieces make decides which are
merged first.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from penstock.errors import ModelUnreadable
from penstock.gguf.reader import GGUFFile, read_gguf

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
"""Of ``tokenizer.ggml.token_type``"""
_ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How GPT-4 cuts text into words, and after it Llama 3 (three digits together) and Qwen2 (each alone)."""


def _split(digits: str) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(_WORDS.format(digits=digits)), behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


_PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {
    "gpt-2": _gpt2,
    "smollm": _single_digits,
    "starcoder": _single_digits,
    "llama-bpe": lambda: _split("{1,3}"),
    "qwen2": lambda: _split(""),
    "deepseek-r1-qwen": lambda: _split(""),
}
"""By ``tokenizer.ggml.pre``."""
_WHOLE_WORDS_FIRST = ("llama-bpe",)
"""Where a word that is a token is that token, whatever merges would make of it."""
_COMPOSED = ("qwen2", "deepseek-r1-qwen")
"""Where text is brought into Unicode's composed form first."""


def gguf_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer in file ``path``. Raises ``ModelUnreadable`` if it is broken or of an unknown kind."""
    file = read_gguf(path)
    kind, tokens = _get(file, "model"), _get(file, "tokens")
    if not isinstance(tokens, list) or len(set(map(str, tokens))) != len(tokens):
        raise ModelUnreadable(f"{path} has no list of different tokens; fetch the file again")
    build = {"gpt2": _byte_level, "llama": _sentence_piece}.get(kind)
    if build is None:
        raise ModelUnreadable(f"{path}: a tokenizer of the kind {kind!r} is not read from GGUF; {_REMEDY}")
    try:
        tokenizer = build(file, tokens)
        _add_tokens(tokenizer, tokens, _get(file, "token_type") or [])
        _add_ends(tokenizer, file, tokens, begins=kind == "llama" or _get(file, "pre") == "llama-bpe")
    except ModelUnreadable:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise ModelUnreadable(f"{path} has a broken tokenizer ({error}); fetch the file again") from error
    return tokenizer


_REMEDY = "serve the model from a directory with tokenizer.json"


def gguf_special_tokens(path: Path) -> dict[str, str]:
    """Return the special tokens of the model in file ``path`` by role."""
    file = read_gguf(path)
    tokens = _get(file, "tokens") or []
    ids = {role: _get(file, f"{name}_token_id") for name, role in _ROLES.items()}
    return {role: tokens[i] for role, i in ids.items() if isinstance(i, int) and 0 <= i < len(tokens)}


def gguf_chat_templates(path: Path) -> dict[str, str]:
    """Return the chat templates in file ``path`` by name."""
    metadata, prefix = read_gguf(path).metadata, "tokenizer.chat_template"
    named = {key.removeprefix(f"{prefix}."): value for key, value in metadata.items() if key.startswith(f"{prefix}.")}
    templates = named | ({"default": metadata[prefix]} if prefix in metadata else {})
    return {name: template for name, template in templates.items() if isinstance(template, str)}


def _get(file: GGUFFile, key: str) -> Any:
    return file.metadata.get(f"tokenizer.ggml.{key}")


def _byte_level(file: GGUFFile, tokens: list[str]) -> Tokenizer:
    name = _get(file, "pre")
    if name not in _PRE_TOKENIZERS:
        raise ModelUnreadable(
            f"{file.path}: words are cut as {name!r} says, and Penstock knows {', '.join(_PRE_TOKENIZERS)}; {_REMEDY}"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in _get(file, "merges") or []]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=name in _WHOLE_WORDS_FIRST))
    if name in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[name]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(file: GGUFFile, tokens: list[str]) -> Tokenizer:
    scores, kinds = _get(file, "scores"), _get(file, "token_type") or []
    unknown = [token for token, kind in zip(tokens, kinds, strict=False) if kind == _UNKNOWN]
    prefixed = _get(file, "add_space_prefix") is not False
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: token_id for token_id, token in enumerate(tokens)},
            merges=_merges(dict(zip(tokens, scores, strict=True))),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefixed else spaces
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prefixed else [])
    )
    return tokenizer


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Return every pair of pieces that makes a piece, the best piece's first."""
    pairs = [
        (-score, rank, piece[:cut], piece[cut:])
        for rank, (piece, score) in enumerate(scores.items())
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [(left, right) for _, _, left, right in sorted(pairs)]


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], kinds: list[int]) -> None:
    """Have control tokens and the vendor's own found in text before it is cut into words."""
    marked = zip(tokens, kinds, strict=False)
    added = [(token, kind) for token, kind in marked if kind in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in added if k == _CONTROL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in added if k == _USER_DEFINED])


def _add_ends(tokenizer: Tokenizer, file: GGUFFile, tokens: list[str], *, begins: bool) -> None:
    """Have texts begin and end with the tokens the file says; ``begins`` is what it means if it does not say."""

    def wanted(name: str, default: bool) -> str | None:
        token_id, says = _get(file, f"{name}_token_id"), _get(file, f"add_{name}_token")
        return tokens[token_id] if token_id is not None and (default if says is None else says) else None

    first, last = wanted("bos", begins), wanted("eos", False)
    ends = [token for token in (first, last) if token is not None]
    if ends:
        parts = [*([first] if first else []), "$A", *([last] if last else [])]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=parts, special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(ends)]
        )
