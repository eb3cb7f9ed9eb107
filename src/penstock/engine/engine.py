"""The engine: requests in, token deltas out, one step at a time.

A step is five lines of intent: refuse who is too late, schedule, run, commit, turn tokens into deltas.
"""

import math
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from penstock.engine.admissible import require_admissible
from penstock.engine.beam import Beam, BeamSearch, num_proposed, proposing
from penstock.engine.encoding import EncodingDesk
from penstock.engine.loaded_adapters import LoadedAdapters
from penstock.engine.messages import error_info
from penstock.engine.output import ChoiceOutput, OutputStep
from penstock.engine.request import Request, Sequence
from penstock.engine.runner.base import Runner, StepResult
from penstock.engine.runner.halving import execute_or_halve
from penstock.engine.sampling import SampledToken
from penstock.engine.scheduler import ScheduledBatch, Scheduler
from penstock.engine.speculative import SpeculationCounters, Speculator, kept_tokens
from penstock.errors import (
    InvalidRequest,
    PenstockError,
    StepFailed,
)
from penstock.protocol import (
    EngineCounters,
    EngineState,
    EngineStatus,
    FinishReason,
    GenerateRequest,
    ModelInfo,
    TokenDelta,
    TokenLogprobs,
    Usage,
)
from penstock.telemetry import get_logger
from penstock.text import Tokenizer
from penstock.text.grammar import GrammarCompiler

if TYPE_CHECKING:
    from llguidance import LLMatcher

_log = get_logger(__name__)


