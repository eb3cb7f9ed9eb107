"""Calibration texts as token sequences: from a JSONL file, or the standard library's source."""

import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from penstock.compress.calibration.pictures import PictureReader
from penstock.errors import CalibrationUnfit, PenstockError
from penstock.eval.sets.library import library_root, split_documents
from penstock.protocol import Picture
from penstock.text.chat_template import ChatTemplate
from penstock.text.tokenizer import Tokenizer

_FEWEST_TOKENS = 16
"""Of a sequence: what is shorter says little about what follows what"""
_GOOD_TOKENS_PER_INPUT = 8
"""Fewer tokens than inputs leave second moments singular, a few times as many leave them noisy"""
_WORST_SHARE = 0.3
"""Of one token: running text stays below"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions:
    """Which texts, and how much of them."""

    path: Path | None = None
    """JSONL with a ``text`` or ``messages`` in each line, and for models that see ``image`` beside a text, or images
    among messages' parts, by files' names; None: the built-in set"""
    num_samples: int = 128
    """Sequences. More: steadier statistics, and longer"""
    length: int = 512
    """Most tokens of a sequence"""
    seed: int = 0
    force: bool = False
    """Take data that would be refused"""


class Texts(NamedTuple):
    """Token sequences, and what they show."""

    sequences: list[list[int]]
    pictures: list[tuple[Picture, ...]]
    """Of each sequence"""

    @property
    def keys(self) -> list[object]:
        """What tells each sequence from others."""
        return [
            (tuple(sequence), tuple((picture.offset, picture.key.hex()) for picture in pictures))
            for sequence, pictures in zip(*self, strict=True)
        ]

    @property
    def num_tokens(self) -> int:
        """Of all sequences."""
        return sum(map(len, self.sequences))

    @property
    def digest(self) -> str:
        """Differs where any token or picture does."""
        return hashlib.sha256(json.dumps(self.keys).encode()).hexdigest()

    def choose(self, indices: Iterable[int]) -> "Texts":
        """Return some of them."""
        chosen = list(indices)
        return Texts([self.sequences[i] for i in chosen], [self.pictures[i] for i in chosen])


@dataclass(frozen=True, slots=True)
class Calibration:
    """Texts, and what they were taken from."""

    texts: Texts
    source: str
    distinct_tokens: int
    entropy: float
    """Nats per token, of how often each occurs"""
    warnings: tuple[str, ...]

    @property
    def sequences(self) -> list[list[int]]:
        """Of tokens."""
        return self.texts.sequences

    @property
    def num_tokens(self) -> int:
        """Of all sequences."""
        return self.texts.num_tokens

    @property
    def digest(self) -> str:
        """Differs where any token or picture does."""
        return self.texts.digest


def _see_nothing() -> PictureReader:
    raise CalibrationUnfit("there are images among the texts; give texts alone")


def read_calibration(
    options: CalibrationOptions,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    num_inputs: int,
    see: Callable[[], PictureReader] = _see_nothing,
) -> Calibration:
    """Return the sequences to calibrate with, the same ones for the same options and texts.

    ``see`` is asked for what reads images if there are any. ``num_inputs`` is the most inputs that any matrix has.
    Raises ``CalibrationUnfit`` if a line is no record, or if there are too few tokens, unless forced.
    """
    if options.path is None:
        documents, _ = split_documents(library_root())
        records = [_Record(lambda text=document.text: text) for document in documents]  # type: ignore[misc]
        source = f"source of {len(documents)} modules of Python's standard library"
    else:
        records = _read_records(options.path, template, see)
        source = str(options.path)
    sampled = _sample(records, tokenizer, options)
    texts = Texts([sequence for sequence, _ in sampled], [seen for _, seen in sampled])
    counts = Counter(token for sequence, seen in sampled for token in _without(sequence, seen))
    if not counts:
        raise CalibrationUnfit(f"{source} has no text of {_FEWEST_TOKENS} tokens or more; give longer ones")
    num_tokens = texts.num_tokens
    warnings = []
    if num_tokens < num_inputs and not options.force:
        raise CalibrationUnfit(
            f"{source} gives {num_tokens} tokens, fewer than the {num_inputs} inputs of the widest layer: second "
            "moments of so few are singular. Give more texts or samples, or --force"
        )
    good = _GOOD_TOKENS_PER_INPUT * num_inputs
    if num_tokens < good:
        warnings.append(
            f"{num_tokens} tokens are few for layers of {num_inputs} inputs; from {good} on results are "
            "steadier (--samples, --sample-tokens)"
        )
    if len(texts.sequences) < options.num_samples:
        warnings.append(f"{len(texts.sequences)} sequences were found, not the {options.num_samples} asked for")
    num_words = counts.total()
    token, most = counts.most_common(1)[0]
    if most > _WORST_SHARE * num_words:
        warnings.append(f"{most / num_words:.0%} of all tokens are one and the same ({token}); is this running text?")
    entropy = -sum(count / num_words * math.log(count / num_words) for count in counts.values())
    return Calibration(texts, source, len(counts), entropy, tuple(warnings))


def require_likely(loss: float, calibration: Calibration, options: CalibrationOptions) -> None:
    """Raise ``CalibrationUnfit`` if a model, at ``loss`` nats per token, does not know what follows what in the texts.

    Random characters or tokens are like that, and texts of a kind or language that it never saw: how often each token
    occurs then says as much as the model does.
    """
    if loss > calibration.entropy and not options.force:
        raise CalibrationUnfit(
            f"the model predicts the calibration texts no better than the mere frequency of their tokens does "
            f"({loss:.2f} and {calibration.entropy:.2f} nats per token): they are random, or nothing like what it was "
            "trained on. Give texts of the kind it will be used for, or --force"
        )


@dataclass(frozen=True, slots=True)
class _Record:
    render: Callable[[], str]
    see: Callable[[str], tuple[list[int], tuple[Picture, ...]]] | None = None
    """Of a record with images: from its text to tokens and pictures"""


def _without(sequence: list[int], pictures: tuple[Picture, ...]) -> list[int]:
    """Return a sequence's tokens but for placeholders, which say nothing of what follows what."""
    placeholders = {i for one in pictures for i in range(one.offset, one.offset + one.num_tokens)}
    return [token for i, token in enumerate(sequence) if i not in placeholders]


