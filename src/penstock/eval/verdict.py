"""Is the candidate near enough to its reference? By thresholds, and only where the evidence suffices.

A figure passes if the whole of its 95% interval keeps to the bound, so that few items cannot pass by luck: what is
undecided fails, and more items decide it. Speed has no items: there the median of the rounds counts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

from penstock.eval.result import Check, ClosenessReport, SpeedReport, TaskReport, Verdict
from penstock.eval.statistics import Estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """What the candidate has to keep to; None leaves a bound out."""

    loss: float | None = None
    """The most that a text's loss per token may rise, as a share of the reference's"""
    score: float | None = None
    """The most that a task's first score may fall: 0.02 is two points of a hundred"""
    kl: float | None = None
    """The most KL divergence from the reference, in nats per token"""
    agreement: float | None = None
    """The least share of positions where both find the same token likeliest"""
    speed: float | None = None
    """The least tokens/s, over the reference's"""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return what ``loss=1%,score=2%,kl=0.05,agreement=95%,speed=1.2`` says, any of them in any order.

        Raises ValueError for anything else.
        """
        bounds: dict[str, float] = {}
        for part in text.split(","):
            name, equals, value = part.strip().partition("=")
            number = _number(value)
            if not equals or name not in cls.__dataclass_fields__ or number is None:
                names = ", ".join(cls.__dataclass_fields__)
                raise ValueError(f"{part!r} is not a threshold; write loss=1% or kl=0.05, of {names}")
            if name in bounds:
                raise ValueError(f"{name} is given twice; give it once")
            bounds[name] = number
        return cls(**bounds)

    def unmet_needs(self, kinds: Sequence[str], *, has_closeness: bool, has_speed: bool) -> list[str]:
        """Return the thresholds that nothing would be measured for, if tasks of these ``kinds`` were run."""
        measured = {
            "loss": "perplexity" in kinds,
            "score": any(kind != "perplexity" for kind in kinds),
            "kl": has_closeness,
            "agreement": has_closeness,
            "speed": has_speed,
        }
        return [name for name, is_measured in measured.items() if getattr(self, name) is not None and not is_measured]


DEFAULT_THRESHOLDS = Thresholds(loss=0.01)


def judge(
    thresholds: Thresholds,
    tasks: Sequence[TaskReport],
    closeness: ClosenessReport | None = None,
    speed: SpeedReport | None = None,
) -> Verdict:
    """Return whether what was found keeps to ``thresholds``; tasks were run against a reference."""
    return Verdict(checks=tuple(_checks(thresholds, tasks, closeness, speed)))


def _checks(
    thresholds: Thresholds,
    tasks: Sequence[TaskReport],
    closeness: ClosenessReport | None,
    speed: SpeedReport | None,
) -> Iterator[Check]:
    for task in tasks:
        figure = task.figures[0]
        if task.kind == "perplexity" and thresholds.loss is not None and figure.increase is not None:
            yield _at_most(f"{task.name}: rise of the loss", figure.increase, thresholds.loss)
        if task.kind != "perplexity" and thresholds.score is not None and figure.difference is not None:
            yield _at_least(f"{task.name}: change of {figure.name}", figure.difference, -thresholds.score)
    if closeness is not None and thresholds.kl is not None:
        yield _at_most("KL divergence", closeness.kl, thresholds.kl, is_share=False)
    if closeness is not None and thresholds.agreement is not None:
        yield _at_least("top-1 agreement", closeness.top1_agreement, thresholds.agreement)
    if speed is not None and speed.tokens_per_s_ratio is not None and thresholds.speed is not None:
        median = speed.tokens_per_s_ratio.median
        yield _at_least(
            "tokens/s over the reference's", Estimate(median, median, median), thresholds.speed, is_share=False
        )


def _at_most(what: str, found: Estimate, bound: float, *, is_share: bool = True) -> Check:
    passed = found.high is not None and found.high <= bound
    return Check(
        what=what, is_share=is_share, value=found.value, bound=bound, at_least=False, worst=found.high, passed=passed
    )


def _at_least(what: str, found: Estimate, bound: float, *, is_share: bool = True) -> Check:
    passed = found.low is not None and found.low >= bound
    return Check(
        what=what, is_share=is_share, value=found.value, bound=bound, at_least=True, worst=found.low, passed=passed
    )


def _number(text: str) -> float | None:
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return number if 0 <= number < float("inf") else None
