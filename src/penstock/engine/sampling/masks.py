"""What grammars allow next: one matcher for each sequence that has one, and masks over the vocabulary for a batch."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from penstock.errors import InvalidRequest
from penstock.threads import WorkThread

if TYPE_CHECKING:
    from llguidance import LLMatcher

_LONGEST_S = 1.0
"""A batch's masks take a millisecond, of bad grammars a few; one that takes this long would hold everybody up."""
_NO_DRAFTS: Mapping[int, Sequence[int]] = {}

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
    bias: npt.NDArray[np.float32]
    """[M, at least V] to add to logits: 0, or -inf where a token is forbidden. An addition is several times
    faster than filling where a mask says so."""

    def bias_of(self, row: int, vocab_size: int) -> npt.NDArray[np.float32] | None:
        """Return [vocab_size], or None for a row without a grammar."""
        place = self.places.get(row)
        return None if place is None else self.bias[place, :vocab_size]


@dataclass(slots=True, frozen=True)
class _Wanted:
    """The rows of one sequence: one, and one more behind each guess at what follows."""

    sequence_id: int
    first_row: int
    matcher: "LLMatcher"
    draft: Sequence[int]

    def masks(self) -> list[bytes]:
        """Return the masks of the rows that may count: none behind what may not come."""
        masks = [self.matcher.compute_bitmask()]
        if self.draft:
            # A copy takes a microsecond; what a guess leads it into is not the sequence's to answer for.
            ahead = self.matcher.deep_copy()
            for token_id in self.draft:
                if not ahead.try_consume_tokens([token_id]):
                    break
                masks.append(ahead.compute_bitmask())
        return masks


@dataclass(slots=True)
class PendingMasks:
    """Masks that are being computed."""

    wanted: list[_Wanted]
    done: list[list[bytes]]
    """One bit for each token, for each row of the first ones"""
    bias: "Future[npt.NDArray[np.float32]]"


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

    def matcher(self, sequence_id: int) -> "LLMatcher | None":
        """Return what holds a sequence to its grammar; None if it has none."""
        return self._matchers.get(sequence_id)

    def num_possible(self, sequence_id: int, draft: Sequence[int]) -> int:
        """Return how many tokens of ``draft`` the sequence's grammar lets follow."""
        matcher = self._matchers.get(sequence_id)
        return len(draft) if matcher is None else matcher.deep_copy().validate_tokens(list(draft))

    def begin(
        self, sequence_ids: Sequence[int], drafts: Mapping[int, Sequence[int]] = _NO_DRAFTS
    ) -> PendingMasks | None:
        """Begin to compute the masks of a batch's rows; None if no row has a grammar.

        ``drafts`` are guesses at what follows a sequence, whose rows stand together.
        """
        if not self._matchers:
            return None
        wanted = []
        row = 0
        while row < len(sequence_ids):
            sequence_id = sequence_ids[row]
            draft = drafts.get(sequence_id, ())
            if sequence_id in self._matchers:
                wanted.append(_Wanted(sequence_id, row, self._matchers[sequence_id], draft))
            row += 1 + len(draft)
        return self._submit(wanted, [])

    def finish(self, pending: PendingMasks | None) -> TokenMasks | None:
        """Return what was begun, waiting for it where it is not done yet."""
        while pending is not None:
            try:
                bias = pending.bias.result(self._longest_s)
            except TimeoutError:
                pending = self._give_up(pending)
            else:
                rows = [
                    one.first_row + ahead
                    for one, masks in zip(pending.wanted, pending.done, strict=True)
                    for ahead in range(len(masks))
                ]
                return TokenMasks({row: place for place, row in enumerate(rows)}, bias)
        return None

    def _submit(self, wanted: list[_Wanted], done: list[list[bytes]]) -> PendingMasks | None:
        if not wanted:
            return None
        return PendingMasks(wanted, done, self._thread.submit(_compute, wanted, done))

    def _give_up(self, pending: PendingMasks) -> PendingMasks | None:
        """Leave the thread to the mask it cannot finish, and have another one do the rest."""
        done, wanted = pending.done[:], pending.wanted[:]
        if len(done) == len(wanted):
            return pending
        self._too_slow.add(wanted.pop(len(done)).sequence_id)
        self._thread = WorkThread("penstock-masks")
        return self._submit(wanted, done)


def _compute(wanted: list[_Wanted], done: list[list[bytes]]) -> npt.NDArray[np.float32]:
    """Add the masks of those that are not ``done`` and return ``TokenMasks.bias``."""
    for one in wanted[len(done) :]:
        done.append(one.masks())  # noqa: PERF401 - who waits sees how far this is
    flat = [mask for masks in done for mask in masks]
    bits = np.frombuffer(b"".join(flat), dtype=np.uint8).reshape(len(flat), -1)
    # `take` is eight times faster here than an index.
    biases: npt.NDArray[np.float32] = np.take(_BIAS_OF_BYTE, bits, axis=0).reshape(len(flat), -1)
    return biases
