"""One generation: the request that enters an engine and the deltas that leave it.

These values cross a process border as msgpack, so they hold plain data only.
"""

import enum
from typing import Literal

import msgspec

from penstock.protocol.timeline import Timeline

FinishReason = Literal["stop", "length", "abort", "error"]
"""``stop``: end of sequence, stop token or stop string; ``length``: max_tokens or the context's end;
``abort``: the client left; ``error``: see ``TokenDelta.error``."""


Pooling = Literal["mean", "last"]
"""What one vector for a whole prompt is made of: the mean of all its tokens' final hidden states, or the last one's."""


class Priority(enum.IntEnum):
    """Urgency classes; the value orders them, most urgent first."""

    P0 = 0
    """First token due in 100 ms."""
    P1 = 1
    """First token due in 1 s."""
    P2 = 2
    """First token due in 10 s."""
    P3 = 3
    """Best effort: no deadline unless the request sets one."""


class BeamParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to search for the likeliest output instead of drawing one."""

    width: int
    """Beams that are followed at a time, at least ``n``."""
    length_penalty: float = 1.0
    """Finished beams are ordered by log probability over length to this power. Up: longer ones."""
    early_stopping: bool | Literal["never"] = False
    """True ends with as many finished beams as there may be, False when no better one is likely, never: is possible."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to pick tokens and when to stop. Ranges are checked where the request enters; here they hold."""

    max_tokens: int
    """Most tokens to generate. 0 computes the prompt and ends: for its log probabilities, or its pooled states."""
    min_tokens: int = 0
    """Before this many tokens, end of sequence and stop tokens are impossible and stop strings are plain text."""
    n: int = 1
    """Choices for the one prompt: independent ones, or the best that a beam search finds."""
    beam: BeamParams | None = None
    """Search; then nothing else here has a say but what ends the output."""
    temperature: float = 1.0
    """0 picks the most likely token."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this, in (0, 1]."""
    typical_p: float = 1.0
    """Keep the tokens whose surprise is nearest to the expected one, to this share of probability, in (0, 1]."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one, in [0, 1]."""
    repetition_penalty: float = 1.0
    """Divide positive and multiply negative logits of tokens already in prompt or output; above 0."""
    presence_penalty: float = 0.0
    """Subtract once from logits of tokens already in the output."""
    frequency_penalty: float = 0.0
    """Subtract per occurrence from logits of tokens already in the output."""
    logit_bias: dict[int, float] = {}
    """Added to the logits of these token ids."""
    allowed_token_ids: tuple[int, ...] | None = None
    """Only these tokens may come."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that may not be completed in the output."""
    seed: int | None = None
    """Same seed and same request give the same tokens whatever else runs; None draws a fresh seed."""
    stop: tuple[str, ...] = ()
    """Generation ends before the first of these strings appears in the text."""
    include_stop_str_in_output: bool = False
    stop_token_ids: tuple[int, ...] = ()
    """Generation ends at these tokens as it does at end of sequence."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: none; 0: of the chosen token; k: of the k most likely tokens as well."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens, from the second on."""
    prompt_logprobs_from: int = 1
    """The first token of the prompt of which they are wanted; what is before it may come from the prefix cache."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    grammar: str | None = None
    """What the output must match, as ``text.grammar`` writes it. End of sequence is possible only where the grammar is
    complete; where nothing may follow, the output ends by itself."""
    completes_grammar: bool = False
    """Bring an output that came to its most tokens to a short end that the grammar allows, in text that no token stands
    for."""


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """What a vision encoder reads as one: an image, a tile of one, or a video; and where its features go.

    An image may be cut into several.
    """

    key: bytes
    """Digest of all that its features depend on; pictures of one key are encoded once."""
    offset: int
    """Where in the prompt its placeholder tokens begin; they come one after another."""
    num_tokens: int
    """Placeholder tokens, and rows of features."""
    pixels: bytes
    """uint8 [frames, height, width, 3], resized as the family wants them; its encoder normalizes them."""
    shape: tuple[int, int, int]
    """Frames or tiles, their height and width."""
    size: tuple[int, int]
    """Height and width of the image that tiles were cut from."""
    grid: tuple[int, int, int] | None = None
    """(time, rows, columns) of its tokens, for families whose positions have three axes."""
    time_step: float = 1.0
    """What one step of the grid's time adds to positions."""

    @property
    def frame_tokens(self) -> int:
        """Placeholder tokens of what an encoder sees at a time: one of a video's frames, or all."""
        return self.num_tokens // (1 if self.grid is None else self.grid[0])


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A tokenized prompt and how to go on from it."""

    request_id: str
    """Unique among running requests."""
    prompt_token_ids: list[int]
    sampling: SamplingParams
    priority: Priority = Priority.P3
    deadline_s: float | None = None
    """Seconds from arrival by which the first token is due; None takes the class's own."""
    tenant: str = "default"
    """Who the tokens are charged to when tenants share the engine."""
    cache_salt: str = ""
    """Requests share prefix cache blocks only with requests of the same salt."""
    adapter: str | None = None
    """The loaded LoRA adapter to run with; None: the model as it is."""
    pooling: Pooling | None = None
    """Return the prompt's hidden states, pooled so; only where ``max_tokens`` is 0."""
    pictures: tuple[Picture, ...] = ()
    """By offset."""


class Candidate(msgspec.Struct, frozen=True, array_like=True):
    """A token that was or could have been chosen."""

    token_id: int
    logprob: float
    """Natural logarithm of the model's own probability, before temperature, penalties and truncation."""
    rank: int
    """1 for the most likely token."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """The chosen token and the most likely alternatives at one position, most likely first."""

    chosen: Candidate
    top: tuple[Candidate, ...] = ()


class ErrorInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A ``PenstockError`` as plain data; ``errors.error_from_code`` rebuilds it."""

    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens one choice took."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int


class TokenDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one token added to one choice; a step may give several.

    The last delta of a choice carries ``finish_reason`` and ``usage``.
    """

    request_id: str
    index: int = 0
    """Which of the ``n`` choices."""
    text: str = ""
    """Text that is certain: whole characters only, nothing that may still become a stop string."""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One per token id, if asked for."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """On the first delta of the first choice, if asked for: one per token of the prompt but the first."""
    embedding: bytes | None = None
    """The prompt's pooled hidden states, if asked for: as many float32, little-endian, as the model is wide."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended the choice; None for end of sequence."""
    error: ErrorInfo | None = None
    usage: Usage | None = None
    timeline: Timeline | None = None
    """On the last delta of a choice."""
