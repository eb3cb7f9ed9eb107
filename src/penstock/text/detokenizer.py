"""Turn token ids into text one token at a time, never emitting half a character.

The concatenation of what a detokenizer returns equals ``Tokenizer.decode`` of all its ids. Which class does
it depends on the tokenizer's decoder: byte-level BPE (GPT-2, Llama 3, Qwen) maps tokens to bytes;
SentencePiece with byte fallback (Llama 2, Mistral) maps tokens to text, or to single bytes where the
vocabulary has no character; any other decoder is asked again about a short window of tokens.
"""

import re
from codecs import utf_8_decode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Detokenizer(Protocol):
    """The text of one sequence, growing by one token at a time. Ids that name no token add nothing.

    ``copy.copy`` gives a second one that goes on from the same place.
    """

    def push(self, token_id: int) -> str:
        """Return the whole characters that this token completes."""

    def flush(self) -> str:
        """Return the rest after the last token: replacement characters for half a character, usually nothing."""


class TokenTable(dict[int, T]):
    """What is made of each token, when it is first asked for: a vocabulary has hundreds of thousands.

    Models pad their vocabulary past the tokenizer's: an id that names no token is an empty one.
    """

    def __init__(self, spell: Callable[[int], str], convert: Callable[[str], T]) -> None:
        """``spell`` gives the token of an id as the vocabulary writes it, and ``convert`` what it becomes."""
        self._spell = spell
        self._convert = convert

    def __missing__(self, token_id: int) -> T:
        value = self[token_id] = self._convert(self._spell(token_id))
        return value


class ByteLevelDetokenizer:
    """Detokenizer for decoders that map every token to bytes and read all bytes as UTF-8."""

    def __init__(self, table: "TokenTable[bytes]") -> None:
        """``table`` gives each token id's bytes and is shared by all sequences."""
        self._table = table
        self._pending = b""

    def push(self, token_id: int) -> str:
        """Return the whole characters that this token completes."""
        data = self._pending + self._table[token_id]
        text, num_read = utf_8_decode(data, "replace", False)
        self._pending = data[num_read:]
        return text

    def flush(self) -> str:
        """Return a replacement character if the bytes end inside a character."""
        text, _ = utf_8_decode(self._pending, "replace", True)
        self._pending = b""
        return text


@dataclass(frozen=True, kw_only=True, slots=True)
class PieceTable:
    """What a SentencePiece-like decoder makes of each token."""

    pieces: "TokenTable[str | int]"
    """By token id: its text, or the value of the single byte it stands for."""
    strip: str = ""
    """A character removed from the start of the whole text..."""
    num_strip: int = 0
    """...at most this many times."""


class PieceDetokenizer:
    """Detokenizer for decoders that map every token to text or to one byte.

    A run of byte tokens is shown as its characters complete. Where a run turns out not to be UTF-8, each byte
    not yet shown becomes a replacement character; ``Tokenizer.decode``, which sees the whole run at once,
    would have replaced its valid characters as well.
    """

    def __init__(self, table: PieceTable) -> None:
        self._pieces = table.pieces
        self._strip = table.strip
        self._num_strip = table.num_strip
        self._pending = b""
        self._run_broken = False

    def push(self, token_id: int) -> str:
        """Return the whole characters that this token completes."""
        piece = self._pieces[token_id]
        if isinstance(piece, int):
            text = self._push_byte(piece)
        elif piece:
            text = self._end_run() + piece
        else:
            return ""
        return self._stripped(text) if self._num_strip else text

    def flush(self) -> str:
        """Return replacement characters for bytes that complete no character."""
        return self._end_run()

    def _push_byte(self, value: int) -> str:
        if self._run_broken:
            return REPLACEMENT
        data = self._pending + bytes((value,))
        try:
            text, num_read = utf_8_decode(data, "strict", False)
        except UnicodeDecodeError:
            self._run_broken, self._pending = True, b""
            return REPLACEMENT * len(data)
        self._pending = data[num_read:]
        return text

    def _end_run(self) -> str:
        text = REPLACEMENT * len(self._pending)
        self._pending, self._run_broken = b"", False
        return text

    def _stripped(self, text: str) -> str:
        while self._num_strip and text:
            if text[0] != self._strip:
                self._num_strip = 0
                break
            text = text[1:]
            self._num_strip -= 1
        return text


