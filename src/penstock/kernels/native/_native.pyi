"""Addresses are integers; see ``kernels.h`` for what lies there."""

from array import array
from collections.abc import Sequence

def isa() -> str: ...
def choose(isa: str) -> None: ...
def runs(isa: str) -> bool: ...

many_rows: int

def num_threads(num_rows: int) -> int: ...
def set_num_threads(num_threads: int, few_rows_threads: int, cpus: Sequence[int]) -> None: ...

class Tape:
    def __init__(self, max_rows: int, max_sequences: int, /) -> None: ...
    def begin(self) -> None: ...
    def end(self) -> None: ...
    def run(self, num_rows: int, num_sequences: int, /) -> None: ...

class StepInputs:
    def __init__(
        self,
        max_tokens: int,
        table_width: int,
        block_size: int,
        token_ids: int,
        positions: int,
        slots: int,
        query_starts: int,
        context_lens: int,
        tables: int,
        table_starts: int,
        /,
    ) -> None: ...
    def load(
        self,
        token_ids: list[int],
        query_lens: list[int],
        context_lens: list[int],
        tables: list[array[int]],
        table_starts: list[int],
        position_offsets: list[int] | None,
        /,
    ) -> None: ...
    def are(
        self,
        token_ids: list[int],
        query_lens: list[int],
        context_lens: list[int],
        tables: list[array[int]],
        table_starts: list[int],
        position_offsets: list[int] | None,
        /,
    ) -> bool: ...

class RunAhead:
    def __init__(
        self, first: Tape, rest: Tape, last: Tape, inputs: StepInputs, logits: int, vocab_size: int, kept: object, /
    ) -> None: ...
    def begin(self, num_sequences: int, /) -> None: ...
    def draw(self, how: bytes, goes_on: bool, /) -> list[int]: ...
    def has_begun(self) -> bool: ...
    def stop(self) -> None: ...

class PackedMatrix:
    def __init__(
        self,
        num_outputs: int,
        num_inputs: int,
        kind: int,
        group: int,
        int8_activations: bool,
        source_kind: int,
        parts: Sequence[tuple[int, int]],
        up: int,
        scales: int,
        up_scales: int,
        zeros: int,
        up_zeros: int,
        input_scale: float,
        input_zero: float,
        is_mapped: bool,
        /,
    ) -> None: ...

class PackingThreads:
    def __init__(self, matrices: Sequence[PackedMatrix], num_threads: int, /) -> None: ...
    def stop(self) -> None: ...

class PackedLinear:
    def __init__(self, matrix: PackedMatrix, bias: int, up_bias: int, activation: int, /) -> None: ...
    def run(self, x: int, x_stride: int, num_rows: int, out: int, out_stride: int, added: int, /) -> None: ...
    def embed(self, token_ids: int, num_rows: int, scale: float, out: int, /) -> None: ...
    @property
    def num_bytes(self) -> int: ...

class AttentionPlan:
    def __init__(
        self,
        num_sequences: int,
        query_starts: int,
        context_lens: int,
        tables: int,
        table_width: int,
        table_starts: int,
        visible: int,
        block_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int,
        score_cap: float,
        /,
    ) -> None: ...
    def run(
        self,
        q: int,
        q_stride: int,
        num_rows: int,
        cache_kind: int,
        k: int,
        v: int,
        k_scales: int,
        v_scales: int,
        out: int,
        scale: float,
        /,
    ) -> None: ...

def rms_norm(
    x: int, x_stride: int, weight: int, out: int, out_stride: int, num_rows: int, width: int, eps: float, /
) -> None: ...
def layer_norm(x: int, weight: int, bias: int, out: int, num_rows: int, width: int, eps: float, /) -> None: ...
def add(x: int, y: int, num_rows: int, width: int, scale: float, /) -> None: ...
def embed(
    token_ids: int, num_rows: int, kind: int, table: int, vocab_size: int, width: int, scale: float, out: int, /
) -> None: ...
def rope_angles(
    positions: int,
    num_rows: int,
    axes: int,
    inverse: int,
    num_pairs: int,
    head_dim: int,
    factor: float,
    cos: int,
    sin: int,
    /,
) -> None: ...
def rope_write_kv(
    qkv: int,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    cos: int,
    sin: int,
    slots: int,
    q_norm: int,
    k_norm: int,
    eps: float,
    block_size: int,
    cache_kind: int,
    k: int,
    v: int,
    k_scales: int,
    v_scales: int,
    /,
) -> None: ...
def draw_tokens(logits: int, num_rows: int, size: int, how: bytes, /) -> list[int]: ...
def top_tokens(
    logits: int, num_rows: int, size: int, count: int, tokens: int, values: int, log_totals: int, /
) -> None: ...
def touch(memory: list[tuple[int, int]], /) -> None: ...
def read_bandwidth(num_bytes: int, /) -> float: ...
def multiply_add_rate(numbers: str, /) -> float: ...
