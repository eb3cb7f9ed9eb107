"""What a benchmark asks for: how long prompts and answers are, and when requests arrive."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthRange:
    """A number of tokens drawn uniformly from ``low`` to ``high``, both included."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise ValueError(f"{self.low}..{self.high} is not a range of token counts; write 128 or 32..256")

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}..{self.high}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the range that ``128`` or ``32..256`` names. Raises ValueError for anything else."""
        low, dots, high = text.partition("..")
        try:
            return cls(low=int(low), high=int(high) if dots else int(low))
        except ValueError as error:
            raise ValueError(f"{text!r} is not a range of token counts; write 128 or 32..256") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSize:
    """Pixels of an image."""

    width: int
    height: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the size that ``640x480`` names. Raises ValueError for anything else."""
        width, _, height = text.partition("x")
        if not (width.isascii() and width.isdigit() and height.isascii() and height.isdigit()):
            raise ValueError(f"{text!r} is not the size of an image; write 640x480")
        return cls(width=int(width), height=int(height))


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """One reproducible load. Exactly one of ``concurrency`` and ``rate_per_s`` is set."""

    num_requests: int
    prompt_tokens: LengthRange
    output_tokens: LengthRange
    """Every answer is exactly this long: end of sequence is ignored."""
    concurrency: int | None = None
    """Closed loop: this many requests are under way until none are left."""
    rate_per_s: float | None = None
    """Open loop: requests arrive at this mean rate, in a Poisson process, whether earlier ones are done or not."""
    num_images: int = 0
    """Images with each prompt, all of them different."""
    image_size: ImageSize = field(default_factory=lambda: ImageSize(width=448, height=448))
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate_per_s is None):
            raise ValueError("a load has either a fixed concurrency or an arrival rate")


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchRequest:
    """One request of a load."""

    prompt_token_ids: tuple[int, ...]
    num_output_tokens: int
    arrival_s: float
    """Seconds after the run began at which it is due; 0 in a closed loop."""
    images: tuple[str, ...] = ()
    """As data: URLs"""


def draw_requests(workload: Workload, token_ids: Sequence[int], *, repetition: int = 0) -> list[BenchRequest]:
    """Return the load's requests, prompts drawn uniformly from ``token_ids``.

    The same workload and repetition give the same requests; repetitions share lengths and arrivals but not
    prompts, so that a prefix cache warmed by one says nothing about the next.
    """
    shape = random.Random(workload.seed)
    content = random.Random(f"{workload.seed}/{repetition}")
    arrival_s = 0.0
    requests = []
    for _ in range(workload.num_requests):
        num_prompt_tokens = shape.randint(workload.prompt_tokens.low, workload.prompt_tokens.high)
        num_output_tokens = shape.randint(workload.output_tokens.low, workload.output_tokens.high)
        if workload.rate_per_s is not None:
            arrival_s += shape.expovariate(workload.rate_per_s)
        requests.append(
            BenchRequest(
                prompt_token_ids=tuple(content.choices(token_ids, k=num_prompt_tokens)),
                num_output_tokens=num_output_tokens,
                arrival_s=arrival_s,
                images=_draw_images(workload, content),
            )
        )
    return requests


def _draw_images(workload: Workload, random: random.Random) -> tuple[str, ...]:
    if not workload.num_images:
        return ()
    # Numpy and Pillow come with it.
    from penstock.bench.images import draw_image

    size = workload.image_size
    return tuple(draw_image(size.width, size.height, random.getrandbits(64)) for _ in range(workload.num_images))
