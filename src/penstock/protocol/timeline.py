"""What happened to one request, and when."""

import msgspec


class Preemption(msgspec.Struct, frozen=True, kw_only=True):
    """One time the request lost its cache blocks to a more urgent one."""

    at_s: float
    """Seconds after arrival."""
    num_tokens_lost: int
    """Computed tokens whose blocks were given up; what of them must be recomputed shows later."""


class Timeline(msgspec.Struct, frozen=True, kw_only=True):
    """The life of one choice of one request. Times are seconds after ``arrival_unix_s``; None: not reached."""

    arrival_unix_s: float
    admitted_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache at first admission."""
    num_output_tokens: int = 0
    num_recomputed_tokens: int = 0
    """Tokens computed a second time because of preemptions."""
    num_steps: int = 0
    """Engine steps this request took part in."""
    preemptions: tuple[Preemption, ...] = ()
    waited_s: dict[str, float] = {}
    """Seconds spent waiting, by reason: ``max_running`` (as many ran as may), ``blocks`` (the cache was full),
    ``step_tokens`` (the steps' token budgets went to others); and once admitted, ``images``
    (they were being encoded)."""
