"""What the engine asks of a device."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from penstock.engine.sampling import SampledToken
from penstock.engine.scheduler import ScheduledBatch
from penstock.protocol import Picture, SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    from llguidance import LLMatcher


@dataclass(slots=True, frozen=True)
class StepResult:
    """What a batch gave."""

    tokens: list[SampledToken | None]
    """[R] one token for each row; None where the logits are not numbers"""
    scores: list[TokenLogprobs] = field(default_factory=list)
    """[C] of the prompts' tokens"""
    pooled: list[npt.NDArray[np.float64]] = field(default_factory=list)
    """[M] sums of hidden states [E]"""


class Runner(Protocol):
    """Holds the model, the cache's tensors and the sampler; decides nothing."""

    def add(
        self,
        sequence_id: int,
        index: int,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        matcher: "LLMatcher | None" = None,
        adapter: object | None = None,
        pictures: Sequence[Picture] = (),
    ) -> None:
        """Prepare to compute choice ``index`` of a request that runs with ``adapter``; takes ``matcher`` over."""

    def load_adapter(self, path: Path) -> object:
        """Return the LoRA adapter in directory ``path``, for ``add``. Raises ``ModelUnreadable``."""

    def remove(self, sequence_id: int) -> None:
        """Forget a sequence."""

    def execute(self, batch: ScheduledBatch) -> StepResult:
        """Compute the batch.

        Each row behind a guess gets the token that it would get if all guesses before it were true. Running the same
        batch again gives the same result: keys and values are rewritten in place and the sampler's history only moves
        in ``commit``.
        """

    def num_possible(self, sequence_id: int, draft: Sequence[int]) -> int:
        """Return how many tokens of ``draft`` the sequence's grammar lets follow; all if it has none."""

    def matcher(self, sequence_id: int) -> "LLMatcher | None":
        """Return what holds a sequence to its grammar, at its last token; for reading. None if it has no grammar."""

    def commit(self, sequence_id: int, token_id: int) -> bool:
        """Take a sampled token into the sequence's history; return whether its grammar lets nothing follow.

        Raises ``InvalidRequest`` for a grammar that became too complex on the way.
        """
