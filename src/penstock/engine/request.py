"""A request as the engine keeps it: one prompt, and one sequence of tokens for each of its choices."""

import enum
import math

from penstock.engine.encoding import PictureCursor
from penstock.engine.kv import BlockTable, prompt_digest
from penstock.protocol import GenerateRequest, Preemption, Priority, Timeline

CLASS_DEADLINES_S = {Priority.P0: 0.1, Priority.P1: 1.0, Priority.P2: 10.0, Priority.P3: math.inf}
"""Seconds from arrival to the first token that each class is promised."""


class SequenceState(enum.Enum):
    """Where a sequence is."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Request:
    """What all choices of one request share."""

    __slots__ = (
        "arrival_s",
        "arrival_unix_s",
        "deadline_at_s",
        "has_forked",
        "number",
        "pooling",
        "priority",
        "request_id",
        "salt",
        "sampling",
        "sequences",
        "tenant",
    )

    def __init__(
        self,
        request: GenerateRequest,
        *,
        number: int,
        now_s: float,
        unix_s: float,
        adapter_number: int = 0,
        reads_prompts_whole: bool = False,
    ) -> None:
        """``adapter_number`` tells apart the adapters there have been; 0: none.

        ``reads_prompts_whole``: in a prompt with pictures every token depends on all others.
        """
        num_whole = len(request.prompt_token_ids) if reads_prompts_whole and request.pictures else 0
        self.request_id = request.request_id
        self.number = number
        """Counts arrivals; breaks ties."""
        self.sampling = request.sampling
        self.priority = request.priority
        self.tenant = request.tenant
        self.salt = f"{adapter_number}:{request.cache_salt}"
        if num_whole:
            # Its blocks are no other prompt's, not even of one that goes on from it.
            self.salt += f":{prompt_digest(request.prompt_token_ids, request.pictures)}"
        self.arrival_s = now_s
        """On the engine's monotonic clock, as all times here are but the next."""
        self.arrival_unix_s = unix_s
        deadline_s = request.deadline_s if request.deadline_s is not None else CLASS_DEADLINES_S[request.priority]
        self.deadline_at_s = now_s + deadline_s
        """When the first token is due; infinite for best effort."""
        self.pooling = request.pooling
        beam = request.sampling.beam
        num_sequences = request.sampling.n if beam is None else beam.width
        self.has_forked = num_sequences == 1
        """Whether the other choices have been split off the first, which computes the prompt for all."""
        self.sequences = [Sequence(self, index, request, num_whole) for index in range(num_sequences)]
        """Choices, or beams, which all grow in the same steps"""

    @property
    def is_finished(self) -> bool:
        """Whether every choice has ended."""
        return all(sequence.state is SequenceState.FINISHED for sequence in self.sequences)


class Sequence:
    """The tokens of one choice and how many of them are computed.

    Everything the scheduler does is letting ``num_computed_tokens`` catch up with ``num_tokens``: prefill, decode,
    a chunk of a prompt, recomputing after preemption and skipping a cached prefix are the same thing.
    """

    __slots__ = (
        "awaiting_since_s",
        "first_admitted_at_s",
        "first_token_at_s",
        "id",
        "index",
        "most_computed_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_prompt_tokens",
        "num_recomputed_tokens",
        "num_scored_tokens",
        "num_shared_blocks",
        "num_steps",
        "num_to_score",
        "pictures",
        "preemptions",
        "request",
        "reserved_blocks",
        "state",
        "table",
        "token_ids",
        "wait_marks",
        "waited_s",
    )

    def __init__(self, request: Request, index: int, asked: GenerateRequest, num_whole: int) -> None:
        prompt_token_ids = asked.prompt_token_ids
        self.request = request
        self.index = index
        self.id = -1
        """Given by the scheduler; unique in the engine's life."""
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.num_computed_tokens = 0
        self.most_computed_tokens = 0
        """High-water mark; computing below it again is recomputation."""
        self.table = BlockTable()
        # Features depend on no adapter, but who shares them could be probed by their timing.
        self.pictures = PictureCursor(asked.pictures, asked.cache_salt, num_whole)
        self.state = SequenceState.WAITING
        self.reserved_blocks = 0
        """Blocks that admission set aside for it, grown when it outgrows them."""
        self.num_shared_blocks = 0
        """Blocks it got from others, which are not part of that."""
        self.num_cached_tokens = 0
        self.num_recomputed_tokens = 0
        self.num_to_score = 0
        """Tokens of the prompt, from the first on, after which nothing more is wanted of the prompt itself."""
        self.num_scored_tokens = 0
        """Tokens of the prompt of which nothing is wanted, or what was wanted has been had: their hidden states, or log
        probabilities of what follows each."""
        if index == 0 and request.pooling is not None:
            self.num_to_score = len(prompt_token_ids)
            self.num_scored_tokens = 0 if request.pooling == "mean" else len(prompt_token_ids) - 1
        elif index == 0 and request.sampling.prompt_logprobs is not None:
            self.num_to_score = len(prompt_token_ids) - 1
            self.num_scored_tokens = request.sampling.prompt_logprobs_from - 1
        self.num_steps = 0
        self.preemptions: list[Preemption] = []
        self.first_admitted_at_s: float | None = None
        self.first_token_at_s: float | None = None
        self.waited_s: dict[str, float] = {}
        self.awaiting_since_s: float | None = None
        """From when on it has been running, and could not go on until a picture is encoded"""
        self.wait_marks: dict[str, float] = {}

    def restart(self) -> None:
        """Go back to the prompt, with nothing computed."""
        del self.token_ids[self.num_prompt_tokens :]
        self.num_computed_tokens = 0

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def most_reusable_tokens(self) -> int:
        """Tokens that may come from the prefix cache, which holds neither hidden states nor logits."""
        return self.num_scored_tokens if self.num_scored_tokens < self.num_to_score else self.num_tokens - 1

    @property
    def is_decoding(self) -> bool:
        """Whether all but the token generated last is computed."""
        return len(self.token_ids) - self.num_computed_tokens == 1 and len(self.token_ids) > self.num_prompt_tokens

    @property
    def is_leader(self) -> bool:
        """Whether this sequence computes the prompt for choices that have not been split off yet."""
        return not self.request.has_forked and self.index == 0

    def timeline(self, *, finished_at_s: float) -> Timeline:
        """Return the record of this choice."""
        arrival = self.request.arrival_s
        return Timeline(
            arrival_unix_s=self.request.arrival_unix_s,
            admitted_s=None if self.first_admitted_at_s is None else self.first_admitted_at_s - arrival,
            first_token_s=None if self.first_token_at_s is None else self.first_token_at_s - arrival,
            finished_s=finished_at_s - arrival,
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
            num_output_tokens=self.num_output_tokens,
            num_recomputed_tokens=self.num_recomputed_tokens,
            num_steps=self.num_steps,
            preemptions=tuple(self.preemptions),
            waited_s=self.waited_s,
        )
