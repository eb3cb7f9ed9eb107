"""The layers of which every tower is made, a part of the rows at a time.

What is done in parts is a generator that yields how much work each took, in multiply-adds, so that whoever runs it can
do something else in between. N rows, E width, H heads, D head width.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol, TypeVar

from penstock.kernels import Linear
from penstock.kernels.tensor import Tensor
from penstock.models.vision.attention import ROWS_AT_ONCE, PackedAttention, Part

T = TypeVar("T")
Parts = Generator[int, None, T]
"""Work in parts, and what comes of it"""
Norm = Callable[[Tensor], Tensor]


class FeedForward(Protocol):
    """The second block of a layer."""

    def __call__(self, x: Tensor, added: Tensor | None) -> Tensor:
        """Return [N, E] from ``x`` [N, E], plus ``added``, which may be overwritten."""


@dataclass(frozen=True, slots=True)
class RowWork:
    """How much work a layer is."""

    width: int
    """E"""
    mlp_weights: int

    @property
    def weights(self) -> int:
        """Multiply-adds of a row that sees nothing."""
        return 4 * self.width**2 + self.mlp_weights

    def before(self, part: Part) -> int:
        """Return what comes before attention."""
        return part.num_rows * 3 * self.width**2

    def of(self, part: Part) -> int:
        """Return what all of a layer is."""
        return part.num_rows * self.weights + 2 * part.num_seen * self.width


@dataclass(frozen=True, slots=True)
class Layer:
    """Attention and a feed-forward, each with a norm before."""

    attention_norm: Norm
    qkv: Linear
    project: Linear
    mlp_norm: Norm
    mlp: FeedForward
    work: RowWork

    def __call__(self, x: Tensor, attention: PackedAttention) -> Parts[None]:
        """Bring ``x`` [N, E], in place, to what the next layer reads."""
        for parts in attention.groups:
            if len(parts) == 1:
                (part,) = parts
                self._finish(x, part, part.write(self.qkv(self.attention_norm(x[part.rows]))))
                yield self.work.of(part)
                continue
            queries = []
            for part in parts:
                # A copy of a third, so that the keys and values beside them can go.
                queries.append(part.write(self.qkv(self.attention_norm(x[part.rows]))).clone())
                yield self.work.before(part)
            for part in parts:
                self._finish(x, part, queries.pop(0))
                yield self.work.of(part) - self.work.before(part)

    def _finish(self, x: Tensor, part: Part, q: Tensor) -> None:
        rows = x[part.rows]
        added = self.project(part.attend(q), rows)
        rows.copy_(self.mlp(self.mlp_norm(added), added))


def in_parts(function: Callable[[Tensor], Tensor], x: Tensor, work: int, step: int = ROWS_AT_ONCE) -> Parts[Tensor]:
    """Return ``function`` of rows ``x``, taking ``step`` of them at a time, each of which is so much ``work``."""
    if len(x) <= step:
        y = function(x)
        yield len(x) * work
        return y
    out: Tensor | None = None
    for first in range(0, len(x), step):
        y = function(x[first : first + step])
        if out is None:
            out = y.new_empty(len(x), y.shape[1])
        out[first : first + step] = y
        yield len(y) * work
    assert out is not None, "there are rows"
    return out


def finish(parts: Parts[T]) -> T:
    """Return what comes of work in parts, done at once."""
    while True:
        try:
            next(parts)
        except StopIteration as end:
            result: T = end.value
            return result
