"""Guessing by looking up: what followed the last tokens when they came before."""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple, Protocol

from penstock.engine.request import Sequence
from penstock.engine.speculative.drafter import Offer

_BEST_GRADE = 5


class Match(NamedTuple):
    """An earlier occurrence of the last tokens."""

    length: int
    """How many of the last tokens are the same there"""
    end: int
    """Where what followed them begins"""


class Index(Protocol):
    """The tokens of one sequence, searchable."""

    def find(self, token_ids: SequenceOf[int]) -> Match | None:
        """Return where the last of ``token_ids`` came before. Each call has the tokens of the call before and more."""


class LookupDrafter:
    """Guesses that what followed an occurrence follows again, and goes on with one for as long as it comes true."""

    def __init__(self, make_index: Callable[[SequenceOf[int]], Index]) -> None:
        """``make_index`` gets a prompt."""
        self._make_index = make_index
        self._indexes: dict[int, Index] = {}
        self._matches: dict[int, tuple[Match, int]] = {}
        """By sequence: the occurrence found last, and how many tokens there were then"""

    def offer(self, sequence: Sequence, most: int) -> Offer | None:
        """Return what followed the last tokens; see ``Drafter.offer``."""
        match = self._match(sequence)
        if match is None:
            return None
        # Twice as long a match, a grade more.
        return Offer(sequence, most, min(match.length.bit_length(), _BEST_GRADE), match.end)

    def draft(self, chosen: SequenceOf[tuple[Offer, int]]) -> list[list[int]]:
        """Return what followed; where that reaches the end of the tokens, they repeat themselves."""
        drafts = []
        for offer, length in chosen:
            token_ids = offer.sequence.token_ids
            draft = token_ids[offer.source : offer.source + length]
            period = len(token_ids) - offer.source
            for place in range(len(draft), length):
                draft.append(draft[place - period])
            drafts.append(draft)
        return drafts

    def remove(self, sequence_id: int) -> None:
        """Forget a sequence."""
        self._indexes.pop(sequence_id, None)
        self._matches.pop(sequence_id, None)

    def _match(self, sequence: Sequence) -> Match | None:
        token_ids = sequence.token_ids
        num_tokens = len(token_ids)
        before = self._matches.get(sequence.id)
        if before is not None:
            (length, end), num_then = before
            num_new = num_tokens - num_then
            if token_ids[end : end + num_new] == token_ids[num_then:]:
                # Whatever else matches now matched then, and no further than this.
                match = Match(length + num_new, end + num_new)
                self._matches[sequence.id] = match, num_tokens
                return match
        index = self._indexes.get(sequence.id)
        if index is None:
            index = self._indexes[sequence.id] = self._make_index(token_ids[: sequence.num_prompt_tokens])
        found = index.find(token_ids)
        if found is None:
            self._matches.pop(sequence.id, None)
        else:
            self._matches[sequence.id] = found, num_tokens
        return found
