"""Who may queue, and who is sent away: at once, or for having waited until it is too late."""

import heapq
import math
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf

from penstock.engine.config import SchedulerConfig
from penstock.engine.kv import CacheManager
from penstock.engine.request import Request, Sequence
from penstock.engine.scheduler.ordering import OrderingPolicy
from penstock.engine.scheduler.rates import PrefillRate
from penstock.engine.scheduler.reservations import Reservations
from penstock.engine.scheduler.waiting import WaitingQueue
from penstock.errors import ContextTooLong, DeadlineUnmeetable, InvalidRequest, Overloaded
from penstock.units import format_bytes


class Intake:
    """Holds requests against what the engine could ever do, what it has to do already, and their deadlines."""

    def __init__(
        self,
        config: SchedulerConfig,
        cache: CacheManager,
        *,
        ordering: OrderingPolicy,
        reservations: Reservations,
        waiting: WaitingQueue,
        running: SequenceOf[Sequence],
        max_running: int,
    ) -> None:
        """``waiting`` and ``running`` are looked at, and stay the caller's."""
        self.prefill_rate = PrefillRate()
        self._config = config
        self._cache = cache
        self._ordering = ordering
        self._reservations = reservations
        self._waiting = waiting
        self._running = running
        self._max_running = max_running
        self._num_picture_bytes = 0
        """Pixels of all requests, which no count of tokens bounds: one that is preempted needs them again"""
        self._latest_starts: list[tuple[float, int]] = []
        """Heap of (when a waiting sequence must start to meet its deadline, id); stale entries are skipped."""

    def check_fits(self, request: Request) -> None:
        """Raise ``ContextTooLong`` if the cache could never hold a request, or so many never run at once."""
        num_prompt = request.sequences[0].num_prompt_tokens
        num_choices = len(request.sequences)
        if num_choices > self._max_running:
            raise ContextTooLong(
                f"{num_choices} choices or beams are wanted and at most {self._max_running} sequences run at once: ask "
                "for fewer",
                param="n" if request.sampling.beam is None else "best_of",
            )
        capacity = self._cache.pool.num_blocks
        needed = self._cache.most_blocks_held(num_prompt + request.sampling.max_tokens, self._config.step_tokens)
        if needed > capacity:
            raise ContextTooLong(
                f"{num_prompt} prompt tokens and {request.sampling.max_tokens} to generate need {needed} cache blocks; "
                f"there are {capacity}: shorten the prompt or lower max_tokens",
                param="max_tokens",
            )
        if request.sampling.beam is not None:
            needed = self._reservations.blocks_for(request.sequences[0])
            if needed > capacity:
                raise ContextTooLong(
                    f"{num_choices} beams of {num_prompt} prompt tokens and {request.sampling.max_tokens} to generate "
                    f"may need {needed} cache blocks; there are {capacity}: lower best_of or max_tokens",
                    param="best_of",
                )

    def check_queue(self, request: Request, now_s: float) -> None:
        """Raise ``Overloaded`` if the queue is full, ``DeadlineUnmeetable`` if a first token cannot come in time.

        Raises ``InvalidRequest`` if the images are larger than all that may ever be kept.
        """
        config = self._config
        leader = request.sequences[0]
        if len(self._waiting) >= config.max_waiting:
            raise Overloaded(
                f"{len(self._waiting)} requests are queued, the most this server allows: retry later",
                retry_after_s=self._backlog_s(),
            )
        if self._waiting.num_tokens + leader.num_tokens > config.max_waiting_tokens and self._waiting:
            raise Overloaded(
                f"{self._waiting.num_tokens} prompt tokens are queued and this request has {leader.num_tokens}; at "
                f"most {config.max_waiting_tokens} may queue: retry later",
                retry_after_s=self._backlog_s(),
            )
        self._check_images(leader.pictures.num_bytes)
        self._check_deadline(request, now_s)

    def enter(self, request: Request) -> None:
        """A request that passed the checks is queued for the first time."""
        leader = request.sequences[0]
        self._num_picture_bytes += leader.pictures.num_bytes
        if request.deadline_at_s < math.inf:
            latest_start_s = request.deadline_at_s - self.prefill_rate.seconds_for(leader.num_tokens)
            heapq.heappush(self._latest_starts, (latest_start_s, leader.id))

    def leave(self, request: Request) -> None:
        """A request's last choice has ended."""
        self._num_picture_bytes -= request.sequences[0].pictures.num_bytes

    def overdue(self, now_s: float) -> Iterator[int]:
        """Take out the ids of sequences that should have started by now; they may have, and may have ended."""
        while self._latest_starts and self._latest_starts[0][0] < now_s:
            yield heapq.heappop(self._latest_starts)[1]

    def too_late(self, request: Request, now_s: float) -> DeadlineUnmeetable:
        """Return what to tell a request that was in the queue for too long."""
        return DeadlineUnmeetable(
            f"the first token was due {request.deadline_at_s - request.arrival_s:.3g} s after arrival; after "
            f"{now_s - request.arrival_s:.3g} s in the queue it can no longer come in time: retry later, or ask for a "
            "later one",
            retry_after_s=self._backlog_s(),
        )

    def _backlog_s(self) -> float:
        """Return how long the queue's tokens take at the current rate, at least a second."""
        return max(1.0, self.prefill_rate.seconds_for(self._waiting.num_tokens))

    def _check_images(self, num_bytes: int) -> None:
        most, present = self._config.max_image_bytes, self._num_picture_bytes
        if num_bytes > most:
            raise InvalidRequest(
                f"images of {format_bytes(num_bytes)} are shown, as the model sees them, and this server keeps "
                f"{format_bytes(most)} at a time: show fewer or smaller ones, or raise scheduler.max_image_bytes",
                param="messages",
            )
        if num_bytes and present + num_bytes > most:
            raise Overloaded(
                f"images of {format_bytes(present)} are waited for and this request has {format_bytes(num_bytes)} of "
                f"them; this server keeps {format_bytes(most)} at a time: retry later",
                retry_after_s=self._backlog_s(),
            )

    def _check_deadline(self, request: Request, now_s: float) -> None:
        if request.deadline_at_s == math.inf:
            return
        key = self._ordering.key(request.sequences[0])
        ahead = sum(other.num_tokens for other in self._waiting if self._ordering.key(other) < key)
        for other in self._running:
            num_missing = other.num_tokens - other.num_computed_tokens
            if num_missing == 1 or self._ordering.key(other) < key:
                ahead += num_missing
        needed_s = self.prefill_rate.seconds_for(ahead + request.sequences[0].num_tokens)
        if now_s + needed_s > request.deadline_at_s:
            raise DeadlineUnmeetable(
                f"the first token is due in {request.deadline_at_s - now_s:.3g} s and would take {needed_s:.3g} s "
                f"with {ahead} tokens ahead: retry later, or ask for a later one",
                retry_after_s=max(1.0, self.prefill_rate.seconds_for(ahead)),
            )