def _sample(
    records: Sequence[_Record], tokenizer: Tokenizer, options: CalibrationOptions
) -> list[tuple[list[int], tuple[Picture, ...]]]:
    """Return random pieces of randomly ordered records, about equally many of each; one of a record with images."""
    rng = random.Random(options.seed)
    order = rng.sample(range(len(records)), len(records))
    pieces_each = -(-options.num_samples // max(len(records), 1))
    sequences: list[tuple[list[int], tuple[Picture, ...]]] = []
    for i in order:
        text, see = records[i].render(), records[i].see
        if see is not None:
            ids, pictures = see(text)
            # Pictures stay whole.
            end = max(options.length, *(picture.offset + picture.num_tokens for picture in pictures))
            sequences.append((ids[:end], pictures))
            if len(sequences) >= options.num_samples:
                break
            continue
        ids = tokenizer.encode(text, add_special_tokens=True)
        starts = range(0, max(len(ids) - options.length, 0) + 1, options.length)
        for start in sorted(rng.sample(starts, min(pieces_each, len(starts)))):
            piece = ids[start : start + options.length]
            if len(piece) >= _FEWEST_TOKENS:
                sequences.append((piece, ()))
        if len(sequences) >= options.num_samples:
            break
    return sequences[: options.num_samples]


def _read_records(path: Path, template: ChatTemplate | None, see: Callable[[], PictureReader]) -> list[_Record]:
    see = cache(see)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationUnfit(f"{path} cannot be read as UTF-8 text ({error}); give a JSONL file") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise CalibrationUnfit(f"{where} is not JSON ({error}); each line is one object") from error
        records.append(_reader(record, path.parent, where, template, see))
    return records


def _reader(
    record: Any, directory: Path, where: str, template: ChatTemplate | None, see: Callable[[], PictureReader]
) -> _Record:
    images = _images(record, directory, where)

    def look(text: str) -> tuple[list[int], tuple[Picture, ...]]:
        return see().tokens(text, images, where)

    if isinstance(record, dict) and isinstance(record.get("text"), str):
        text: str = record["text"]
        return _Record(lambda: see().paired(text, len(images)), look) if images else _Record(lambda: text)
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        raise CalibrationUnfit(f"{where} has neither a text nor messages; each line needs one of them")
    if template is None:
        raise CalibrationUnfit(f"{where} is a chat, and the model has no chat template; give texts")

    def render() -> str:
        try:
            if images:
                return see().rendered(template, record["messages"])
            return template.render(record["messages"], add_generation_prompt=False)
        except PenstockError as error:
            raise CalibrationUnfit(f"{where}: {error.message}") from error

    return _Record(render, look if images else None)


def _images(record: Any, directory: Path, where: str) -> list[Path]:
    """Return the files of a record's images: under ``image``, or those of its messages' parts."""
    named = []
    if isinstance(record, dict):
        named = [record["image"]] if "image" in record else []
        messages = record.get("messages")
        contents = (
            [one.get("content") for one in messages if isinstance(one, dict)] if isinstance(messages, list) else []
        )
        parts = [part for content in contents if isinstance(content, list) for part in content]
        named += [part.get("image") for part in parts if isinstance(part, dict) and part.get("type") == "image"]
    if not all(isinstance(name, str) and name for name in named):
        raise CalibrationUnfit(f"{where}: an image is a file's name, by itself or from where the JSONL is")
    return [directory / name for name in named]