class Engine:
    """One model and everything needed to serve it. Not thread-safe: one loop owns it."""

    def __init__(
        self,
        *,
        runner: Runner,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        model: ModelInfo,
        max_adapters: int = 0,
        speculator: Speculator | None = None,
        desk: EncodingDesk | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.grammars = GrammarCompiler(tokenizer, vocab_size=model.vocab_size, eos_token_ids=model.eos_token_ids)
        self._runner = runner
        self._scheduler = scheduler
        self._speculator = speculator
        self._drafted = SpeculationCounters() if speculator is None else speculator.counters
        self._tokenizer = tokenizer
        self._clock = clock
        self._eos_token_ids = frozenset(model.eos_token_ids)
        self._requests: dict[str, Request] = {}
        self._outputs: dict[int, ChoiceOutput] = {}
        self._prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        """Until the first token"""
        self._searches: dict[str, BeamSearch] = {}
        """Of requests whose beams have gone a step"""
        self._proposals: dict[int, TokenLogprobs] = {}
        """What may follow each beam that was computed in this step"""
        self._pooled: dict[int, npt.NDArray[np.float64]] = {}
        """Sums of hidden states, of prompts that are not done"""
        self._next_number = 0
        self._desk = desk or EncodingDesk(scheduler.encoding.features, None)
        self._is_awaiting = False
        """Whether the last step found nothing to do but wait for pictures"""
        self._adapters = LoadedAdapters(runner, most=max_adapters)
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_generation_tokens = 0
        self._last_step_s: float | None = None

    @property
    def has_work(self) -> bool:
        """Whether ``step`` would do something."""
        return self._scheduler.has_work and not (self._is_awaiting and self._desk.is_awaiting)

    def add(self, request: GenerateRequest, matcher: "LLMatcher | None" = None) -> None:
        """Queue a request; ``matcher`` stands at the beginning of its grammar, if it has one.

        Raises ``RequestError`` if it could never run and ``UnavailableError`` if it cannot now; then it left no trace.
        """
        assert (matcher is None) == (request.sampling.grammar is None), "whoever adds a request compiles its grammar"
        if request.request_id in self._requests:
            raise InvalidRequest(f"request id {request.request_id!r} is running already; use another")
        require_admissible(request, self.model)
        now_s = self._clock()
        adapter = None if request.adapter is None else self._adapters.get(request.adapter)
        entry = Request(
            request,
            number=self._next_number,
            now_s=now_s,
            unix_s=time.time(),
            adapter_number=0 if adapter is None else adapter.number,
            reads_prompts_whole=self._scheduler.encoding.reads_prompts_whole,
        )
        self._next_number += 1
        self._scheduler.add(entry, now_s)
        self._is_awaiting = False
        self._requests[entry.request_id] = entry
        for sequence in entry.sequences:
            own = None if matcher is None else matcher.deep_copy()
            self._runner.add(
                sequence.id,
                sequence.index,
                request.sampling if request.sampling.beam is None else proposing(request.sampling, self._eos_token_ids),
                request.prompt_token_ids,
                own,
                None if adapter is None else adapter.weights,
                request.pictures,
            )
            self._outputs[sequence.id] = ChoiceOutput(request.sampling, self._tokenizer, self._eos_token_ids)

    def on_news(self, wake: Callable[[], object]) -> None:
        """Have ``wake`` called, on any thread, when ``has_work`` may have become true by itself."""
        self._desk.on_news(wake)

    def close(self) -> None:
        """End the processes that belong to it."""
        self._desk.close()

    def load_adapter(self, name: str, path: Path) -> None:
        """See ``LoadedAdapters.load``."""
        self._adapters.load(name, path)

    def unload_adapter(self, name: str) -> None:
        """See ``LoadedAdapters.unload``."""
        self._adapters.unload(name)

    def abort(self, request_id: str) -> None:
        """End a request at once and free its blocks; unknown or finished ones are ignored."""
        request = self._requests.get(request_id)
        if request is not None:
            self._drop(request)

    def step(self) -> list[TokenDelta]:
        """Run one step and return what it added to each choice."""
        started_s = self._clock()
        deltas = [self._refusal(*refused) for refused in self._scheduler.refuse_late(started_s)]
        self._collect_features(started_s, deltas)
        batch = self._scheduler.schedule(started_s, self._draft())
        has_encoded = bool(batch.encode) or self._desk.is_behind
        if has_encoded:
            self._desk.submit(batch.encode)
            self._last_step_s = self._clock()
            if self._collect_features(started_s, deltas):
                batch = batch.select(s for s, one in enumerate(batch.sequence_ids) if one in self._outputs)
        self._is_awaiting = not batch.sequence_ids
        if self._is_awaiting:
            return deltas
        results, failures = execute_or_halve(self._runner, batch)
        now_s = self._clock()
        self._last_step_s = now_s
        self._num_steps += 1
        is_decode = batch.num_tokens - batch.num_drafted_tokens == len(batch.sequence_ids)
        if not is_decode:
            self._scheduler.prefill_rate.observe(batch.num_tokens, now_s - started_s)
        num_before = self._num_generation_tokens
        for ran, result in results:
            self._commit(ran, result, now_s, deltas, failures)
        if self._proposals:
            self._search(now_s, deltas, failures)
        is_whole = not failures and not self._searches and results[0][0] is batch
        if self._speculator is not None and is_decode and is_whole and not has_encoded:
            self._speculator.stepped(batch, self._num_generation_tokens - num_before)
        for sequence_id, error in failures.items():
            deltas.extend(self._fail(sequence_id, error, now_s))
        return deltas

    def status(self) -> EngineStatus:
        """Return the engine's state at this moment, without the model's description."""
        scheduler = self._scheduler
        counters = scheduler.counters
        pool = scheduler.cache.pool
        drafted = self._drafted
        return EngineStatus(
            state=EngineState.READY,
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting,
            num_waiting_tokens=scheduler.num_waiting_tokens,
            num_free_blocks=pool.num_free,
            num_blocks=pool.num_blocks,
            last_step_age_s=None if self._last_step_s is None else self._clock() - self._last_step_s,
            seeing=self._desk.status(),
            counters=EngineCounters(
                num_steps=self._num_steps,
                num_prompt_tokens=self._num_prompt_tokens,
                num_generation_tokens=self._num_generation_tokens,
                num_prefix_queries=counters.num_prefix_queries,
                num_prefix_hits=counters.num_prefix_hits,
                num_preemptions=counters.num_preemptions,
                num_recomputed_tokens=counters.num_recomputed_tokens,
                num_evicted_blocks=pool.num_evicted_blocks,
                num_drafts=drafted.num_drafts,
                num_draft_tokens=drafted.num_draft_tokens,
                num_accepted_tokens=drafted.num_accepted_tokens,
                decode_s=drafted.decode_s,
                undrafted_decode_s=drafted.undrafted_decode_s,
            ),
        )

    # ---- running a batch

    def _draft(self) -> Mapping[int, SequenceOf[int]]:
        """Return guesses at what decoding sequences go on with, by id."""
        if self._speculator is None:
            return {}
        scheduler = self._scheduler
        try:
            return self._speculator.draft(scheduler.running, scheduler.most_draft_tokens, self._runner.num_possible)
        except Exception:  # nobody's answer needs it
            _log.exception("speculation_failed")
            self._speculator = None
            return {}

    def _commit(
        self,
        batch: ScheduledBatch,
        result: StepResult,
        now_s: float,
        deltas: list[TokenDelta],
        failures: dict[int, PenstockError],
    ) -> None:
        for owner, score in zip(batch.score_owners, result.scores, strict=True):
            self._prompt_logprobs.setdefault(batch.sequence_ids[owner], []).append(score)
        for owner, total in zip(batch.pool_owners, result.pooled, strict=True):
            sequence_id = batch.sequence_ids[owner]
            self._pooled[sequence_id] = self._pooled.get(sequence_id, 0) + total
        gained: list[tuple[Sequence, list[OutputStep], list[SampledToken]]] = []
        row = 0
        while row < len(batch.sample_ids):
            sequence_id = batch.sample_ids[row]
            sequence = self._scheduler.sequence(sequence_id)
            draft = batch.drafts.get(sequence_id, ())
            kept = kept_tokens(result.tokens[row : row + 1 + len(draft)], draft)
            row += 1 + len(draft)
            if draft and self._speculator is not None:
                self._speculator.verified(sequence_id, len(draft), max(0, len(kept) - 1))
            if not kept:
                failures[sequence_id] = _not_finite()
            elif sequence.request.sampling.beam is not None:
                assert kept[0].logprobs is not None, "beams are asked for proposals"
                self._proposals[sequence_id] = kept[0].logprobs
            else:
                take, ending = partial(self._runner.commit, sequence_id), partial(self._ending, sequence_id)
                try:
                    steps = self._outputs[sequence_id].extend([token.token_id for token in kept], take, ending)
                except InvalidRequest as error:  # a grammar that cannot be followed any further
                    failures[sequence_id] = error
                else:
                    gained.append((sequence, steps, kept[: len(steps)]))
        sampled = {sequence.id: [token.token_id for token in tokens] for sequence, _, tokens in gained}
        self._scheduler.commit(batch, sampled, now_s)
        for sequence, steps, tokens in gained:
            self._num_generation_tokens += len(tokens)
            deltas.extend(self._delta(sequence, step, token, now_s) for step, token in zip(steps, tokens, strict=True))
        for sequence_id in batch.ended_ids:
            try:
                deltas.append(self._reading(self._scheduler.sequence(sequence_id), now_s))
            except StepFailed as error:
                failures[sequence_id] = error

    def _ending(self, sequence_id: int) -> SequenceOf[int]:
        """Return tokens with which the text of a sequence that may not go on matches its grammar, if it is to."""
        if not self._scheduler.sequence(sequence_id).request.sampling.completes_grammar:
            return ()
        matcher = self._runner.matcher(sequence_id)
        assert matcher is not None, "there is a grammar to complete"
        return self.grammars.ending(matcher)

    def _collect_features(self, now_s: float, deltas: list[TokenDelta]) -> bool:
        """Take in what was encoded, and end the requests of what could not be; return whether there are any."""
        errors = self._desk.collect()
        failed = [
            (sequence.id, errors[features.id])
            for sequence in (self._scheduler.running if errors else ())
            for features in sequence.pictures.held
            if features.id in errors
        ]
        for sequence_id, error in failed:
            deltas.extend(self._fail(sequence_id, error, now_s))
        return bool(failed)

    # ---- beams

    def _search(self, now_s: float, deltas: list[TokenDelta], failures: dict[int, PenstockError]) -> None:
        """Take every search whose beams were computed a step further."""
        proposals, self._proposals = self._proposals, {}
        requests = {id(request): request for request in (self._scheduler.sequence(one).request for one in proposals)}
        for request in requests.values():
            if any(sequence.id in failures for sequence in request.sequences):
                continue
            sampling = request.sampling
            assert sampling.beam is not None
            if not request.sequences[0].num_output_tokens:
                # It begins, or begins again after a preemption.
                output = ChoiceOutput(sampling, self._tokenizer, self._eos_token_ids)
                self._searches[request.request_id] = BeamSearch(sampling.beam, sampling, output)
            search = self._searches[request.request_id]
            steps = search.advance(
                [proposals[beam.id] for beam in request.sequences], num_proposed(sampling, self._eos_token_ids)
            )
            if steps:
                self._scheduler.advance(request, steps, now_s)
                continue
            best = [beam for _, beam in search.finished[: sampling.n]]
            deltas += [self._found(request, index, beam, now_s) for index, beam in enumerate(best)]
            self._num_generation_tokens += sum(len(beam.path()) for beam in best)
            self._drop(request)

    def _found(self, request: Request, index: int, beam: Beam, now_s: float) -> TokenDelta:
        """Return a whole choice that a search has found."""
        path = beam.path()
        tokens = [one.token for one in path if one.token is not None]
        leader = request.sequences[0]
        return TokenDelta(
            request_id=request.request_id,
            index=index,
            text="".join(one.step.text for one in path),
            token_ids=tuple(token.chosen.token_id for token in tokens),
            logprobs=() if request.sampling.logprobs is None else tuple(tokens),
            finish_reason=beam.step.finish_reason,
            stop_reason=beam.step.stop_reason,
            usage=msgspec.structs.replace(_usage(leader), num_output_tokens=len(tokens)),
            timeline=msgspec.structs.replace(leader.timeline(finished_at_s=now_s), num_output_tokens=len(tokens)),
        )

    # ---- from tokens to deltas

    def _delta(self, sequence: Sequence, step: OutputStep, token: SampledToken, now_s: float) -> TokenDelta:
        """Return what a new token adds to a choice, ending the choice if it is the last."""
        prompt_logprobs = tuple(self._prompt_logprobs.pop(sequence.id, ()))
        ending: dict[str, Any] = {}
        if step.finish_reason is not None:
            self._finish(sequence)
            ending = {
                "finish_reason": step.finish_reason,
                "stop_reason": step.stop_reason,
                "usage": _usage(sequence),
                "timeline": sequence.timeline(finished_at_s=now_s),
            }
        return TokenDelta(
            request_id=sequence.request.request_id,
            index=sequence.index,
            text=step.text,
            token_ids=(token.token_id,),
            logprobs=() if token.logprobs is None else (token.logprobs,),
            prompt_logprobs=prompt_logprobs,
            **ending,
        )

    def _reading(self, sequence: Sequence, now_s: float) -> TokenDelta:
        """End a choice that generates nothing and return what was wanted of its prompt.

        Raises ``StepFailed`` if that is no number.
        """
        request = sequence.request
        scores = tuple(self._prompt_logprobs.pop(sequence.id, ()))
        embedding = None
        if request.pooling is not None:
            total = self._pooled.pop(sequence.id)
            if not np.isfinite(total).all():
                raise _not_finite()
            mean = total / sequence.num_prompt_tokens if request.pooling == "mean" else total
            embedding = mean.astype("<f4").tobytes()
        if not all(math.isfinite(score.chosen.logprob) for score in scores):
            raise _not_finite()
        self._finish(sequence)
        return TokenDelta(
            request_id=request.request_id,
            prompt_logprobs=scores,
            embedding=embedding,
            finish_reason="length",
            usage=_usage(sequence),
            timeline=sequence.timeline(finished_at_s=now_s),
        )

    def _fail(self, sequence_id: int, error: PenstockError, now_s: float) -> list[TokenDelta]:
        """End the whole request of a sequence with an error."""
        if sequence_id not in self._outputs:
            return []  # another choice of the same request failed in the same step
        request = self._scheduler.sequence(sequence_id).request
        self._drop(request)
        return [_error_delta(request, error, now_s)]

    def _refusal(self, request: Request, error: PenstockError) -> TokenDelta:
        self._drop(request)
        return _error_delta(request, error, self._clock())

    def _drop(self, request: Request) -> None:
        for sequence in request.sequences:
            self._finish(sequence)

    def _finish(self, sequence: Sequence) -> None:
        if self._outputs.pop(sequence.id, None) is None:
            return
        self._is_awaiting = False
        request = sequence.request
        if sequence.index == 0:
            self._num_prompt_tokens += sequence.num_prompt_tokens
        self._scheduler.finish(sequence)
        self._runner.remove(sequence.id)
        if self._speculator is not None:
            self._speculator.remove(sequence.id)
        self._prompt_logprobs.pop(sequence.id, None)
        self._pooled.pop(sequence.id, None)
        if request.is_finished:
            # Ending an undivided request's first choice ends them all, and each is then reported here.
            self._requests.pop(request.request_id, None)
            self._searches.pop(request.request_id, None)


def _not_finite() -> StepFailed:
    return StepFailed(
        "the model produced numbers that are not finite for this request; check the checkpoint, or run it with --dtype "
        "float32"
    )


def _usage(sequence: Sequence) -> Usage:
    return Usage(
        num_prompt_tokens=sequence.num_prompt_tokens,
        num_cached_tokens=sequence.num_cached_tokens,
        num_output_tokens=sequence.num_output_tokens,
    )


def _error_delta(request: Request, error: PenstockError, now_s: float) -> TokenDelta:
    reason: FinishReason = "error"
    return TokenDelta(
        request_id=request.request_id,
        finish_reason=reason,
        error=error_info(error),
        timeline=request.sequences[0].timeline(finished_at_s=now_s),
    )