class WindowDetokenizer:
    """Detokenizer for any decoder: decodes the last few tokens again with each new one.

    A few tokens already shown stay in the window as context, because a decoder may treat the first or last
    token of its input differently.
    """

    NUM_CONTEXT = 6
    MAX_PENDING = 32
    """Tokens whose text may be held back while it ends in a replacement character."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._num_shown = 0
        """Tokens of the window whose text has been returned."""
        self._shown = ""

    def push(self, token_id: int) -> str:
        """Return the whole characters that this token completes."""
        self._window = [*self._window, token_id]
        text = self._decode(self._window)
        is_open = text.endswith(REPLACEMENT) or len(text) < len(self._shown)
        if is_open and len(self._window) - self._num_shown < self.MAX_PENDING:
            return ""
        return self._advance(text)

    def flush(self) -> str:
        """Return the text that was held back."""
        return self._advance(self._decode(self._window)) if self._window else ""

    def _advance(self, text: str) -> str:
        added = text[len(self._shown) :]
        if len(self._window) > 2 * self.NUM_CONTEXT:
            self._window = self._window[-self.NUM_CONTEXT :]
            text = self._decode(self._window)
        self._shown, self._num_shown = text, len(self._window)
        return added


def byte_level_alphabet() -> dict[str, int]:
    """Return the printable character that byte-level BPE writes for each byte, by character."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = (byte for byte in range(0x100) if byte not in shown)
    return {chr(byte): byte for byte in shown} | {chr(0x100 + rank): byte for rank, byte in enumerate(hidden)}


# What the alphabet lacks becomes what no byte can be.
_TO_BYTES = dict.fromkeys(range(0x100), 0xFFFF) | {ord(char): byte for char, byte in byte_level_alphabet().items()}


def bytes_of(token: str) -> bytes:
    """Return the bytes of a token of a byte-level vocabulary."""
    try:
        return token.translate(_TO_BYTES).encode("latin-1")
    except UnicodeEncodeError:  # an added token is plain text
        return token.encode()


def is_byte_level(decoder: Mapping[str, Any]) -> bool:
    """Say whether a decoder, as written in tokenizer.json, is byte-level and nothing else."""
    if decoder["type"] == "Sequence":
        return len(decoder["decoders"]) == 1 and is_byte_level(decoder["decoders"][0])
    return bool(decoder["type"] == "ByteLevel")


def piece_table(decoder: Mapping[str, Any], spell: Callable[[int], str]) -> PieceTable | None:
    """Return what a decoder, as written in tokenizer.json, makes of each token; None if it is of another kind.

    Recognized: any number of plain replacements, byte fallback, fuse, and then perhaps a strip at the start.
    """
    steps = list(decoder["decoders"]) if decoder["type"] == "Sequence" else [decoder]
    replacements = []
    while steps and steps[0]["type"] == "Replace" and "String" in steps[0]["pattern"]:
        step = steps.pop(0)
        replacements.append((step["pattern"]["String"], step["content"]))
    strip, num_strip = "", 0
    if steps and steps[-1]["type"] == "Strip" and steps[-1]["stop"] == 0:
        step = steps.pop()
        strip, num_strip = step["content"], step["start"]
    if [step["type"] for step in steps] != ["ByteFallback", "Fuse"]:
        return None

    def piece(token: str) -> str | int:
        for old, new in replacements:
            token = token.replace(old, new)
        byte = _BYTE_TOKEN.fullmatch(token)
        return int(byte[1], 16) if byte else token

    return PieceTable(pieces=TokenTable(spell, piece), strip=strip, num_strip=num_strip)
