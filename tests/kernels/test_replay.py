"""Passes that are recorded once: the same bits for any step, and nothing recorded that could not be repeated."""

import gc
import subprocess
import sys
from array import array
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from penstock.kernels import QUANTIZATIONS, BatchLayout, CPUOps, KVBlocks, Replay
from penstock.kernels.native import MAX_REPLAYED_TOKENS, NATIVE
from penstock.kernels.native.replay import Arena
from penstock.kernels.sampling import DrawRow, draw_tokens
from tests.kernels.backends import instruction_sets, needs_native, using

BLOCK, H, G, D = 4, 4, 2, 16
WIDTH = (H + 2 * G) * D
OPS = CPUOps()


class Pass:
    """What a decoder does, in two layers, over a cache of its own; counts how often Python ran it."""

    def __init__(self, window: int | None = None, num_blocks: int = 600, quantize: str | None = None) -> None:
        torch.manual_seed(0)
        self._window = window
        ops = CPUOps(QUANTIZATIONS[quantize] if quantize else None)
        shapes = OPS.cache_shapes(num_blocks, BLOCK, G, D)
        self.cache = KVBlocks(torch.randn(shapes.k), torch.randn(shapes.v))  # what earlier steps may have left
        self.num_runs = 0
        table = torch.randn(50, 48)
        self.head = OPS.prepare_linear(table, None)
        self._embedding = OPS.prepare_embedding(lambda: table, "float32", scale=3.0, tied=self.head)
        self._norm, self._inverse = torch.rand(48), 1 / 10 ** torch.rand(D // 2)
        self._qkv = ops.prepare_linear((torch.randn(WIDTH, 48) / 7).bfloat16(), None)
        self._o = ops.prepare_linear(torch.randn(48, H * D) / 8, None)

    def __call__(self, token_ids: Tensor, layout: BatchLayout) -> Tensor:
        return self.rest(*self.first(token_ids, layout))

    def record(self) -> Replay:
        return OPS.record(self.first, self.rest, self.head, BLOCK)

    def first(self, token_ids: Tensor, layout: BatchLayout) -> tuple[Tensor, Tensor]:
        self.num_runs += 1
        attention = OPS.plan_attention(layout, num_heads=H, num_kv_heads=G, head_dim=D, window=self._window)
        cos, sin = OPS.rope_angles(layout.positions, self._inverse, D)
        x = self._embedding(token_ids)
        for layer in range(2):
            normed = OPS.rms_norm(x, self._norm, 1e-6)
            qkv = self._qkv(normed)
            q = OPS.rope_write_kv(qkv, self.cache, layout, cos, sin, num_heads=H, num_kv_heads=G, norms=None)
            mixed = attention(q, self.cache, scale=0.25).flatten(1)
            if layer == 0:  # the norm is for others besides the product
                x = OPS.add(self.rest(x, mixed), normed, scale=0.25)
        return x, mixed

    def rest(self, x: Tensor, mixed: Tensor) -> Tensor:
        return OPS.add(self._o(mixed, x), OPS.rms_norm(mixed[:, :48], self._norm, 1e-6), scale=0.5)


class Step(NamedTuple):
    """What ``Replay`` takes."""

    token_ids: list[int]
    query_lens: list[int]
    context_lens: list[int]
    tables: "list[array[int]]"
    table_starts: list[int]
    position_offsets: list[int] | None = None

    def of(self, forward: Pass) -> Tensor:
        """Return what the pass itself gives."""
        layout = BatchLayout.pack(self.query_lens, self.context_lens, self.tables, BLOCK, self.table_starts)
        if self.position_offsets is not None:
            offsets = torch.tensor(self.position_offsets).repeat_interleave(torch.tensor(self.query_lens))
            layout = replace(layout, positions=layout.positions + offsets)
        return forward(torch.tensor(self.token_ids), layout)


def random_step(seed: int, query_lens: list[int], earlier: list[int], first_blocks: int = 0) -> Step:
    """Return a step of sequences with so many new tokens after so many earlier ones, the first blocks of which left."""
    generator = torch.Generator().manual_seed(seed)
    context_lens = [new + old for new, old in zip(query_lens, earlier, strict=True)]
    tables, first = [], 3
    for context_len in context_lens:
        num_blocks = -(-context_len // BLOCK) - first_blocks
        tables.append(array("i", range(first + num_blocks, first, -1)))
        first += num_blocks
    token_ids = torch.randint(0, 50, (sum(query_lens),), generator=generator).tolist()
    return Step(token_ids, query_lens, context_lens, tables, [first_blocks * BLOCK] * len(tables))


@needs_native
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("isa", instruction_sets())
@torch.inference_mode()
def test_every_step_has_the_bits_of_the_pass_itself(isa: str, quantize: str | None) -> None:
    with using(isa, 3):
        plain, recorded = Pass(quantize=quantize), Pass(quantize=quantize)
        replay = recorded.record()
        steps = [([40, 3], [0, 0]), ([1, 1], [40, 3]), ([1, 4, 1], [41, 4, 0]), ([1], [42]), ([9], [43]), ([1], [700])]
        steps.insert(1, ([220, 190, 1], [0, 0, 0]))  # rows that several tasks share out
        for seed, (query_lens, earlier) in enumerate(steps):
            step = random_step(seed, query_lens, earlier)
            hidden = replay(*step)
            assert hidden is not None
            assert torch.equal(torch.from_numpy(hidden), step.of(plain))
        # Once for each table width: 700 tokens take more blocks than were prepared for.
        assert recorded.num_runs == 2


def decode(token_ids: list[int], context_lens: list[int], num_blocks: int = 12) -> Step:
    """Return a step of one token for each sequence, in tables with room for more."""
    tables = [array("i", range(3 + n * num_blocks, 3 + (n + 1) * num_blocks)) for n in range(len(token_ids))]
    return Step(token_ids, [1] * len(token_ids), context_lens, tables, [0] * len(token_ids))


def drawn_ahead(replay: Replay, step: Step, rows: list[DrawRow], *, goes_on: bool = True) -> list[int] | None:
    return replay.draw(step.token_ids, step.context_lens, step.tables, step.table_starts, None, rows, goes_on=goes_on)


@needs_native
@pytest.mark.parametrize("isa", instruction_sets())
@torch.inference_mode()
def test_tokens_of_steps_begun_ahead_are_those_of_steps_one_by_one(isa: str) -> None:
    with using(isa, 2):
        ahead, plain = Pass().record(), Pass().record()
        token_ids, context_lens = [7, 11, 13], [1, 1, 1]
        num_ahead = 0
        for number in range(40):
            if number == 11:  # one has ended
                del token_ids[1], context_lens[1]
            if number == 17:  # another token was kept than the one that was drawn
                token_ids[0] = (token_ids[0] + 1) % 50
            if number == 23:  # a prompt comes between
                other = random_step(1, [30], [0], first_blocks=0)
                other = other._replace(tables=[array("i", range(100, 108))])
                assert ahead(*other) is not None
                assert plain(*other) is not None
            step = decode(token_ids, context_lens)
            rows = [DrawRow(number / 40, 0.8, 0, 0.95, 0.0), *[DrawRow(0.0, 0.0, 0, 1.0, 0.0)] * (len(token_ids) - 1)]
            logits = plain(*step, to_logits=True)
            assert logits is not None
            expected = draw_tokens(logits, rows)
            drawn = drawn_ahead(ahead, step, rows, goes_on=number != 30)
            num_ahead += drawn is not None
            if drawn is None:
                made = ahead(*step, to_logits=True)
                assert made is not None
                drawn = draw_tokens(made, rows)
            assert drawn == expected
            token_ids, context_lens = drawn, [one + 1 for one in context_lens]
        assert num_ahead == 40
        last = decode(token_ids, context_lens)
        hidden = ahead(*last), plain(*last)
        assert hidden[0] is not None
        assert hidden[1] is not None
        assert (hidden[0] == hidden[1]).all()


@needs_native
def test_no_step_begins_where_a_table_has_no_room_for_it_or_none_is_to_follow() -> None:
    replay = Pass().record()
    rows = [DrawRow(0.0, 0.0, 0, 1.0, 0.0)]
    assert drawn_ahead(replay, decode([7], [1]), rows, goes_on=False) is None
    assert drawn_ahead(replay, decode([7], [4], num_blocks=1), rows) is None
    assert drawn_ahead(replay, decode([7], [3], num_blocks=1), rows) is not None
    assert drawn_ahead(replay, decode([7] * 8, [1] * 8), rows * 8) is None  # all cores compute


@needs_native
@pytest.mark.parametrize("kept", [1, 3])
@torch.inference_mode()
def test_a_step_of_some_or_more_of_the_sequences_is_another(kept: int) -> None:
    ahead, plain = Pass().record(), Pass().record()
    rows = [DrawRow(0.0, 0.0, 0, 1.0, 0.0)]
    tokens = drawn_ahead(ahead, decode([7, 11], [1, 1]), rows * 2)
    assert tokens is not None
    step = decode([*tokens, 13][:kept], [2, 2, 1][:kept])
    assert plain(*decode([7, 11], [1, 1])) is not None
    logits = plain(*step, to_logits=True)
    assert logits is not None
    assert drawn_ahead(ahead, step, rows * kept) == draw_tokens(logits, rows * kept)


NO_THREAD = """
import resource
from tests.kernels.test_replay import DrawRow, Pass, decode, drawn_ahead, draw_tokens
replay, step, rows = Pass().record(), decode([7], [1]), [DrawRow(0.0, 0.0, 0, 1.0, 0.0)]
replay(*step)
with open("/proc/self/statm") as statm:
    mapped = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + (4 << 20), resource.RLIM_INFINITY))  # a stack is 8 MB
print(drawn_ahead(replay, step, rows), drawn_ahead(replay, step, rows), replay(*step, to_logits=True).shape)
"""


@needs_native
def test_no_step_begins_ahead_where_the_system_refuses_a_thread() -> None:
    result = subprocess.run([sys.executable, "-c", NO_THREAD], capture_output=True, text=True, check=True)
    assert result.stdout == "None None (1, 50)\n"


@needs_native
@torch.inference_mode()
def test_a_step_that_runs_keeps_what_it_touches() -> None:
    rows = [DrawRow(0.0, 0.0, 0, 1.0, 0.0)]
    for _ in range(20):
        model = Pass()
        replay = model.record()
        assert drawn_ahead(replay, decode([7], [1]), rows) is not None
        del model, replay
        gc.collect()


@needs_native
@pytest.mark.parametrize("rows", [[], [6], [0, 4, 5, 6], [4, 4, 4, 0], [5] * 40, list(range(7))], ids=len)
@torch.inference_mode()
def test_rows_have_the_bits_that_they_have_among_all(rows: list[int]) -> None:
    step = random_step(0, [5, 1, 1], [0, 9, 30])
    replay = Pass().record()
    for _ in range(2):
        hidden = replay(*step, rows=rows)
        assert hidden is not None
        assert torch.equal(torch.from_numpy(hidden), step.of(Pass())[rows])
        all_rows = replay(*step)
        assert all_rows is not None
        assert torch.equal(torch.from_numpy(all_rows), step.of(Pass()))


@needs_native
@pytest.mark.parametrize("rows", [None, [], [6], [4, 4, 0]], ids=str)
@pytest.mark.parametrize("cap", [None, 5.0])
@torch.inference_mode()
def test_logits_have_the_bits_that_the_head_gives(rows: list[int] | None, cap: float | None) -> None:
    plain = Pass()

    def head(hidden: Tensor) -> Tensor:
        return plain.head(hidden) if cap is None else plain.head(hidden).div_(cap).tanh_()

    replay, step = OPS.record(plain.first, plain.rest, head, BLOCK), random_step(0, [5, 1, 1], [0, 9, 30])
    for _ in range(2):
        logits = replay(*step, rows=rows, to_logits=True)
        assert logits is not None
        hidden = step.of(Pass())
        assert torch.equal(torch.from_numpy(logits), head(hidden if rows is None else hidden[rows]))
        logits[:] = 0  # whoever samples may overwrite them
    assert plain.num_runs == 1


@needs_native
@torch.inference_mode()
def test_where_there_is_no_room_for_all_logits_each_step_makes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, step = Pass(), random_step(0, [5, 1, 1], [0, 9, 30])
    empty = Arena.empty

    def bounded(arena: Arena, num_rows: int, width: int) -> Tensor:
        if width == 50:
            raise MemoryError
        return empty(arena, num_rows, width)

    monkeypatch.setattr(Arena, "empty", bounded)
    replay = plain.record()
    for _ in range(2):
        logits = replay(*step, rows=[6, 0], to_logits=True)
        assert logits is not None
        assert torch.equal(torch.from_numpy(logits), plain.head(step.of(Pass())[[6, 0]]))
    assert plain.num_runs == 1


@needs_native
@torch.inference_mode()
def test_positions_may_lie_elsewhere_than_tokens_in_their_sequences() -> None:
    recorded = Pass().record()
    step = random_step(0, [5, 1, 1], [0, 9, 30])
    moved = step._replace(position_offsets=[0, -4, 1000])
    plain, elsewhere = step.of(Pass()), moved.of(Pass())
    for expected, asked in ((plain, step), (elsewhere, moved), (plain, step)):
        hidden = recorded(*asked)
        assert hidden is not None
        assert torch.equal(torch.from_numpy(hidden), expected)
    assert torch.equal(plain[:5], elsewhere[:5])
    assert not torch.equal(plain[5:], elsewhere[5:])


@needs_native
@torch.inference_mode()
def test_a_step_too_large_is_left_to_the_pass() -> None:
    recorded = Pass()
    replay = recorded.record()
    assert replay(*random_step(0, [MAX_REPLAYED_TOKENS + 1], [0])) is None
    assert replay(*random_step(0, [2], [0]), rows=[1] * (MAX_REPLAYED_TOKENS + 1)) is None
    assert recorded.num_runs == 0


@needs_native
@pytest.mark.parametrize(
    "beyond",
    [
        lambda x: x * 2,
        lambda x: x.double().float(),
        lambda x: x.clone(),
        lambda x: x.mul_(2),
        lambda x: OPS.rms_norm(x[:1], torch.ones(48), 1e-6).expand_as(x),
    ],
    ids=["torch", "dtype", "copy", "in place", "a part of the rows"],
)
@torch.inference_mode()
def test_what_is_not_native_is_not_recorded(beyond: object) -> None:
    assert callable(beyond)
    plain = Pass()
    replay = OPS.record(plain.first, lambda x, mixed: beyond(plain.rest(x, mixed)), plain.head, BLOCK)
    step = random_step(0, [5], [0])
    assert replay(*step) is None
    assert replay(*step) is None
    assert plain.num_runs == 1
    # Ops are done again.
    assert torch.equal(step.of(plain), step.of(Pass()))


@needs_native
@torch.inference_mode()
def test_a_token_that_is_none_is_refused() -> None:
    replay, step = Pass().record(), random_step(0, [3], [0])
    for wrong in (-1, 50):
        refused = step._replace(token_ids=[7, wrong, 7])
        with pytest.raises(IndexError, match=f"token {wrong} is not one of 50"):
            replay(*refused)
        with pytest.raises(IndexError, match=f"token {wrong} is not one of 50"):
            refused.of(Pass())
    hidden = replay(*step)
    assert hidden is not None
    assert torch.equal(torch.from_numpy(hidden), step.of(Pass()))


@needs_native
@torch.inference_mode()
def test_blocks_that_slid_out_of_a_window_are_not_in_the_table() -> None:
    step = random_step(0, [2, 1], [30, 40], first_blocks=5)
    hidden = Pass(window=10).record()(*step)
    assert hidden is not None
    assert torch.equal(torch.from_numpy(hidden), step.of(Pass(window=10)))


@needs_native
@pytest.mark.parametrize(
    "wrong",
    [
        {"token_ids": [1, 2]},
        {"token_ids": [1, 2, 3, 4]},
        {"query_lens": [3, 0]},
        {"query_lens": [-1, 4]},
        {"context_lens": [1, 1]},
        {"context_lens": [9, 2]},
        {"tables": [array("i", [1, 2])]},
        {"tables": [array("i", []), array("i", [1])]},
        {"tables": [array("q", [1]), array("i", [1])]},
        {"table_starts": [-4, 0]},
        {"table_starts": [4, 0]},
        {"position_offsets": [0]},
    ],
)
@torch.inference_mode()
def test_lists_that_do_not_fit_together_are_refused(wrong: dict[str, list[int]]) -> None:
    step = Step([1, 2, 3], [2, 1], [2, 1], [array("i", [1]), array("i", [2])], [0, 0])
    replay = Pass().record()
    assert replay(*step) is not None
    with pytest.raises(ValueError, match=r"do not fit together|array of 32-bit integers"):
        replay(*step._replace(**wrong))  # type: ignore[arg-type]


@needs_native
def test_tapes_refuse_what_they_have_no_room_for() -> None:
    assert NATIVE is not None
    tape = NATIVE.Tape(8, 4)
    for size in ((9, 1), (1, 5), (-1, 1)):
        with pytest.raises(ValueError, match="larger than what was recorded"):
            tape.run(*size)
    tape.begin()
    try:
        with pytest.raises(ValueError, match="recorded already"):
            NATIVE.Tape(8, 4).begin()
    finally:
        tape.end()


def test_memory_is_lent_again_once_no_view_of_it_is_left() -> None:
    arena = Arena()
    first, second = arena.empty(3, 8), arena.empty(3, 8)
    assert first.data_ptr() != second.data_ptr()
    assert first.data_ptr() % 64 == second.data_ptr() % 64 == 0
    address, view = first.data_ptr(), first.view(6, 4)[2:]
    del first
    assert arena.empty(3, 8).data_ptr() not in (address, second.data_ptr())
    del view
    assert address in [tensor.data_ptr() for tensor in (arena.empty(3, 8), arena.empty(3, 8))]


@needs_native
def test_recording_does_not_import_what_compiles() -> None:
    # It takes seconds, which the first request would wait for.
    record = (
        "import sys, torch\n"
        "from array import array\n"
        "from penstock.kernels import CPUOps\n"
        "embedding = CPUOps().prepare_embedding(lambda: torch.ones(9, 8), 'float32')\n"
        "first = lambda ids, layout: (embedding(ids).view(-1, 2, 4),)\n"
        "rest = lambda x: x.flatten(1)\n"
        "hidden = CPUOps().record(first, rest, lambda hidden: hidden, 4)([1, 2], [2], [2], [array('i', [0])], [0])\n"
        "assert hidden.shape == (2, 8)\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", record], check=True)
