"""Find stop strings in text that arrives in pieces."""

from collections import deque
from functools import lru_cache


class _Automaton:
    """Aho-Corasick over the stop strings: one state per prefix of one, so every character costs constant time."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.next: list[dict[str, int]] = [{}]
        self.depth = [0]
        """Characters of the state's prefix: how much must be held back there."""
        self.match: list[str | None] = [None]
        """The longest stop string that ends in this state."""
        for string in stop:
            self._add(string)
        self.fail = self._failures()
        """The longest proper suffix of the state's prefix that is a state too."""

    def _add(self, string: str) -> None:
        state = 0
        for depth, character in enumerate(string, start=1):
            if character not in self.next[state]:
                self.next[state][character] = len(self.next)
                self.next.append({})
                self.depth.append(depth)
                self.match.append(None)
            state = self.next[state][character]
        self.match[state] = string

    def _failures(self) -> list[int]:
        fail = [0] * len(self.next)
        queue = deque(self.next[0].values())
        while queue:
            state = queue.popleft()
            # Shorter states are finished first, so the suffix's own longest match is final here.
            self.match[state] = self.match[state] or self.match[fail[state]]
            for character, child in self.next[state].items():
                suffix = fail[state]
                while suffix and character not in self.next[suffix]:
                    suffix = fail[suffix]
                fail[child] = self.next[suffix].get(character, 0)
                queue.append(child)
        return fail


@lru_cache(maxsize=64)
def _automaton(stop: tuple[str, ...]) -> _Automaton:
    return _Automaton(stop)


class StopMatcher:
    """Pass text through until the first stop string appears in it.

    The first match is the one that ends earliest in the text; of those that end at the same character the
    longest counts. That does not depend on how the text was cut into pieces. Only what may still become a
    stop string is held back. After a match the matcher is used up.
    """

    def __init__(self, stop: tuple[str, ...], include: bool) -> None:
        """``stop`` holds no empty string; ``include`` leaves the matched stop string at the end of the text."""
        assert all(stop), "an empty stop string matches everywhere"
        self._automaton = _automaton(stop)
        self._include = include
        self._state = 0
        self._held = ""

    def push(self, text: str, *, may_match: bool = True) -> tuple[str, str | None]:
        """Add ``text``; return the text that is now certain and the stop string that ended it, if one did.

        Without ``may_match``, a stop string that ends in ``text`` is text like any other.
        """
        automaton = self._automaton
        if not self._state and automaton.next[0].keys().isdisjoint(text):
            return text, None
        held = self._held + text
        state, offset = self._state, len(self._held)
        for position, character in enumerate(text, start=offset + 1):
            while state and character not in automaton.next[state]:
                state = automaton.fail[state]
            state = automaton.next[state].get(character, 0)
            matched = automaton.match[state]
            if matched is not None and may_match:
                self._held, self._state = "", 0
                return held[: position if self._include else position - len(matched)], matched
        self._state = state
        num_certain = len(held) - automaton.depth[state]
        self._held = held[num_certain:]
        return held[:num_certain], None

    def flush(self) -> str:
        """Return what was held back: the text has ended and it became no stop string."""
        held, self._held, self._state = self._held, "", 0
        return held
