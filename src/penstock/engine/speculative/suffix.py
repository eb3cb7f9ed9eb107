"""Suffix matching: the longest end of the tokens so far, prompt and output, that came before.

What SuffixDecoding (Oliaro et al., 2024) does with a suffix tree is done here with the hash chains of LZ77 as deflate
has them (RFC 1951): one dictionary entry and one link for each token, where a tree or automaton in Python takes some
hundred times the memory. A chain is followed only so far; an occurrence that is followed from token to token is not
searched again.
"""

from collections.abc import Sequence

from penstock.engine.speculative.lookup import Match

_LEAST = 3
"""Tokens that have to be the same"""
_MOST_TRIED = 16
"""Occurrences of those that are compared further, the latest first. Up: longer matches. Down: less work."""
_LONGEST = 32
"""Tokens compared: longer matches are all as good"""


class SuffixIndex:
    """Every run of three tokens, each linked to the one before of its kind."""

    def __init__(self, prompt_token_ids: Sequence[int]) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        """Run of tokens -> where it last ended"""
        self._links = [0] * _LEAST
        """At the end of each run: where the one before of its kind ended, or 0"""

    def find(self, token_ids: Sequence[int]) -> Match | None:
        """Return the longest match found, the latest of equals."""
        ends, links = self._ends, self._links
        # Up to, and without, the run at the very end, which would be found as its own match.
        for end in range(len(links), len(token_ids)):
            run = tuple(token_ids[end - _LEAST : end])
            links.append(ends.get(run, 0))
            ends[run] = end
        end = ends.get(tuple(token_ids[-_LEAST:]), 0)
        best: Match | None = None
        num_tokens = len(token_ids)
        for _ in range(_MOST_TRIED):
            if not end:
                break
            length = _LEAST
            most = min(_LONGEST, end)
            while length < most and token_ids[end - 1 - length] == token_ids[num_tokens - 1 - length]:
                length += 1
            if best is None or length > best.length:
                best = Match(length, end)
            end = links[end]
        return best
