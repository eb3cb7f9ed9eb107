"""Runs a decoder over many sequences one layer at a time, what is between layers being kept in a file.

T tokens of all sequences, E hidden width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.compress.calibration.pictures import Pictures, text_follows
from penstock.compress.units import NamedTensors, Observer, WatchedOps
from penstock.kernels import BatchLayout, KVBlocks, Ops
from penstock.models import ModelConfig
from penstock.models.frame import DecoderBody, DecoderEnds, DecoderLayer
from penstock.models.model import new_cache
from penstock.models.parts import Loader
from penstock.models.weights import TensorSource

BATCH_TOKENS = 4096
"""Tokens that run at a time; a longer sequence runs alone"""
_LOGIT_ROWS = 64
"""Tokens whose logits are computed at a time where they are but judged"""
_BLOCK = 16


class LayerStream:
    """Sequences on their way through a model of which one layer is in memory. Activations are float32."""

    def __init__(
        self,
        config: ModelConfig,
        weights: TensorSource,
        sequences: Sequence[Sequence[int]],
        ops: Ops,
        *,
        pictures: Pictures | None = None,
        as_served: bool = False,
    ) -> None:
        """``pictures`` are the sequences'. ``as_served``: codes run as when the model is served, and not as floats."""
        self.num_tokens = sum(map(len, sequences))
        self.num_layers = config.num_layers
        self._config = config
        self._weights = weights
        self._pictures = pictures
        self._as_served = as_served
        self._sequences = sequences
        self._ops = ops
        self._body = DecoderBody(config, ops, max(map(len, sequences)))
        self._batches = _batches([len(sequence) for sequence in sequences])

    def ends(self) -> DecoderEnds:
        """Return the model's ends, read anew: they are as large as layers, and needed twice."""
        return DecoderEnds(Loader(self._config, self._weights, "float32", self._ops, adaptable=False))

    def embed(self, path: Path) -> None:
        """Write what the first layer reads to file ``path``."""
        ends, pictures = self.ends(), self._pictures
        tensors = NamedTensors(self._weights, as_served=self._as_served)
        loader = Loader(self._config, tensors, "float32", self._ops, adaptable=False)
        encoder = None if pictures is None else pictures.load(loader)
        with path.open("wb") as out:
            for batch, (tokens, _) in zip(self._batches, self._rows(), strict=True):
                x = ends.embed(tokens)
                if pictures is not None and encoder is not None:
                    parts = torch.split(x, [len(self._sequences[i]) for i in batch])
                    for i, part in zip(batch, parts, strict=True):
                        pictures.insert(encoder, i, part)
                out.write(x.numpy().tobytes())

    def run_layer(
        self,
        index: int,
        source: Path,
        target: Path | None,
        *,
        replaced: Mapping[str, Tensor] | None = None,
        observe: Observer | None = None,
        observe_cache: Callable[[KVBlocks], None] | None = None,
        progress: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        """Run layer ``index`` on the file ``source`` and write what the next one reads to ``target``, if it is given.

        ``replaced`` are tensors that stand in for the checkpoint's; ``observe`` is told what each product reads, and
        ``observe_cache`` a batch's keys and values.
        """
        tensors = NamedTensors(self._weights, replaced, as_served=self._as_served)
        ops = WatchedOps(self._ops, tensors, observe)
        layer = DecoderLayer.load(Loader(self._config, tensors, "float32", ops, adaptable=False), index)
        hidden = self.read(source)
        single = replace(self._config, layers=self._config.layers[:1])
        # Written rather than mapped: where the disk is full, a write fails, and a mapping ends the process.
        with nullcontext() if target is None else target.open("wb") as out:
            for batch, (_, rows) in zip(self._batches, self._rows(), strict=True):
                lengths = [len(self._sequences[i]) for i in batch]
                starts = [0, *accumulate(-(-length // _BLOCK) for length in lengths)]
                tables = [range(start, end) for start, end in pairwise(starts)]
                layout = BatchLayout.pack(lengths, lengths, tables, _BLOCK, **self._seen(batch, lengths))
                (kv,) = new_cache(single, self._ops, "float32", starts[-1], _BLOCK)
                x = self._body.run_layer(layer, torch.from_numpy(hidden[rows].copy()), kv, self._body.begin(layout))
                if observe_cache is not None:
                    observe_cache(kv)
                if out is not None:
                    out.write(x.numpy().tobytes())
                progress(sum(lengths))

    def run_through(
        self,
        path: Path,
        progress: Callable[[int, int], None] = lambda done, total: None,
        compare: Callable[[Path, Path], None] = lambda before, after: None,
    ) -> Path:
        """Run all layers, by way of files called as ``path``, and return the file with what the last one left.

        ``compare`` is given the files of what each layer read and left.
        """
        here, there = path.with_suffix(".0"), path.with_suffix(".1")
        self.embed(here)
        for index in range(self._config.num_layers):
            self.run_layer(index, here, there)
            compare(here, there)
            here, there = there, here
            progress(index + 1, self._config.num_layers)
        there.unlink()
        return here

    def finished(self, source: Path, *, most: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the token ids [t] and logits [t, V] of one sequence after another, from what the last layer left.

        Of ``most`` tokens at the end of each, if that is given.
        """
        ends, hidden, end = self.ends(), self.read(source), 0
        for sequence in self._sequences:
            end += len(sequence)
            num_rows = min(most or len(sequence), len(sequence))
            rows = torch.from_numpy(hidden[end - num_rows : end].copy())
            yield torch.tensor(sequence[-num_rows:]), ends.logits(ends.finish(rows))

    def loss(self, source: Path) -> float:
        """Return the nats per token at which text is predicted, from what the last layer left."""
        ends, hidden, start, total, count = self.ends(), self.read(source), 0, 0.0, 0
        for sequence in self._sequences:
            ids = torch.tensor(sequence)
            places = text_follows(ids, self._config.vision).nonzero().flatten()
            # Logits are large: those of a whole sequence would take as much memory as all else.
            for first in range(0, len(places), _LOGIT_ROWS):
                part = places[first : first + _LOGIT_ROWS]
                rows = torch.from_numpy(hidden[start + part.numpy()])
                logits = ends.logits(ends.finish(rows))
                total += F.cross_entropy(logits, ids[part + 1], reduction="sum").item()
            count += len(places)
            start += len(sequence)
        return total / max(count, 1)

    def similarity(self, before: Path, after: Path) -> float:
        """Return the mean cosine between a token's hidden states in two files."""
        x, y, total = self.read(before), self.read(after), 0.0
        for _, rows in self._rows():
            total += (
                F.cosine_similarity(torch.from_numpy(x[rows].copy()), torch.from_numpy(y[rows].copy())).sum().item()
            )
        return total / self.num_tokens

    def read(self, path: Path) -> np.memmap[tuple[int, int], np.dtype[np.float32]]:
        """Return the hidden states [T, E] in file ``path``."""
        return np.memmap(path, np.float32, "r", shape=(self.num_tokens, self._config.hidden_size))

    @property
    def num_bytes(self) -> int:
        """Bytes of one file of hidden states."""
        return self.num_tokens * self._config.hidden_size * 4

    def _seen(self, batch: list[int], lengths: list[int]) -> dict[str, Any]:
        """Return what pictures change in the layout of a batch of sequences."""
        if self._pictures is None:
            return {}
        vision = self._config.vision
        return {
            "positions": self._pictures.positions(vision, batch, lengths),
            "visible": self._pictures.visible(vision, batch, lengths),
        }

    def _rows(self) -> Iterator[tuple[Tensor, slice]]:
        """Yield the tokens of each batch, and where they lie among all."""
        start = 0
        for batch in self._batches:
            tokens = torch.tensor([token for i in batch for token in self._sequences[i]])
            yield tokens, slice(start, start + len(tokens))
            start += len(tokens)


def _batches(lengths: list[int]) -> list[list[int]]:
    """Return neighbouring sequences together as long as they fit."""
    batches: list[list[int]] = []
    room = 0
    for i, length in enumerate(lengths):
        if length > room or not batches:
            batches.append([])
            room = BATCH_TOKENS
        batches[-1].append(i)
        room -= length
    return batches
