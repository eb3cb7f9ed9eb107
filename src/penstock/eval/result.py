"""What an evaluation found: plain values that reports are made of."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from penstock.eval.statistics import Estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """A model as it was run."""

    name: str
    """Where it came from: what the user typed"""
    label: str
    """Name and precision, to tell two sides apart"""
    architecture: str
    dtype: str
    """What weights are kept in, quantization included"""
    kv_dtype: str
    num_parameters: int
    weights_bytes: int
    """In memory, as run"""
    kernels: str
    sees: bool = False
    """Whether it takes images"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One metric of one task."""

    name: str
    better: Literal["higher", "lower"]
    is_share: bool
    candidate: Estimate
    reference: Estimate | None = None
    """The next two also only with a reference"""
    difference: Estimate | None = None
    """Candidate minus reference on the same items"""
    increase: Estimate | None = None
    """The difference over the reference; None where that is zero"""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskReport:
    """One task."""

    name: str
    kind: str
    num_items: int
    data_sha256: str
    figures: tuple[Figure, ...]
    """The first is what verdicts go by"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClosenessReport:
    """How far the candidate's predictions and hidden states are from the reference's on one text."""

    text: str
    num_tokens: int
    kl: Estimate
    """Nats per token, of the candidate from the reference"""
    top1_agreement: Estimate
    loss_increase: Estimate
    """As a share"""
    layer_errors: tuple[float, ...] | None
    """Relative, after each layer and at last of the final hidden states; None for models of different depths"""


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingReport:
    """What a setting of decoding changes, the weights being the same."""

    setting: str
    closeness: ClosenessReport
    num_reused_tokens: int | None = None
    """Of prompts, from the prefix cache; None where the setting has nothing to do with it, as the next"""
    largest_difference: float | None = None
    """Of any token's log-likelihood, in nats"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """A figure over rounds."""

    median: float
    least: float
    most: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How fast one side answers one request at a time."""

    tokens_per_s: Spread
    """Of one answer after its first token"""
    first_token_s: Spread
    """From sending a prompt to the first token"""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedReport:
    """Both sides measured by turns, or one alone."""

    num_prompt_tokens: int
    num_output_tokens: int
    num_requests: int
    """In each round"""
    num_rounds: int
    candidate: Pace
    reference: Pace | None
    tokens_per_s_ratio: Spread | None
    """Candidate over reference, of each round"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One threshold and whether it was kept."""

    what: str
    is_share: bool
    value: float
    bound: float
    """The most, or where ``at_least`` the least, that is allowed"""
    at_least: bool
    worst: float | None
    """The end of the interval that has to keep to the bound; None where there were too few items for one"""
    passed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """All checks together."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalReport:
    """One evaluation."""

    conditions: dict[str, Any]
    """All that is needed to run it again, and where and when it ran"""
    candidate: Side
    reference: Side | None
    tasks: tuple[TaskReport, ...]
    settings: tuple[SettingReport, ...] = ()
    """What settings of decoding change in the candidate, if that was asked"""
    closeness: ClosenessReport | None = None
    speed: SpeedReport | None = None
    verdict: Verdict | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        data = dataclasses.asdict(self)
        if self.verdict is not None:
            data["verdict"]["passed"] = self.verdict.passed
        return data

    def loss_figure(self) -> tuple[str, Figure] | None:
        """Return the first text's name and loss, if there was a text."""
        for task in self.tasks:
            if task.kind == "perplexity":
                return task.name, task.figures[0]
        return None
