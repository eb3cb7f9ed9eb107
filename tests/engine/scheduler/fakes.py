"""A scheduler with its cache, driven without a model."""

import random
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from penstock.engine.config import SchedulerConfig
from penstock.engine.encoding import EncodePlanner, FeatureCache
from penstock.engine.kv import BlockPool, CacheManager
from penstock.engine.request import Request, Sequence, SequenceState
from penstock.engine.scheduler import AdmissionPolicy, ScheduledBatch, Scheduler
from penstock.engine.scheduler.plan import Plan
from penstock.protocol import BeamParams, GenerateRequest, Picture, Priority, SamplingParams


def request_of(
    name: str,
    *,
    prompt: list[int] | int = 8,
    max_tokens: int = 4,
    n: int = 1,
    tenant: str = "default",
    priority: Priority = Priority.P3,
    deadline_s: float | None = None,
    width: int | None = None,
    pictures: list[Picture] | None = None,
) -> GenerateRequest:
    """Return a request; a number as prompt means that many tokens nobody shares."""
    tokens = prompt if isinstance(prompt, list) else [hash((name, i)) % 1000 for i in range(prompt)]
    return GenerateRequest(
        request_id=name,
        prompt_token_ids=tokens,
        sampling=SamplingParams(
            max_tokens=max_tokens, n=n, beam=None if width is None else BeamParams(width=max(n, width))
        ),
        tenant=tenant,
        priority=priority,
        deadline_s=deadline_s,
        pictures=tuple(pictures or ()),
    )


def picture_of(key: str, offset: int, num_tokens: int) -> Picture:
    """Return a picture without pixels."""
    return Picture(key=key.encode(), offset=offset, num_tokens=num_tokens, pixels=b"", shape=(1, 0, 0), size=(0, 0))


