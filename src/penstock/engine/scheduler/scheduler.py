"""The scheduler: one rule for all. Each step lets some sequences catch up within a token budget."""

import math
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from penstock.engine.config import SchedulerConfig
from penstock.engine.encoding import EncodePlanner
from penstock.engine.kv import CacheManager
from penstock.engine.request import Request, Sequence, SequenceState
from penstock.engine.scheduler.admission import AdmissionPolicy, ExpectedGrowth
from penstock.engine.scheduler.batch import ScheduledBatch
from penstock.engine.scheduler.fairness import TokenFairness
from penstock.engine.scheduler.intake import Intake
from penstock.engine.scheduler.ordering import EarliestDeadlineFirst, OrderingPolicy
from penstock.engine.scheduler.plan import Plan
from penstock.engine.scheduler.preemption import CheapestToRecompute, VictimPolicy
from penstock.engine.scheduler.rates import PrefillRate
from penstock.engine.scheduler.reservations import Reservations
from penstock.engine.scheduler.waiting import WaitingQueue
from penstock.engine.scheduler.waits import WaitClock
from penstock.errors import DeadlineUnmeetable
from penstock.estimate import LEAST_SAMPLED_ROWS
from penstock.protocol import Preemption, Priority

_SHARE_BESIDE_DECODING = 3 / 8
"""Of a step's tokens, what prompts may take where as many others decode, or more, and wait for them"""
_NO_DRAFTS: Mapping[int, SequenceOf[int]] = {}


@dataclass(slots=True)
class SchedulerCounters:
    """Totals since the scheduler was made."""

    num_prefix_queries: int = 0
    num_prefix_hits: int = 0
    num_preemptions: int = 0
    num_recomputed_tokens: int = 0


