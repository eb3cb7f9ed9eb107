"""Which pictures a step encodes, and how far that lets each prompt go."""

from collections.abc import Callable

from penstock.engine.encoding.cursor import PictureCursor
from penstock.engine.encoding.features import FeatureCache, Features
from penstock.errors import InvalidRequest
from penstock.estimate.seeing import MOST_BESIDE
from penstock.protocol import Picture
from penstock.units import format_bytes

_MOST_AWAITED_STEPS = 2
"""Steps' budgets that may be on their way to each encoder in another process, so that none waits for the next step"""
_SMALL_SHARE = 0.5
"""Of a step's budget, what pictures of one step get on average while larger ones are begun and not done"""


class EncodePlanner:
    """Gives features to sequences in the order of their pictures, so that whoever holds any can go on.

    Where encoding is part of the step, pictures that cost a step's budget at most are encoded in one. Those that cost
    more are begun, and have what the others leave of each step, a half on average at least: so neither waits for the
    other to be done. Of those begun the first is any, and others are small beside it, for each is held in part.
    Elsewhere the budget bounds what is under way, and one that costs more is at most under way for each encoder.
    """

    def __init__(
        self,
        features: FeatureCache,
        *,
        cost: Callable[[Picture], float],
        step_tokens: int,
        num_workers: int = 0,
        sees_both_ways: bool = False,
        reads_prompts_whole: bool = False,
    ) -> None:
        """``cost`` is that of encoding a picture, 1 a step's budget. ``num_workers`` processes encode; 0: steps do.

        ``sees_both_ways``: a picture's tokens see those behind them too, so all are computed in one step.
        ``reads_prompts_whole``: so do all tokens of a prompt that shows one.
        """
        self.features = features
        self.reads_prompts_whole = reads_prompts_whole
        self._cost = cost
        self._step_tokens = step_tokens
        self._num_workers = num_workers
        self._sees_both_ways = sees_both_ways
        self._work: list[tuple[int, Picture]] = []
        self._coming: set[int] = set()
        """Features that this step will have before its forward pass"""
        self._left = 0.0
        """Of the budget, for pictures that cost no more"""
        self._is_spent = False
        """Whether somebody waits for more than is left"""
        self._begun: list[Features] = []
        """Of pictures that cost more, in order"""

    @classmethod
    def blind(cls) -> "EncodePlanner":
        """Return what models have that see nothing."""
        return cls(FeatureCache(most_bytes=0, token_bytes=1), cost=lambda picture: 0.0, step_tokens=0)

    def require_fits(self, cursor: PictureCursor, *, is_scored: bool) -> None:
        """Raise ``InvalidRequest`` for pictures that could never be computed.

        ``is_scored``: how likely each token of the prompt is after those before it is wanted.
        """
        pictures = cursor.pictures
        if not pictures:
            return
        if not self.features.most_bytes:
            raise InvalidRequest("this model sees no images; ask one that does, or leave them out", param="messages")
        largest = max(picture.num_tokens for picture in pictures)
        num_bytes = largest * self.features.token_bytes
        if num_bytes > self.features.most_bytes:
            raise InvalidRequest(
                f"an image becomes {largest} tokens, whose features take {format_bytes(num_bytes)}; the server keeps "
                f"{format_bytes(self.features.most_bytes)} for all: send a smaller one, or raise "
                "--encoder-cache-memory",
                param="messages",
            )
        if cursor.num_whole and len(pictures) > 1:
            # Two prompts could each hold what the other one waits for.
            raise InvalidRequest(
                f"this model reads one image with a question, and there are {len(pictures)}: send one", param="messages"
            )
        if cursor.num_whole and is_scored:
            raise InvalidRequest(
                "this model reads a prompt with an image whole, each token with all others: there is no telling how "
                "likely they are one after another; leave out prompt_logprobs",
                param="prompt_logprobs",
            )
        if cursor.num_whole > self._step_tokens:
            raise InvalidRequest(
                f"with its image the prompt is {cursor.num_whole} tokens, which this model has to read in one step, "
                f"and a step has {self._step_tokens}: send a shorter one, or raise --step-tokens",
                param="messages",
            )
        if self._sees_both_ways and largest > self._step_tokens:
            raise InvalidRequest(
                f"an image becomes {largest} tokens, which this model has to read in one step, and a step has "
                f"{self._step_tokens}: send a smaller one, or raise --step-tokens",
                param="messages",
            )

    def begin_step(self) -> None:
        """Renew the budget."""
        self._coming.clear()
        self._is_spent = False
        awaited = self.features.awaited
        self._begun = [features for features in awaited if features.cost > 1]
        if not self._num_workers:
            self._left = min(1.0, self._left + (_SMALL_SHARE if awaited else 1.0))
        else:
            most = _MOST_AWAITED_STEPS * self._num_workers
            self._left = most - sum(features.cost for features in awaited if features.cost <= 1)

    def take_work(self) -> list[tuple[int, Picture]]:
        """Return the pictures to encode, with the ids of their features, in the order in which they are needed."""
        work, self._work = self._work, []
        return work

    def reach(self, cursor: PictureCursor, start: int, end: int) -> int:
        """Return how far, ``end`` at most, a chunk from ``start`` can go; holds the features that it needs.

        Where other processes encode, features behind the chunk are asked for as well.
        """
        coming = cursor.pictures[cursor.num_passed :]
        num_wanted = len(coming) if self._num_workers else sum(cursor.extent(one)[0] < end for one in coming)
        while len(cursor.held) < num_wanted and self._hold_next(cursor):
            pass
        for place, picture in enumerate(coming):
            first, past = cursor.extent(picture)
            if first >= end:
                break
            is_there = place < len(cursor.held) and self._is_there(cursor.held[place])
            is_split = self._sees_both_ways and end < past
            if is_split or not is_there:
                cursor.is_awaiting = not is_there
                return max(start, first)
        cursor.is_awaiting = False
        return end

    def whole_end(self, cursor: PictureCursor, start: int) -> int:
        """Return where a chunk from ``start`` has to end at least, so as not to split what is read as one."""
        if not self._sees_both_ways or cursor.is_done or cursor.extent(cursor.pictures[cursor.num_passed])[0] > start:
            return start + 1
        return cursor.end_of_next

    def passed(self, cursor: PictureCursor, num_computed: int) -> None:
        """Release the features of pictures whose tokens are all computed."""
        while not cursor.is_done and cursor.end_of_next <= num_computed:
            cursor.num_passed += 1
            self.features.release(cursor.held.pop(0))

    def release(self, cursor: PictureCursor) -> None:
        """Release all that a sequence holds, which no longer runs."""
        for features in cursor.held:
            self.features.release(features)
        cursor.held.clear()
        cursor.is_awaiting = False

    def _is_there(self, features: Features) -> bool:
        return features.is_ready or features.id in self._coming

    def _hold_next(self, cursor: PictureCursor) -> bool:
        """Hold the features of the first picture that a sequence does not hold yet; False where that cannot be now."""
        picture = cursor.pictures[cursor.num_passed + len(cursor.held)]
        features = self.features.find(cursor.salt, picture)
        is_hit = features is not None
        if features is None:
            cost = self._cost(picture)
            if not (self._take(cost) if cost <= 1 else self._fits_beside(picture)):
                return False
            features = self.features.add(cursor.salt, picture, cost)
            if features is None:
                return False
            self._work.append((features.id, picture))
            if cost > 1:
                self._begun.append(features)
            elif not self._num_workers:
                self._coming.add(features.id)
        self.features.counters.num_queries += 1
        self.features.counters.num_hits += is_hit
        self.features.hold(features)
        cursor.held.append(features)
        return True

    def _take(self, cost: float) -> bool:
        """Take so much of the budget; False where that is not left, and then nobody takes less before the next step.

        Otherwise those that cost little would never leave enough for one that costs more.
        """
        if self._is_spent or cost > self._left:
            self._is_spent = True
            return False
        self._left -= cost
        return True

    def _fits_beside(self, picture: Picture) -> bool:
        """Whether a picture may be begun before those that are begun are done."""
        if len(self._begun) < max(1, self._num_workers):
            return True
        if self._num_workers:
            return False
        first, *others = self._begun
        beside = picture.frame_tokens + sum(features.frame_tokens for features in others)
        return beside <= MOST_BESIDE * first.frame_tokens
