"""What token ids stand for."""

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec

from penstock.text.detokenizer import is_byte_level, piece_table


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """All that it takes to make text of token ids."""

    spell: Callable[[int], str]
    """Gives the token as the vocabulary writes it, such as ``Ġhello``; empty for an id that names none."""
    special_token_ids: frozenset[int]
    """What is left out of text that is to have no special tokens"""
    role_ids: Mapping[str, int]
    """By role, such as ``eos_token``, the token that plays it"""
    decoder: Mapping[str, Any] | None
    """How tokens become text, as tokenizer.json writes it"""


def read_vocabulary(file: Path, special_tokens: Mapping[str, str], *, num_ids: int = 0) -> Vocabulary | None:
    """Return the vocabulary in a tokenizer.json, in a fraction of the time and memory that loading all of it takes.

    ``special_tokens`` and ``num_ids`` are as in ``Tokenizer``. None where only the library that encodes can tell what
    ids stand for: of a broken file, of a decoder that is asked itself, and where it may number tokens in its own way.
    """
    try:
        read = msgspec.json.decode(file.read_bytes(), type=_File)
        if read.decoder is None or not (is_byte_level(read.decoder) or piece_table(read.decoder, str)):
            return None
    except (OSError, msgspec.MsgspecError, ValueError, KeyError, TypeError, AttributeError):
        return None
    vocab = read.model.vocab
    ids = vocab if isinstance(vocab, dict) else {piece: rank for rank, (piece, _) in enumerate(vocab)}
    first = 1 + max([*ids.values(), *(token.id for token in read.added_tokens)], default=-1)
    ids.update({f"<{token_id}>": token_id for token_id in range(first, num_ids)})
    if len(ids) < len(vocab) or sorted(ids.values()) != list(range(len(ids))):
        return None
    tokens = [""] * len(ids)
    for token, token_id in ids.items():
        tokens[token_id] = token
    added_ids: set[int] = set()
    for added in read.added_tokens:
        # The library gives ids of its own, whatever the file says: the token's in the vocabulary, or the next.
        if added.id != ids.setdefault(added.content, len(tokens)) or added.id in added_ids or not added.content:
            return None
        added_ids.add(added.id)
        if added.id == len(tokens):
            tokens.append(added.content)
    role_ids = {role: ids[token] for role, token in special_tokens.items() if token in ids}
    marked = (added.id for added in read.added_tokens if added.special)
    return Vocabulary(
        spell=_Spellings(tokens),
        special_token_ids=frozenset([*marked, *role_ids.values()]),
        role_ids=role_ids,
        decoder=read.decoder,
    )


class _AddedToken(msgspec.Struct):
    id: int
    content: str
    special: bool


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]]


class _File(msgspec.Struct):
    model: _Model
    added_tokens: list[_AddedToken] = []
    decoder: dict[str, Any] | None = None


class _Spellings:
    """Tokens by id. In one piece they take 2 MB of 150,000, as strings 12."""

    def __init__(self, tokens: Sequence[str]) -> None:
        encoded = [token.encode() for token in tokens]
        self._text = b"".join(encoded)
        self._begins = array("I", accumulate(map(len, encoded), initial=0))

    def __call__(self, token_id: int) -> str:
        if not 0 <= token_id < len(self._begins) - 1:
            return ""
        return self._text[self._begins[token_id] : self._begins[token_id + 1]].decode()