class Scheduler:
    """Decides each step. The order of calls is ``schedule`` -> run the batch -> ``commit`` or ``fail``.

    Three small policies can be swapped: who goes first, whether the cache can take one more, who gives way.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cache: CacheManager,
        *,
        ordering: OrderingPolicy | None = None,
        admission: AdmissionPolicy | None = None,
        victims: VictimPolicy | None = None,
        encoding: EncodePlanner | None = None,
    ) -> None:
        self.cache = cache
        self.encoding = encoding or EncodePlanner.blind()
        self.counters = SchedulerCounters()
        self.running: list[Sequence] = []
        """In the order of admission."""
        self._config = config
        self._most_beside_decoding = math.ceil(config.step_tokens * _SHARE_BESIDE_DECODING)
        # Every running sequence must be able to decode in one step.
        self._max_running = min(config.max_running, config.step_tokens)
        self._ordering = ordering or EarliestDeadlineFirst()
        self._admission = admission or ExpectedGrowth()
        self._victims = victims or CheapestToRecompute()
        self._fairness = TokenFairness()
        self._waiting = WaitingQueue(self._ordering, self._fairness)
        self._waits = WaitClock()
        self._reservations = Reservations(cache, self._admission, config.step_tokens)
        self._intake = Intake(
            config,
            cache,
            ordering=self._ordering,
            reservations=self._reservations,
            waiting=self._waiting,
            running=self.running,
            max_running=self._max_running,
        )
        self._sequences: dict[int, Sequence] = {}
        self._next_id = 0
        self._unsplit: Sequence | None = None
        """Goes first in the next step: decoding sequences left too little for a picture that must be read whole"""

    # ---- what comes in and what leaves

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue."""
        return len(self._waiting)

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens of the sequences in the queue."""
        return self._waiting.num_tokens

    @property
    def prefill_rate(self) -> PrefillRate:
        """How fast prompts have lately been computed; who runs the batches tells it."""
        return self._intake.prefill_rate

    @property
    def has_work(self) -> bool:
        """Whether a step could do something."""
        return bool(self.running or self._waiting)

    def sequence(self, sequence_id: int) -> Sequence:
        """Return an unfinished sequence."""
        return self._sequences[sequence_id]

    def add(self, request: Request, now_s: float) -> None:
        """Queue a request.

        Raises ``ContextTooLong`` if the cache could never hold it, ``InvalidRequest`` if its pictures could never be
        computed, ``Overloaded`` if the queue is full, ``DeadlineUnmeetable`` if its first token cannot come in time;
        then nothing has changed.
        """
        leader = request.sequences[0]
        self._intake.check_fits(request)
        self.encoding.require_fits(leader.pictures, is_scored=leader.num_to_score > 0)
        self._intake.check_queue(request, now_s)
        for sequence in request.sequences:
            sequence.id = self._next_id
            self._next_id += 1
            self._sequences[sequence.id] = sequence
            self._fairness.enter(request.tenant)
        self._intake.enter(request)
        self._enqueue(leader, now_s)

    def finish(self, sequence: Sequence) -> None:
        """End a sequence in any state and free what it holds. Choices not yet split off end with their leader."""
        if sequence.state is SequenceState.FINISHED:
            return
        if sequence.is_leader:
            # Without a leader the others can never start.
            for other in sequence.request.sequences[1:]:
                self._forget(other)
        if sequence.state is SequenceState.RUNNING:
            self._leave_running(sequence)
        elif sequence.id in self._sequences and self._is_queued(sequence):
            self._waiting.remove(sequence)
        if sequence.is_leader:
            sequence.request.has_forked = True
        if sequence.num_output_tokens:
            self._admission.observe(sequence)
        self._forget(sequence)

    def refuse_late(self, now_s: float) -> list[tuple[Request, DeadlineUnmeetable]]:
        """Take out the waiting requests that can no longer meet their deadline and say why of each."""
        refused = []
        for sequence_id in self._intake.overdue(now_s):
            sequence = self._sequences.get(sequence_id)
            if sequence is None or sequence.first_admitted_at_s is not None:
                continue
            error = self._intake.too_late(sequence.request, now_s)
            self.finish(sequence)
            refused.append((sequence.request, error))
        return refused

    # ---- one step

    @property
    def most_draft_tokens(self) -> int:
        """Tokens of a step that may be guesses: a half, so that prompts do not starve, of what decoding leaves.

        All of them are sampled, and there is memory for as many rows of logits as may run.
        """
        num_running = len(self.running)
        by_tokens = (self._config.step_tokens - num_running) // 2
        by_logits = max(self._config.max_running, LEAST_SAMPLED_ROWS) - num_running
        return max(0, min(by_tokens, by_logits))

    def reserve(self, sequence: Sequence, num_drafted: int) -> bool:
        """Give a decoding sequence its blocks for a draft before the step; False, with nothing done, without room."""
        start, end = sequence.num_computed_tokens, sequence.num_tokens + num_drafted
        if not self._has_room(sequence, num_drafted) or self.cache.is_shared(sequence.table, start):
            return False
        self.cache.grow(sequence.table, start, end)
        self._reservations.grow(sequence)
        return True

    def schedule(self, now_s: float, drafts: Mapping[int, SequenceOf[int]] = _NO_DRAFTS) -> ScheduledBatch:
        """Decide the next step; an empty batch means there is nothing to do.

        ``drafts`` are guesses at what comes next in decoding sequences, by id. They are taken where there is room for
        them: nobody is preempted for a guess.
        """
        self._waits.step(now_s)
        plan = Plan(tokens_left=self._config.step_tokens, draft_tokens_left=self.most_draft_tokens)
        self.encoding.begin_step()
        self._plan_running(plan, now_s, drafts)
        self._admit(plan, now_s)
        return plan.batch(self.cache.block_size, self.encoding.take_work())

    def commit(self, batch: ScheduledBatch, sampled: Mapping[int, SequenceOf[int]], now_s: float) -> None:
        """Take the results of a batch in: ``sampled`` holds the new tokens of each sequence that got any.

        Those are one token, or where there was a draft as much of it as came true and one more. The other choices of a
        request are split off when its prompt is done.
        """
        for sequence_id, num_new in zip(batch.sequence_ids, batch.query_lens, strict=True):
            sequence = self._sequences[sequence_id]
            start = sequence.num_computed_tokens
            if sequence_id in batch.drafts:
                # What came true of a draft is as if it had been known.
                token_ids = sampled.get(sequence_id, ())
                sequence.token_ids.extend(token_ids[:-1])
                num_new = len(token_ids)
            end = start + num_new
            if start < sequence.most_computed_tokens:
                recomputed = min(end, sequence.most_computed_tokens) - start
                sequence.num_recomputed_tokens += recomputed
                self.counters.num_recomputed_tokens += recomputed
            sequence.num_computed_tokens = end
            self.cache.trim(sequence.table, end)
            sequence.num_scored_tokens = max(sequence.num_scored_tokens, min(end, sequence.num_to_score))
            sequence.most_computed_tokens = max(end, sequence.most_computed_tokens)
            sequence.num_steps += 1
            if end // self.cache.block_size > sequence.table.num_registered or self.cache.window is not None:
                self.cache.commit(sequence.table, sequence.token_ids, end, sequence.pictures.pictures)
            if not sequence.pictures.is_done:
                self.encoding.passed(sequence.pictures, end)
            if sequence.is_leader and end == sequence.num_tokens:
                self._fork(sequence)
        for sequence_id, token_ids in sampled.items():
            sequence = self._sequences[sequence_id]
            sequence.token_ids.append(token_ids[-1])
            if sequence.first_token_at_s is None:
                sequence.first_token_at_s = now_s
            self._fairness.charge(sequence.request.tenant, num_output_tokens=len(token_ids))

    def advance(self, request: Request, steps: SequenceOf[tuple[int, int]], now_s: float) -> None:
        """Let the beams of a request go on: each as the one that ``steps`` numbers was, with the token it names.

        Beams that come from one share its blocks; what nobody goes on from is given back.
        """
        before = [(sequence.table, sequence.token_ids) for sequence in request.sequences]
        taken: set[int] = set()
        for sequence, (parent, token_id) in zip(request.sequences, steps, strict=True):
            table, token_ids = before[parent]
            sequence.table = self.cache.fork(table) if parent in taken else table
            taken.add(parent)
            sequence.token_ids = [*token_ids, token_id]
            if sequence.first_token_at_s is None:
                sequence.first_token_at_s = now_s
        for place, (table, _) in enumerate(before):
            if place not in taken:
                self.cache.close(table)
        self._fairness.charge(request.tenant, num_output_tokens=len(steps))

    # ---- running sequences

    def _plan_running(self, plan: Plan, now_s: float, drafts: Mapping[int, SequenceOf[int]]) -> None:
        """Give every decoding sequence its token and draft, then the prompts their chunks, most urgent first.

        A prompt lets those in that wait in a more urgent class: it may be long, and fill many steps.
        """
        prefilling = []
        first, self._unsplit = self._unsplit, None
        if first is not None and first.state is SequenceState.RUNNING:
            self._plan_chunk(plan, first, now_s)
        for sequence in self.running[:]:
            if sequence.state is not SequenceState.RUNNING or sequence.id in plan.entries:
                continue  # preempted for one before it, or first
            if sequence.num_tokens - sequence.num_computed_tokens == 1 and sequence.pictures.is_done:
                if not plan.tokens_left:
                    continue  # a picture went first; where nothing is left, none will in the next step
                draft = self._draft_that_fits(plan, sequence, drafts[sequence.id]) if sequence.id in drafts else ()
                self._plan_sequence(plan, sequence, 1, now_s, draft)
            else:
                prefilling.append(sequence)
        if len(prefilling) + self.num_waiting <= len(plan.entries) and first is None:
            # Where more wait for a first token than for their next, steps are theirs. A picture that goes first has to
            # be read whole, and may take what there is.
            plan.tokens_left = min(plan.tokens_left, self._most_beside_decoding)
        if len(prefilling) > 1:
            prefilling.sort(key=self._ordering.key)
        for sequence in prefilling:
            self._admit(plan, now_s, before=sequence.request.priority)
            if not plan.tokens_left:
                break
            if sequence.state is not SequenceState.RUNNING:
                continue
            self._plan_chunk(plan, sequence, now_s)

    def _plan_chunk(self, plan: Plan, sequence: Sequence, now_s: float) -> None:
        num_new = self._chunk(plan, sequence, sequence.num_computed_tokens)
        self._note_awaiting(sequence, now_s)
        if num_new:
            self._plan_sequence(plan, sequence, num_new, now_s)

    def _note_awaiting(self, sequence: Sequence, now_s: float) -> None:
        """Count the time in which a running sequence cannot go on until a picture is encoded."""
        if sequence.pictures.is_awaiting:
            sequence.awaiting_since_s = now_s if sequence.awaiting_since_s is None else sequence.awaiting_since_s
        elif sequence.awaiting_since_s is not None:
            awaited_s, sequence.awaiting_since_s = now_s - sequence.awaiting_since_s, None
            sequence.waited_s["images"] = sequence.waited_s.get("images", 0.0) + awaited_s

    def _chunk(self, plan: Plan, sequence: Sequence, start: int) -> int:
        """Return how many tokens from ``start`` on a prompt can compute now; it holds the features that they take."""
        end = min(sequence.num_tokens, start + plan.tokens_left)
        cursor = sequence.pictures
        if cursor.is_done:
            return end - start
        reached = self.encoding.reach(cursor, start, end)
        # There are tokens left, so everybody who decodes has theirs, and can spare the next step's.
        if reached == start and end < self.encoding.whole_end(cursor, start) and self._unsplit is None:
            self._unsplit = sequence
        return reached - start

    def _draft_that_fits(self, plan: Plan, sequence: Sequence, draft: SequenceOf[int]) -> SequenceOf[int]:
        """Return as much of ``draft`` as there is room for, and as could come true before the output's end."""
        if not sequence.is_decoding:
            return ()
        num_left = sequence.request.sampling.max_tokens - sequence.num_output_tokens - 1
        draft = draft[: min(num_left, plan.draft_tokens_left)]
        return draft if self._has_room(sequence, len(draft)) else ()

    def _has_room(self, sequence: Sequence, num_drafted: int) -> bool:
        """Whether a draft leaves the blocks that whatever else is in the step can need at most."""
        spare = 2 * len(self.running) + self.cache.blocks_for(self._config.step_tokens)
        return self.cache.has_room(sequence.table, sequence.num_tokens + num_drafted, spare=spare)

    def _plan_sequence(
        self, plan: Plan, sequence: Sequence, num_new: int, now_s: float, draft: SequenceOf[int] = ()
    ) -> None:
        """Add a running sequence to the step, preempting others, or at last itself, if blocks are short."""
        num_new += len(draft)
        end = sequence.num_computed_tokens + num_new
        while True:
            copies = self.cache.grow(sequence.table, sequence.num_computed_tokens, end)
            if copies is not None:
                break
            victim = self._victims.choose(self._less_urgent(sequence), self.cache) or sequence
            for gone in self._preempt(victim, now_s):
                plan.remove(gone)
            plan.has_preempted = True
            if sequence.state is not SequenceState.RUNNING:
                return
        self._reservations.grow(sequence)
        plan.add(sequence, num_new, copies, draft)

    def _less_urgent(self, sequence: Sequence) -> list[Sequence]:
        """Return the running sequences that may be preempted for ``sequence``: of no more urgent class."""
        priority = sequence.request.priority
        return [other for other in self.running if other is not sequence and other.request.priority >= priority]

    def _preempt(self, sequence: Sequence, now_s: float) -> SequenceOf[Sequence]:
        """Take a sequence's blocks and queue it again; return who no longer runs."""
        request = sequence.request
        if request.sampling.beam is not None and request.has_forked and len(request.sequences) > 1:
            return self._preempt_beams(request, now_s)
        preemption = Preemption(at_s=now_s - sequence.request.arrival_s, num_tokens_lost=sequence.num_computed_tokens)
        self._leave_running(sequence)
        self._note_awaiting(sequence, now_s)
        sequence.preemptions.append(preemption)
        sequence.num_computed_tokens = 0
        self.counters.num_preemptions += 1
        self._enqueue(sequence, now_s)
        return (sequence,)

    def _preempt_beams(self, request: Request, now_s: float) -> SequenceOf[Sequence]:
        """Take the blocks of all beams and queue their search from its beginning.

        Beams are worth something only together, and which there are is decided anew from the prompt on in as many
        steps; the prefix cache may still have the prompt.
        """
        leader = request.sequences[0]
        at_s, num_lost = now_s - request.arrival_s, leader.num_computed_tokens
        for sequence in request.sequences:
            self._leave_running(sequence)
            sequence.restart()
            sequence.state = SequenceState.WAITING
            sequence.preemptions.append(Preemption(at_s=at_s, num_tokens_lost=num_lost))
        self.counters.num_preemptions += len(request.sequences)
        request.has_forked = False
        self._enqueue(leader, now_s)
        return request.sequences

    # ---- admission

    def _admit(self, plan: Plan, now_s: float, *, before: Priority | None = None) -> None:
        """Move waiting sequences in while places, blocks and the step's tokens last. Nobody overtakes the first.

        With ``before``, only those of classes more urgent than that.
        """
        if plan.has_preempted:
            self._waits.reason = "blocks"
            return
        self._waits.reason = "step_tokens"
        while plan.tokens_left:
            sequence = self._waiting.first(now_s, self._config.starvation_s)
            if sequence is None or (before is not None and sequence.request.priority >= before):
                return
            num_places = len(sequence.request.sequences) if sequence.is_leader else 1
            if len(self.running) + self._reservations.num_places + num_places > self._max_running and self.running:
                self._waits.reason = "max_running"
                return
            if not self._admit_sequence(plan, sequence, now_s):
                self._waits.reason = "blocks"
                return

    def _admit_sequence(self, plan: Plan, sequence: Sequence, now_s: float) -> bool:
        request = sequence.request
        reserved = self._reservations.blocks_for(sequence)
        most_shared = self.cache.blocks_for(sequence.num_tokens)
        if not self._fits(reserved - most_shared):
            return False  # spares the search for a prefix that could not help
        pictures = sequence.pictures
        table, num_cached = self.cache.open(
            sequence.token_ids, request.salt, most=sequence.most_reusable_tokens, pictures=pictures.pictures
        )
        num_shared = sum(1 for block in table.block_ids if self.cache.pool.references(block) > 1)
        copies = None
        if self._fits(reserved - num_shared):
            pictures.begin(num_cached)
            num_new = self._chunk(plan, sequence, num_cached)
            copies = self.cache.grow(table, num_cached, num_cached + num_new)
        if copies is None:
            self.encoding.release(pictures)
            self.cache.close(table)
            return False
        self._waiting.remove(sequence)
        self._waits.leave(sequence)
        sequence.state = SequenceState.RUNNING
        self.running.append(sequence)
        self._note_awaiting(sequence, now_s)
        self._reservations.take(sequence, reserved, num_shared=num_shared)
        sequence.table = table
        sequence.num_computed_tokens = num_cached
        if sequence.first_admitted_at_s is None:
            sequence.first_admitted_at_s = now_s
            sequence.num_cached_tokens = num_cached
            self.counters.num_prefix_queries += sequence.num_tokens
            self.counters.num_prefix_hits += num_cached
            self._fairness.charge(request.tenant, num_input_tokens=sequence.num_tokens - num_cached)
        if num_new:
            plan.add(sequence, num_new, copies)
        return True

    def _fits(self, num_blocks: int) -> bool:
        """Whether that many blocks can be set aside; a sequence alone may have the whole pool."""
        return not self.running or self._reservations.fits(num_blocks)

    def _fork(self, leader: Sequence) -> None:
        """Let the other choices of a request share the computed prompt and go their own ways."""
        request = leader.request
        request.has_forked = True
        for twin in request.sequences[1:]:
            twin.table = self.cache.fork(leader.table)
            twin.num_computed_tokens = leader.num_computed_tokens
            twin.pictures.begin(leader.num_computed_tokens)
            twin.most_computed_tokens = max(twin.most_computed_tokens, leader.num_computed_tokens)
            twin.num_cached_tokens = leader.num_cached_tokens
            twin.first_admitted_at_s = leader.first_admitted_at_s
            twin.waited_s = dict(leader.waited_s)
            twin.state = SequenceState.RUNNING
            self.running.append(twin)
        self._reservations.split(leader)

    # ---- bookkeeping

    def _enqueue(self, sequence: Sequence, now_s: float) -> None:
        sequence.state = SequenceState.WAITING
        self._waits.enter(sequence, now_s)
        self._waiting.push(sequence, now_s)

    def _is_queued(self, sequence: Sequence) -> bool:
        return sequence.state is SequenceState.WAITING and (sequence.index == 0 or sequence.request.has_forked)

    def _leave_running(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._reservations.give_back(sequence)
        self.encoding.release(sequence.pictures)
        self.cache.close(sequence.table)

    def _forget(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.FINISHED
        if self._sequences.pop(sequence.id, None) is not None:
            self._fairness.leave(sequence.request.tenant)
            if sequence.request.is_finished:
                self._intake.leave(sequence.request)
