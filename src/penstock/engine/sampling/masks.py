"""What grammars allow next: one matcher for each sequence that has one, and masks over the vocabulary for a batch."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from penstock.errors import InvalidRequest
from penstock.threads import WorkThread

if TYPE_CHECKING:
    from llguidance import LLMatcher

_LONGEST_S = 1.0
"""A batch's masks take a millisecond, of bad grammars a few; one that takes this long would hold everybody up."""


_BIAS_OF_BYTE = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"),
    np.float32(0),
    np.float32(-np.inf),
)
"""[256, 8]: what the bits of a byte, lowest first, make of eight tokens"""


@dataclass(slots=True, frozen=True)
class TokenMasks:
    """What grammars forbid in some rows of a batch. M rows that have a grammar, V the vocabulary."""

    places: dict[int, int]
    """Row of the batch -> row of ``bias``."""
    bias: Tensor
    """[M, at least V] float32 to add to logits: 0, or -inf where a token is forbidden. An addition is several times
    faster than filling where a mask says so."""

    def bias_of(self, row: int, vocab_size: int) -> Tensor | None:
        """Return [vocab_size] float32, or None for a row without a grammar."""
        place = self.places.get(row)
        return None if place is None else self.bias[place, :vocab_size]


@dataclass(slots=True)
class PendingMasks:
    """Masks that are being computed."""

    rows: dict[int, int]
    """Row of the batch -> sequence id"""
    done: list[bytes]
    """One bit for each token, of the first rows"""
    bias: "Future[Tensor]"


class GrammarMasks:
    """The matchers of running sequences. Masks are computed by Rust on another thread, without the interpreter lock.

    A matcher is not for two threads: between ``begin`` and ``finish`` nothing else may be called.
    """

    def __init__(self, *, longest_s: float = _LONGEST_S) -> None:
        """A sequence whose mask takes longer than ``longest_s`` is given up."""
        self._matchers: dict[int, LLMatcher] = {}
        self._too_slow: set[int] = set()
        self._longest_s = longest_s
        self._thread = WorkThread("penstock-masks")

    def add(self, sequence_id: int, matcher: "LLMatcher") -> None:
        """Hold a sequence to what ``matcher`` allows."""
        self._matchers[sequence_id] = matcher

    def remove(self, sequence_id: int) -> None:
        """Forget a sequence; unknown ones are ignored."""
        self._matchers.pop(sequence_id, None)
        self._too_slow.discard(sequence_id)

    def commit(self, sequence_id: int, token_id: int) -> bool:
        """Take a token that was kept; return whether the sequence's grammar lets nothing follow.

        Raises ``InvalidRequest`` for a grammar that became too complex on the way.
        """
        matcher = self._matchers.get(sequence_id)
        if matcher is None:
            return False
        if sequence_id in self._too_slow:
            raise InvalidRequest(
                f"the grammar is too complex: finding out which tokens may come next took over {self._longest_s:g} s"
            )
        if matcher.is_error() or not matcher.consume_token(token_id):
            raise InvalidRequest(f"the grammar is too complex to go on with: {matcher.get_error().splitlines()[0]}")
        return matcher.is_stopped()

    def begin(self, sequence_ids: Sequence[int]) -> PendingMasks | None:
        """Begin to compute the masks of a batch's rows; None if no row has a grammar."""
        if not self._matchers:
            return None
        return self._submit({row: one for row, one in enumerate(sequence_ids) if one in self._matchers}, [])

    def finish(self, pending: PendingMasks | None) -> TokenMasks | None:
        """Return what was begun, waiting for it where it is not done yet."""
        while pending is not None:
            try:
                bias = pending.bias.result(self._longest_s)
            except TimeoutError:
                pending = self._give_up(pending)
            else:
                return TokenMasks({row: place for place, row in enumerate(pending.rows)}, bias)
        return None

    def _submit(self, rows: dict[int, int], done: list[bytes]) -> PendingMasks | None:
        if not rows:
            return None
        matchers = [self._matchers[sequence_id] for sequence_id in rows.values()]
        return PendingMasks(rows, done, self._thread.submit(_compute, matchers, done))

    def _give_up(self, pending: PendingMasks) -> PendingMasks | None:
        """Leave the thread to the mask it cannot finish, and have another one do the rest."""
        done, rows = pending.done[:], dict(pending.rows)
        if len(done) == len(rows):
            return pending
        self._too_slow.add(rows.pop(list(rows)[len(done)]))
        self._thread = WorkThread("penstock-masks")
        return self._submit(rows, done)


def _compute(matchers: "list[LLMatcher]", done: list[bytes]) -> Tensor:
    """Add the masks that are not ``done`` and return ``TokenMasks.bias``."""
    for matcher in matchers[len(done) :]:
        done.append(matcher.compute_bitmask())  # noqa: PERF401 - who waits sees how far this is
    bits = np.frombuffer(b"".join(done), dtype=np.uint8).reshape(len(done), -1)
    # `take` is eight times faster here than an index.
    return torch.from_numpy(np.take(_BIAS_OF_BYTE, bits, axis=0).reshape(len(done), -1))
