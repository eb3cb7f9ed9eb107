"""Which pictures' features are held, in a bounded number of bytes, and who still needs them."""

from dataclasses import dataclass

from penstock.protocol import Picture


@dataclass(slots=True, eq=False)
class Features:
    """What a picture was, or is being, encoded to."""

    id: int
    """Never used twice"""
    name: tuple[str, bytes]
    """Cache salt and the picture's key"""
    num_bytes: int
    cost: float
    """Of a step's budget for encoding"""
    frame_tokens: int
    """What an encoder holds of it at a time grows with these"""
    is_ready: bool = False
    num_holders: int = 0
    """Sequences that have tokens of it to compute"""


@dataclass(slots=True)
class FeatureCounters:
    """Totals since the start."""

    num_queries: int = 0
    """Pictures that a sequence needed features of"""
    num_hits: int = 0
    """Of those, pictures that another had brought, encoded or on the way"""
    num_evicted: int = 0


class FeatureCache:
    """Features by salt and picture, each *held* by sequences, *awaited* or *idle*: only idle ones are evicted.

    Eviction takes the least recently released. What is awaited has its bytes set aside already.
    """

    def __init__(self, *, most_bytes: int, token_bytes: int) -> None:
        """``token_bytes``: of the features of one placeholder token."""
        self.most_bytes = most_bytes
        self.token_bytes = token_bytes
        self.num_bytes = 0
        self.counters = FeatureCounters()
        self._by_name: dict[tuple[str, bytes], Features] = {}
        self._awaited: dict[int, Features] = {}
        self._idle: dict[int, Features] = {}
        """In the order of their release"""
        self._evicted: list[int] = []
        self._next_id = 0

    @property
    def is_awaiting(self) -> bool:
        """Whether pictures are being encoded."""
        return bool(self._awaited)

    @property
    def awaited(self) -> list[Features]:
        """What is being encoded, in the order in which it was asked for."""
        return list(self._awaited.values())

    def find(self, salt: str, picture: Picture) -> Features | None:
        """Return a picture's features, ready or awaited."""
        return self._by_name.get((salt, picture.key))

    def add(self, salt: str, picture: Picture, cost: float) -> Features | None:
        """Set bytes aside for a picture that is to be encoded; None, with nothing done, where there is no room."""
        num_bytes = picture.num_tokens * self.token_bytes
        idle_bytes = sum(features.num_bytes for features in self._idle.values())
        if self.num_bytes - idle_bytes + num_bytes > self.most_bytes:
            return None
        while self.num_bytes + num_bytes > self.most_bytes:
            self._evict(next(iter(self._idle.values())))
        features = Features(self._next_id, (salt, picture.key), num_bytes, cost, picture.frame_tokens)
        self._next_id += 1
        self.num_bytes += num_bytes
        self._by_name[features.name] = features
        self._awaited[features.id] = features
        return features

    def hold(self, features: Features) -> None:
        """Keep features for one more sequence."""
        features.num_holders += 1
        self._idle.pop(features.id, None)

    def release(self, features: Features) -> None:
        """One sequence needs them no more."""
        assert features.num_holders > 0, "features were released more often than held"
        features.num_holders -= 1
        if not features.num_holders and features.is_ready:
            self._idle[features.id] = features

    def encoded(self, feature_id: int) -> None:
        """The awaited features of that id are there."""
        features = self._awaited.pop(feature_id)
        features.is_ready = True
        if not features.num_holders:
            self._idle[features.id] = features

    def failed(self, feature_id: int) -> None:
        """The awaited features of that id will not come; whoever holds them still has to release them."""
        features = self._awaited.pop(feature_id)
        self._forget(features)

    def unwanted(self) -> list[int]:
        """Return the ids of what is being encoded for nobody."""
        return [features.id for features in self._awaited.values() if not features.num_holders]

    def take_evicted(self) -> list[int]:
        """Return the ids of what was evicted since this was last asked: their tensors may go."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def _evict(self, features: Features) -> None:
        del self._idle[features.id]
        self._forget(features)
        self._evicted.append(features.id)
        self.counters.num_evicted += 1

    def _forget(self, features: Features) -> None:
        del self._by_name[features.name]
        self.num_bytes -= features.num_bytes
