"""The end of a text that was cut: a short one after which its grammar may end."""

import heapq
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from llguidance import LLMatcher

_MOST_TRIED = 1000
"""Everybody waits meanwhile, at most some 60 ms. A JSON text of five required values is ended after 63, in 6 ms"""
_FREE = 24
"""Where so many bytes may come, they are text, not signs"""

# What a byte costs beside the best one. That one gains, so that who has come far goes on first: there is no way around
# what a grammar demands. Going round in circles costs more than it gains.
_IN_TEXT = {ord('"'): 0, ord("a"): 5, **dict.fromkeys(b")]}>;,:'1", 6)}
_AMONG_SIGNS = {**dict.fromkeys(b")]}>", 0), **dict.fromkeys(b"\"',:;1a", 5), **dict.fromkeys(b"[{ ", 15)}
_OTHER_BYTE = 25
_STEP = -9
_CIRCLE = 10


class _Beginning(NamedTuple):
    cost: int
    number: int
    """Breaks ties: the latest first"""
    token_ids: tuple[int, ...]
    before: "LLMatcher"
    """Where it stood before the last of them"""
    masks: tuple[bytes, ...]
    """What might come at each step so far"""
    may_repeat: bool
    """Whether it is no circle to be where the text was before: brackets that close are often followed by others"""


def find_ending(matcher: "LLMatcher", by_byte: dict[int, int]) -> list[int]:
    """Return tokens with which a text at ``matcher`` may end; none if it may now, or if none was found.

    ``by_byte`` are the tokens that are one byte each. The cheapest beginning of an end is looked at first; of several
    that leave the same choice, only one.
    """
    numbers = count(0, -1)
    seen: set[tuple[tuple[int, ...] | None, bytes]] = set()
    waiting: list[_Beginning] = []
    cost, may_repeat = 0, True
    token_ids: tuple[int, ...] = ()
    masks: tuple[bytes, ...] = ()
    after = matcher.deep_copy()
    for _ in range(_MOST_TRIED):
        forced = tuple(after.compute_ff_tokens())
        if after.consume_tokens(list(forced)) and (after.is_stopped() or after.is_accepting()):
            return [*token_ids, *forced]
        mask: bytes = after.compute_bitmask()
        choice = (token_ids[:-1] if token_ids else None, mask)
        if choice not in seen:
            seen.add(choice)
            cost += 0 if may_repeat or mask not in masks else _CIRCLE
            masks, token_ids = (*masks, mask), token_ids + forced
            possible = [(byte, one) for byte, one in by_byte.items() if mask[one >> 3] >> (one & 7) & 1]
            is_text = len(possible) >= _FREE
            prices = [(_IN_TEXT if is_text else _AMONG_SIGNS).get(byte, _OTHER_BYTE) for byte, _ in possible]
            cheapest = min(prices, default=0)
            for (_, one), price in zip(possible, prices, strict=True):
                closes = not is_text and price == 0
                total = cost + _STEP + price - cheapest
                heapq.heappush(waiting, _Beginning(total, next(numbers), (*token_ids, one), after, masks, closes))
        if not waiting:
            break
        cost, _, token_ids, before, masks, may_repeat = heapq.heappop(waiting)
        after = before.deep_copy()
        after.consume_token(token_ids[-1])
    return []