@dataclass
class Driver:
    """Adds requests, runs steps of one second each and finishes sequences at ``max_tokens``."""

    num_blocks: int = 24
    block_size: int = 4
    config: SchedulerConfig = field(default_factory=lambda: SchedulerConfig(step_tokens=16, max_running=6))
    window: int | None = None
    admission: AdmissionPolicy | None = None
    feature_tokens: int = 40
    """Of pictures, whose features fit"""
    encoder_tokens: int = 10
    num_workers: int = 0
    """Processes that encode; 0: steps do"""
    sees_both_ways: bool = False
    reads_prompts_whole: bool = False

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.num_blocks)
        self.cache = CacheManager(self.pool, block_size=self.block_size, window=self.window)
        self.features = FeatureCache(most_bytes=self.feature_tokens, token_bytes=1)
        encoding = EncodePlanner(
            self.features,
            cost=lambda picture: picture.num_tokens / self.encoder_tokens,
            step_tokens=self.config.step_tokens,
            num_workers=self.num_workers,
            sees_both_ways=self.sees_both_ways,
            reads_prompts_whole=self.reads_prompts_whole,
        )
        self.scheduler = Scheduler(self.config, self.cache, admission=self.admission, encoding=encoding)
        plan_sequence = self.scheduler._plan_sequence

        def plan_and_check(
            plan: Plan, sequence: Sequence, num_new: int, now_s: float, draft: SequenceOf[int] = ()
        ) -> None:
            may_preempt = not draft and not plan.drafts
            num_preemptions = self.scheduler.counters.num_preemptions
            plan_sequence(plan, sequence, num_new, now_s, draft)
            assert may_preempt or self.scheduler.counters.num_preemptions == num_preemptions, "preempted for a guess"

        self.scheduler._plan_sequence = plan_and_check  # type: ignore[method-assign]
        self.under_way: list[int] = []
        """Ids of features that encoders elsewhere are at work on"""
        self.begun: dict[int, tuple[int, int]] = {}
        """Pictures that take several steps, by features' id: their tokens, and how many are yet to be encoded"""
        self.there: set[int] = set()
        """Ids of features that could be inserted"""
        self.now_s = 0.0
        self.random = random.Random(0)
        self.requests: dict[str, Request] = {}
        self.num_added = 0
        self.served: dict[str, int] = {}
        """Tokens computed, by tenant."""

    def add(self, request: GenerateRequest) -> Request:
        entry = Request(
            request,
            number=self.num_added,
            now_s=self.now_s,
            unix_s=0.0,
            reads_prompts_whole=self.reads_prompts_whole,
        )
        self.num_added += 1
        self.scheduler.add(entry, self.now_s)
        self.requests[entry.request_id] = entry
        return entry

    def abort(self, name: str) -> None:
        for sequence in self.requests.pop(name).sequences:
            self.scheduler.finish(sequence)

    def refuse_late(self) -> list[str]:
        refused = [request.request_id for request, _ in self.scheduler.refuse_late(self.now_s)]
        for name in refused:
            del self.requests[name]
        return refused

    def step(self, drafted: int = 0, accepted: int = 0) -> ScheduledBatch:
        """Run a step of one second, in which every decoding sequence guesses, and so many guesses come true."""
        self.now_s += 1
        running = self.scheduler.running
        drafts = {
            sequence.id: [7] * drafted
            for sequence in running
            if drafted and sequence.is_decoding and sequence.request.sampling.beam is None
        }
        batch = self.scheduler.schedule(self.now_s, drafts)
        self._encode(batch)
        self._check_pictures(batch)
        for sequence_id, num_new in zip(batch.sequence_ids, batch.query_lens, strict=True):
            tenant = self.scheduler.sequence(sequence_id).request.tenant
            self.served[tenant] = self.served.get(tenant, 0) + num_new
        for sequence_id, draft in batch.drafts.items():
            sequence = self.scheduler.sequence(sequence_id)
            assert sequence.num_output_tokens + len(draft) < sequence.request.sampling.max_tokens
            assert batch.sample_ids.count(sequence_id) == 1 + len(draft)
        is_beam = {one: self.scheduler.sequence(one).request.sampling.beam is not None for one in batch.sample_ids}
        sampled = {
            sequence_id: [7] * (1 + min(accepted, len(batch.drafts.get(sequence_id, ()))))
            for sequence_id in batch.sample_ids
            if not is_beam[sequence_id]
        }
        self.scheduler.commit(batch, sampled, self.now_s)
        for sequence_id in batch.sequence_ids:
            sequence = self.scheduler.sequence(sequence_id)
            assert len(sequence.table) == self.cache.blocks_for(sequence.num_computed_tokens)
        self._advance({one for one in batch.sample_ids if is_beam[one]})
        for sequence_id in sampled:
            sequence = self.scheduler.sequence(sequence_id)
            if sequence.num_output_tokens >= sequence.request.sampling.max_tokens:
                self.scheduler.finish(sequence)
                if sequence.request.is_finished:
                    del self.requests[sequence.request.request_id]
        return batch

    def _encode(self, batch: ScheduledBatch) -> None:
        self.there -= set(self.features.take_evicted())
        work = {feature_id: picture.num_tokens for feature_id, picture in batch.encode}
        if self.num_workers:
            self.under_way += work
            return
        small = [feature_id for feature_id, size in work.items() if size <= self.encoder_tokens]
        num_left = self.encoder_tokens - sum(work.pop(feature_id) for feature_id in small)
        assert num_left >= 0
        self._bring(small)
        for feature_id, size in work.items():
            first, *others = [tokens for tokens, _ in self.begun.values()] or [size]
            assert not self.begun or 4 * (sum(others) + size) <= first, "what is begun is held"
            self.begun[feature_id] = size, size
        for feature_id, (size, left) in list(self.begun.items())[:1]:
            self.begun[feature_id] = size, left - num_left
            if left <= num_left:
                del self.begun[feature_id]
                self._bring([feature_id])

    def encoded(self, count: int) -> None:
        """Bring the first so many of the features that encoders elsewhere are at work on."""
        done, self.under_way = self.under_way[:count], self.under_way[count:]
        self._bring(done)

    def _bring(self, feature_ids: list[int]) -> None:
        for feature_id in feature_ids:
            self.features.encoded(feature_id)
        self.there |= set(feature_ids)

    def _check_pictures(self, batch: ScheduledBatch) -> None:
        """Assert that every token of a picture in the batch shows its own feature, and no other token any."""
        expected = []
        row = 0
        for sequence_id, num_new, end in zip(batch.sequence_ids, batch.query_lens, batch.context_lens, strict=True):
            cursor = self.scheduler.sequence(sequence_id).pictures
            pictures = cursor.pictures
            assert not end - num_new < cursor.num_whole > end, "a part of a prompt that is read whole"
            for position in range(end - num_new, end):
                places = ((position - picture.offset, picture.num_tokens) for picture in pictures)
                expected += [(row, place) for place, num_tokens in places if 0 <= place < num_tokens]
                row += 1
            split = [one for one in pictures if one.offset < end < one.offset + one.num_tokens]
            assert not (split and self.sees_both_ways)
        shown = [(one.row + i, one.first + i) for one in batch.pictures for i in range(one.num_rows)]
        assert shown == expected
        assert {one.feature_id for one in batch.pictures} <= self.there

    def _advance(self, sequence_ids: set[int]) -> None:
        """Let each search's beams go on from any of them; it ends at ``max_tokens``."""
        requests = [one for one in self.requests.values() if one.sequences[0].id in sequence_ids]
        for request in requests:
            beams = request.sequences
            assert {beam.id for beam in beams} <= sequence_ids, "beams grow in the same steps"
            if beams[0].num_output_tokens + 1 == request.sampling.max_tokens:
                self.abort(request.request_id)
            else:
                steps = [(self.random.randrange(len(beams)), 7 + place) for place in range(len(beams))]
                self.scheduler.advance(request, steps, self.now_s)

    def check(self) -> None:
        """Assert everything that must hold between steps."""
        scheduler, pool = self.scheduler, self.pool
        owners = [0] * pool.num_blocks
        live = [sequence for request in self.requests.values() for sequence in request.sequences]
        for sequence in live:
            for block in sequence.table.block_ids:
                owners[block] += 1
            assert sequence.num_computed_tokens <= sequence.num_tokens
            running = sequence.state is SequenceState.RUNNING
            assert running == (sequence in scheduler.running)
            assert running or not sequence.table.block_ids, "who waits holds nothing"
        assert owners == [pool.references(block) for block in range(pool.num_blocks)]
        assert pool.num_free == owners.count(0)
        assert len(scheduler.running) <= self.config.max_running
        reserved = sum(sequence.reserved_blocks for sequence in scheduler.running)
        assert scheduler._reservations.num_blocks == reserved
        places = sum(len(s.request.sequences) - 1 for s in scheduler.running if s.is_leader)
        assert scheduler._reservations.num_places == places
        assert len(scheduler.running) + places <= self.config.max_running
        queued = [s for s in live if s.state is SequenceState.WAITING and (s.index == 0 or s.request.has_forked)]
        assert scheduler.num_waiting == len(queued)
        assert scheduler.num_waiting_tokens == sum(sequence.num_tokens for sequence in queued)
        held = [features for sequence in live for features in sequence.pictures.held]
        known = list(self.features._by_name.values())
        assert all(features.num_holders == held.count(features) for features in known)
        assert self.features.num_bytes == sum(features.num_bytes for features in known) <= self.feature_tokens
        idle = [features.id for features in known if features.is_ready and not features.num_holders]
        assert sorted(self.features._idle) == sorted(idle)
        assert all(sequence in scheduler.running for sequence in live if sequence.pictures.held)

    def run_to_end(self, most_steps: int) -> None:
        """Step until nothing is left; fails if that takes more than ``most_steps``."""
        for _ in range(most_steps):
            if not self.requests:
                break
            self.step()
            self.encoded(1)
            self.check()
        assert not self.requests, f"starved: {list(self.requests)}"
        assert not self.scheduler.has_work
        assert self.pool.num_free == self.pool.num_blocks
        assert not self.scheduler._sequences
        assert not self.scheduler._fairness._counters
