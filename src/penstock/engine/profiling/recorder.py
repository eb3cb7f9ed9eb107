"""Steps cut into spans of time."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, ParamSpec, TypeVar

if TYPE_CHECKING:
    from penstock.kernels.limits import Numbers

P = ParamSpec("P")
T = TypeVar("T")


class Cost(NamedTuple):
    """What a part of a step moved and computed; see ``Span``."""

    num_bytes: int
    num_ops: int
    of: "Numbers" = "float32"


_UNCOUNTED = Cost(0, 0)


class Span(NamedTuple):
    """One part of a step. Times are of ``time.perf_counter_ns``."""

    part: str
    began_ns: int
    ended_ns: int
    num_bytes: int
    """Weights, cache and activations read or written, each once; 0 where nobody counted"""
    num_ops: int
    """Multiplications and additions"""
    of: "Numbers" = "float32"
    """What those were of"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfiledStep:
    """One step, cut without gaps into its parts."""

    num_tokens: int
    num_sequences: int
    spans: list[Span]

    @property
    def is_decode(self) -> bool:
        """Whether every sequence had one token to compute."""
        return self.num_tokens == self.num_sequences


class Recorder:
    """Cuts the steps of one engine.

    Each who works on them says what the time since the last one spoke was spent on, so nothing is left out and nothing
    counted twice.
    """

    def __init__(self) -> None:
        self.steps: list[ProfiledStep] = []
        self._spans: list[Span] = []
        self._cursor_ns = 0
        self._num_tokens = self._num_sequences = 0

    def lap(self, part: str, cost: Cost = _UNCOUNTED) -> None:
        """Say what the time since the last lap was spent on."""
        now_ns = time.perf_counter_ns()
        self._spans.append(Span(part, self._cursor_ns, now_ns, *cost))
        self._cursor_ns = now_ns

    def timed(
        self, part: str, call: Callable[P, T], cost: Callable[..., Cost] | None = None, *, before: str = "between ops"
    ) -> Callable[P, T]:
        """Return ``call``; it says that the time until it was called went to ``before``, and its own to ``part``.

        ``cost`` is given what was returned, then the arguments.
        """

        def timed_call(*args: P.args, **kwargs: P.kwargs) -> T:
            self.lap(before)
            result = call(*args, **kwargs)
            self.lap(part, _UNCOUNTED if cost is None else cost(result, *args, **kwargs))
            return result

        return timed_call

    def begin_step(self, *, is_next: bool) -> None:
        """Begin a step; ``is_next``: the one before left work, so the time since belongs to this one."""
        self._spans = []
        self._num_tokens = self._num_sequences = 0
        if is_next:
            self.lap("between steps")
        else:
            self._cursor_ns = time.perf_counter_ns()

    def end_step(self) -> None:
        """Keep the step, if it ran the model."""
        self.lap("output")
        if self._num_tokens:
            step = ProfiledStep(num_tokens=self._num_tokens, num_sequences=self._num_sequences, spans=self._spans)
            self.steps.append(step)

    def count(self, num_tokens: int, num_sequences: int) -> None:
        """Note what the step computes."""
        self._num_tokens += num_tokens
        self._num_sequences += num_sequences
