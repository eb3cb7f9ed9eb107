"""Drafters whose guesses a test knows, and lengths that do not depend on the clock."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from penstock.engine.engine import Engine
from penstock.engine.request import Sequence as EngineSequence
from penstock.engine.speculative import Drafter, DraftLengths, LookupDrafter, Offer, Speculator, SuffixIndex
from penstock.engine.speculative.draft_model import DraftModel
from penstock.models.decoder import load_model
from penstock.protocol import GenerateRequest
from tests.engines import run_to_end, tokens_of


class Longest(DraftLengths):
    """Takes every offer whole, while there is room."""

    def choose(self, num_sequences: int, offers: Sequence[Offer], most_tokens: int) -> list[int]:
        lengths = []
        for offer in offers:
            lengths.append(min(offer.most, most_tokens))
            most_tokens -= lengths[-1]
        return lengths


class Prophet:
    """Knows what was said without speculation, and says something else at one place in ``one_in``."""

    def __init__(self, answers: dict[tuple[str, int], list[int]], *, one_in: int, vocab_size: int = 250) -> None:
        """``answers`` are by request id and choice."""
        self._answers = answers
        self._random = random.Random(one_in)
        self._one_in = one_in
        self._vocab_size = vocab_size

    def offer(self, sequence: EngineSequence, most: int) -> Offer | None:
        return Offer(sequence, most)

    def draft(self, chosen: Sequence[tuple[Offer, int]]) -> list[list[int]]:
        drafts = []
        for offer, length in chosen:
            sequence = offer.sequence
            answer = self._answers[sequence.request.request_id, sequence.index]
            first = sequence.num_output_tokens
            assert list(answer[:first]) == list(sequence.token_ids[sequence.num_prompt_tokens :])
            draft = answer[first : first + length]
            drafts.append(
                [
                    self._random.randrange(self._vocab_size) if self._random.randrange(self._one_in) == 0 else token_id
                    for token_id in [*draft, *[1] * (length - len(draft))]
                ]
            )
        return drafts

    def remove(self, sequence_id: int) -> None:
        pass


def speculate(engine: Engine, drafter: Drafter, *, most_tokens: int = 6, lengths: DraftLengths | None = None) -> Engine:
    """Return ``engine``, which from now on verifies what ``drafter`` guesses."""
    engine._speculator = Speculator(drafter, most_tokens=most_tokens, lengths=lengths or Longest())
    return engine


def with_suffixes(engine: Engine) -> Engine:
    return speculate(engine, LookupDrafter(SuffixIndex))


def with_prophet(engine: Engine, plain: Callable[[], Engine], requests: list[GenerateRequest], one_in: int) -> Engine:
    """Return ``engine`` with guesses of what ``plain`` engines answer each request alone."""
    answers = {}
    for request in requests:
        deltas = run_to_end(plain(), [request])[request.request_id]
        for index in range(request.sampling.n):
            answers[request.request_id, index] = tokens_of(deltas, index)
    return speculate(engine, Prophet(answers, one_in=one_in))


def with_draft_model(engine: Engine, path: Path) -> Engine:
    """Return ``engine`` with the checkpoint in ``path`` as its draft model."""
    scheduler, sampler = engine._scheduler, engine._runner._sampler  # type: ignore[attr-defined]
    cache = scheduler.cache
    model = load_model(path, dtype="float32", kv_dtype="float32")
    drafter = DraftModel(model, sampler, cache.pool, block_size=cache.block_size, reserve=scheduler.reserve)
    return speculate(engine, drafter)
