"""Text to token ids and back, as a model's own tokenizer.json says."""

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.errors import InvalidRequest, ModelUnreadable
from penstock.gguf import is_gguf
from penstock.text.detokenizer import (
    REPLACEMENT,
    ByteLevelDetokenizer,
    Detokenizer,
    PieceDetokenizer,
    PieceTable,
    TokenTable,
    WindowDetokenizer,
    bytes_of,
    is_byte_level,
    piece_table,
)
from penstock.text.special_tokens import read_special_tokens
from penstock.text.vocabulary import Vocabulary, read_vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


class Tokenizer:
    """A model's tokenizer. Thread-safe; encoding and decoding release the interpreter lock.

    Special tokens written out in a text are encoded as the tokens they name, as transformers does: a chat
    template depends on it.
    """

    def __init__(
        self,
        special_tokens: Mapping[str, str],
        open_backend: "Callable[[], Backend]",
        read_vocabulary: Callable[[], Vocabulary | None] = lambda: None,
    ) -> None:
        """``special_tokens`` maps roles such as ``eos_token`` to the token in that role.

        Both calls are made when they are needed; without a vocabulary, ``open_backend`` is what gives one.
        """
        self.special_tokens = special_tokens
        self._open_backend = open_backend
        self._read_vocabulary = read_vocabulary

    @classmethod
    def of(cls, backend: "Backend", special_tokens: Mapping[str, str] | None = None) -> "Tokenizer":
        """Return a tokenizer that takes over ``backend``."""
        return cls(special_tokens or {}, lambda: backend)

    @classmethod
    def load(cls, path: Path, *, num_ids: int = 0) -> "Tokenizer":
        """Return the tokenizer of the model in directory or GGUF file ``path``.

        Ids that it lacks of the first ``num_ids`` read ``<6200>`` and the like, for a model whose vocabulary is not
        known; no text becomes one of them. That takes a BPE tokenizer.
        Raises ``ModelUnreadable`` if it is missing or broken.
        """
        backend = _open(path, num_ids)
        return cls.of(backend, _special_tokens_of(path))

    @classmethod
    def load_late(cls, path: Path, *, num_ids: int = 0) -> "Tokenizer":
        """Return what ``load`` would, for a process that makes text of ids and may never encode any.

        Nothing is read yet: what makes text is at the first use, what encodes when something is encoded. So it is by
        using it that ``ModelUnreadable`` is raised.
        """
        special_tokens = _special_tokens_of(path)
        file = path / "tokenizer.json"
        return cls(
            special_tokens,
            lambda: _open(path, num_ids),
            lambda: None if is_gguf(path) else read_vocabulary(file, special_tokens, num_ids=num_ids),
        )

    @cached_property
    def _backend(self) -> "Backend":
        backend = self._open_backend()
        _prepare(backend, self.special_tokens)
        return backend

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return self._read_vocabulary() or _vocabulary_of(self._backend, self.special_tokens)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Ids that ``skip_special_tokens`` leaves out of text."""
        return self._vocabulary.special_token_ids

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text, if the tokenizer names one."""
        return self._vocabulary.role_ids.get("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text, if the tokenizer names one."""
        return self._vocabulary.role_ids.get("eos_token")

    def special_token_id(self, token: str) -> int | None:
        """Return the id of a special token, None if ``token`` is ordinary text to this tokenizer."""
        token_id = self._backend.token_to_id(token)
        return token_id if token_id in self.special_token_ids else None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of ``text``, of any length; blocks for about a microsecond per character.

        Raises ``InvalidRequest`` for text that is not Unicode, such as half a surrogate pair.
        """
        return self.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def encode_batch(self, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Return the token ids of each text, encoded in parallel. Raises as ``encode`` does."""
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InvalidRequest(
                    f"text holds the lone surrogate {text[error.start]!a} at character {error.start}, "
                    "which no tokenizer can read; send valid Unicode."
                ) from None
        # Unlike `encode`, this releases the interpreter lock, and it computes no offsets.
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of ``ids``; ids that name no token add nothing."""
        return str(self._backend.decode(ids, skip_special_tokens=skip_special_tokens))

    def vocab_entry(self, token_id: int) -> str:
        """Return the token as the vocabulary spells it, such as ``Ġhello``; empty if there is none."""
        return self._vocabulary.spell(token_id)

    def token_text(self, token_id: int) -> str:
        """Return the token's own text, with replacement characters where it is part of a character."""
        return self.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes the token stands for, which may be part of a character."""
        if self._bytes is not None:
            return self._bytes[token_id]
        if self._pieces is not None:
            piece = self._pieces.pieces[token_id]
            return bytes((piece,)) if isinstance(piece, int) else piece.encode()
        text = self.decode([token_id])
        return (self.vocab_entry(token_id) if text == REPLACEMENT else text).encode()

    def has_tokens_of(self, other: "Tokenizer", *, num_ids: int) -> bool:
        """Whether each of the first ``num_ids`` ids stands for the same bytes in both."""
        return all(self.token_bytes(token_id) == other.token_bytes(token_id) for token_id in range(num_ids))

    def detokenizer(self, *, skip_special_tokens: bool) -> Detokenizer:
        """Return a new detokenizer for one sequence."""
        if self._bytes is not None:
            return ByteLevelDetokenizer(self._plain_bytes if skip_special_tokens else self._bytes)
        if self._pieces is not None:
            assert self._plain_pieces is not None
            return PieceDetokenizer(self._plain_pieces if skip_special_tokens else self._pieces)
        return WindowDetokenizer(lambda ids: self.decode(ids, skip_special_tokens=skip_special_tokens))

    def _spell_plain(self, token_id: int) -> str:
        """Return ``vocab_entry``, empty for a special token."""
        return "" if token_id in self.special_token_ids else self.vocab_entry(token_id)

    @cached_property
    def _bytes(self) -> TokenTable[bytes] | None:
        decoder = self._vocabulary.decoder
        if decoder is None or not is_byte_level(decoder):
            return None
        return TokenTable(self.vocab_entry, bytes_of)

    @cached_property
    def _plain_bytes(self) -> TokenTable[bytes]:
        """The byte table with special tokens blank."""
        return TokenTable(self._spell_plain, bytes_of)

    @cached_property
    def _pieces(self) -> PieceTable | None:
        decoder = self._vocabulary.decoder
        return None if decoder is None else piece_table(decoder, self.vocab_entry)

    @cached_property
    def _plain_pieces(self) -> PieceTable | None:
        """The piece table with special tokens blank."""
        decoder = self._vocabulary.decoder
        return None if decoder is None else piece_table(decoder, self._spell_plain)


def _open(path: Path, num_ids: int) -> "Backend":
    """See ``Tokenizer.load``."""
    if is_gguf(path):
        # Brings numpy.
        from penstock.text.gguf_tokenizer import gguf_tokenizer

        return gguf_tokenizer(path)
    from tokenizers import Tokenizer as Backend

    file = path / "tokenizer.json"
    if not file.is_file():
        raise ModelUnreadable(
            f"{path} has no tokenizer.json. If the model has another kind of tokenizer, convert it with "
            f"transformers: AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained({str(path)!r})."
        )
    try:
        content = file.read_bytes()
        return Backend.from_buffer(_padded(content, num_ids) if num_ids else content)
    except Exception as error:  # the library raises nothing narrower
        raise ModelUnreadable(
            f"{file} is not a tokenizer ({error}). The file is damaged or of an unknown version: "
            "copy or download it again."
        ) from error


def _special_tokens_of(path: Path) -> Mapping[str, str]:
    if not is_gguf(path):
        return read_special_tokens(path)
    from penstock.text.gguf_tokenizer import gguf_special_tokens

    return gguf_special_tokens(path)


def _prepare(backend: "Backend", special_tokens: Mapping[str, str]) -> None:
    """Have all of a prompt encoded, and tokens that have a role treated as special, marked in tokenizer.json or not."""
    # A limit meant for training would silently cut prompts.
    backend.no_truncation()
    backend.no_padding()
    marked = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    for token in special_tokens.values():
        if token not in marked and backend.token_to_id(token) is not None:
            backend.add_special_tokens([token])


def _vocabulary_of(backend: "Backend", special_tokens: Mapping[str, str]) -> Vocabulary:
    ids = {role: backend.token_to_id(token) for role, token in special_tokens.items()}
    added = backend.get_added_tokens_decoder()
    return Vocabulary(
        spell=lambda token_id: backend.id_to_token(token_id) or "",
        special_token_ids=frozenset(token_id for token_id, token in added.items() if token.special),
        role_ids={role: token_id for role, token_id in ids.items() if token_id is not None},
        decoder=None if backend.decoder is None else json.loads(backend.decoder.__getstate__()),
    )


def _padded(content: bytes, num_ids: int) -> bytes:
    """Return a tokenizer.json whose vocabulary has all of the first ``num_ids`` ids."""
    raw = json.loads(content)
    vocabulary = raw["model"]["vocab"]
    first = 1 + max([*vocabulary.values(), *(token["id"] for token in raw["added_tokens"])])
    vocabulary.update({f"<{token_id}>": token_id for token_id in range(first, num_ids)})
    return json.dumps(raw).encode()
