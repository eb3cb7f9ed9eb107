"""A forward pass recorded once and repeated in one call: what CUDA graphs are to a GPU, for compiled kernels.

Between the ops of a small model Python takes longer than some of the ops do. A decoder's ops and their addresses are
the same every step once activations, and where tokens lie, have memory that stays.

T packed tokens, S sequences, E width.
"""

import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from penstock.kernels.layout import BatchLayout
from penstock.kernels.native import MAX_REPLAYED_TOKENS, NATIVE
from penstock.kernels.native.array import Array, zeros
from penstock.kernels.sampling.cpu import packed_rows
from penstock.kernels.sampling.rows import DrawRow
from penstock.kernels.tensor import Tensor

_LEAST_WIDTH = 64
"""Blocks in a table that a recording has room for, or twice as many, and so on"""

First = Callable[[Tensor, BatchLayout], tuple[Tensor, ...]]
"""From token ids [T] int64 to tensors [T, ...]"""
Rest = Callable[..., Tensor]
"""From any rows of those to hidden states [R, E]"""
Head = Callable[[Tensor], Tensor]
"""From hidden states to logits [R, V]"""


class NativeReplay:
    """See ``ops.Replay``."""

    def __init__(self, first: First, rest: Rest, head: Head, block_size: int) -> None:
        """All have to do the same whatever the step, and what their tensors lie on has to live as long as they."""
        self._first = first
        self._rest = rest
        self._head = head
        self._block_size = block_size
        self._recording: _Recording | None = None
        self._is_recordable = True

    def __call__(
        self,
        token_ids: list[int],
        query_lens: list[int],
        context_lens: list[int],
        tables: "list[array[int]]",
        table_starts: list[int],
        position_offsets: list[int] | None = None,
        rows: list[int] | None = None,
        *,
        to_logits: bool = False,
    ) -> npt.NDArray[np.float32] | None:
        """See ``ops.Replay``."""
        self.stop()
        recording = self._recording_of(max(len(token_ids), len(rows or ())), tables)
        if recording is None:
            return None
        recording.inputs.load(token_ids, query_lens, context_lens, tables, table_starts, position_offsets)
        return recording.run(len(token_ids), len(query_lens), rows, to_logits=to_logits)

    def draw(
        self,
        token_ids: list[int],
        context_lens: list[int],
        tables: "list[array[int]]",
        table_starts: list[int],
        position_offsets: list[int] | None,
        rows: Sequence[DrawRow],
        *,
        goes_on: bool,
    ) -> list[int] | None:
        """See ``ops.Replay``."""
        assert NATIVE is not None
        # With many, all cores compute, and Python would take one of them from the next step.
        if len(token_ids) >= NATIVE.many_rows:
            return None
        recording = self._recording_of(len(token_ids), tables)
        if recording is None or recording.ahead is None:
            return None
        step = token_ids, [1] * len(token_ids), context_lens, tables, table_starts, position_offsets
        ahead = recording.ahead
        if not ahead.has_begun() or not recording.inputs.are(*step):
            ahead.stop()
            places = zip(context_lens, tables, table_starts, strict=True)
            if not goes_on or any(end - start >= len(table) * self._block_size for end, table, start in places):
                return None  # another thread would do it no sooner
            recording.inputs.load(*step)
            if not ahead.begin(len(token_ids)):
                recording.ahead = None
                return None
        tokens: list[int] = ahead.draw(packed_rows(rows), goes_on)
        return tokens

    def stop(self) -> None:
        """See ``ops.Replay``."""
        if self._recording is not None and self._recording.ahead is not None:
            self._recording.ahead.stop()

    def _recording_of(self, num_tokens: int, tables: "list[array[int]]") -> "_Recording | None":
        """Return what a step of so many tokens repeats; None if there is none."""
        if not self._is_recordable or num_tokens > MAX_REPLAYED_TOKENS:
            return None
        width = max(map(len, tables))
        if self._recording is None or width > self._recording.table_width:
            self._recording = None  # its memory first
            table_width = max(_LEAST_WIDTH, 1 << (width - 1).bit_length())
            try:
                self._recording = _Recording(self._first, self._rest, self._head, table_width, self._block_size)
            except _Unrecordable:
                self._is_recordable = False
        return self._recording


class _Unrecordable(Exception):
    """The pass does something besides native ops."""


class _Recording:
    """One recorded pass, for tables of up to ``table_width`` blocks, and all memory it works in."""

    def __init__(self, first: First, rest: Rest, head: Head, table_width: int, block_size: int) -> None:
        assert NATIVE is not None
        self.table_width = table_width
        self._arena = Arena()
        self._token_ids = _zeros(MAX_REPLAYED_TOKENS)
        layout = self._layout = BatchLayout(
            positions=_zeros(MAX_REPLAYED_TOKENS),
            slots=_zeros(MAX_REPLAYED_TOKENS),
            query_starts=_zeros(MAX_REPLAYED_TOKENS + 1, dtype="int32"),
            context_lens=_zeros(MAX_REPLAYED_TOKENS, dtype="int32"),
            tables=_zeros(MAX_REPLAYED_TOKENS, table_width, dtype="int32"),
            table_starts=_zeros(MAX_REPLAYED_TOKENS, dtype="int32"),
            query_lens_list=[1] * MAX_REPLAYED_TOKENS,
            context_lens_list=[1] * MAX_REPLAYED_TOKENS,
            block_size=block_size,
        )
        self.inputs = NATIVE.StepInputs(
            MAX_REPLAYED_TOKENS,
            table_width,
            block_size,
            self._token_ids.data_ptr(),
            layout.positions.data_ptr(),
            layout.slots.data_ptr(),
            layout.query_starts.data_ptr(),
            layout.context_lens.data_ptr(),
            layout.tables.data_ptr(),
            layout.table_starts.data_ptr(),
        )
        self._first = NATIVE.Tape(MAX_REPLAYED_TOKENS, MAX_REPLAYED_TOKENS)
        self._rest = NATIVE.Tape(MAX_REPLAYED_TOKENS, MAX_REPLAYED_TOKENS, goes_on_from=self._first)
        self._last = NATIVE.Tape(MAX_REPLAYED_TOKENS, MAX_REPLAYED_TOKENS, goes_on_from=self._first)
        self._head = head
        logits: Tensor | None = None
        with _taking_from(self._arena):
            with _onto(self._first):
                between = first(self._token_ids, layout)
            with _onto(self._rest):
                hidden = rest(*between)
            # Some do more to logits than multiply, or there is no room for as many as a step may ever have: then they
            # are made anew in each.
            with suppress(_Unrecordable, MemoryError), _onto(self._last):
                logits = head(hidden)
        # What the passes left, whose memory is not lent again.
        self._lasting = (*between, hidden, logits)
        self._between = [_numbers(tensor) for tensor in between]
        self._hidden = _numbers(hidden)
        self._logits = None if logits is None else _numbers(logits)
        # Its thread goes on until it is no more, and what that touches lives as long.
        self.ahead = None
        if self._logits is not None and self._logits.size:
            kept = self._arena, self._token_ids, layout, self._lasting, first, rest, head
            address, vocab_size = self._logits.ctypes.data, self._logits.shape[1]
            self.ahead = NATIVE.RunAhead(self._first, self._rest, self._last, self.inputs, address, vocab_size, kept)
        # By how many rows: a view takes longer to make than to draw one row from.
        self._logits_of: dict[int, npt.NDArray[np.float32]] = {}

    def run(
        self, num_tokens: int, num_sequences: int, rows: list[int] | None, *, to_logits: bool
    ) -> npt.NDArray[np.float32]:
        """Return the hidden states, or the logits, of a step that was loaded, all or those of ``rows``."""
        self._first.run(num_tokens, num_sequences)
        if rows is None:
            num_rows = num_tokens
        else:
            num_rows = len(rows)
            for tensor in self._between:
                tensor[:num_rows] = tensor[rows]
        if num_rows:
            self._rest.run(num_rows, num_sequences)
        if not to_logits:
            return self._hidden[:num_rows]
        if self._logits is None:
            made: npt.NDArray[np.float32] = self._head(torch.from_numpy(self._hidden[:num_rows])).numpy()
            return made
        if num_rows:
            self._last.run(num_rows, num_sequences)
        found = self._logits_of.get(num_rows)
        if found is None:
            found = self._logits_of[num_rows] = self._logits[:num_rows]
        return found


def _zeros(*shape: int, dtype: str = "int64") -> Tensor:
    return zeros(*shape, dtype=dtype).as_tensor()


def _numbers(tensor: Tensor) -> npt.NDArray[np.float32]:
    """Return the memory of a pass's result."""
    if not isinstance(tensor, Array):
        raise _Unrecordable("a result that was there before")
    numbers: npt.NDArray[np.float32] = tensor.numpy()
    return numbers


@contextmanager
def _onto(tape: Any) -> Iterator[None]:
    tape.begin()
    try:
        yield
    except (TypeError, ValueError) as error:  # what arrays do not do, or an op over a part of the step
        raise _Unrecordable(str(error)) from error
    finally:
        tape.end()


class Arena:
    """Memory for the activations of a recorded pass. What an op is done with, a later one takes."""

    def __init__(self) -> None:
        self._blocks: list[npt.NDArray[np.float32]] = []
        self._free: dict[int, list[npt.NDArray[np.float32]]] = {}

    def empty(self, num_rows: int, width: int) -> Tensor:
        """Return a float32 tensor [num_rows, width] whose memory is free again once nobody holds a view of it."""
        free = self._free.setdefault(num_rows * width, [])
        if not free:
            free.append(_aligned(num_rows * width))
            self._blocks.append(free[-1])
        block = free.pop()
        loan = _Loan()
        weakref.finalize(loan, free.append, block).atexit = False
        return Array(block.reshape(num_rows, width), owner=loan).as_tensor()


class _Loan:
    """Ends with the last view of an array."""


def _aligned(size: int) -> npt.NDArray[np.float32]:
    """Return an array that begins with a line of the cache, as torch's do."""
    room = np.empty(size + 16, dtype=np.float32)
    first = -(room.ctypes.data // room.itemsize) % 16
    return room[first : first + size]


_arena: Arena | None = None
"""The arena of the recording that is going on"""


@contextmanager
def _taking_from(arena: Arena) -> Iterator[None]:
    global _arena
    _arena = arena
    try:
        yield
    finally:
        _arena = None


def empty(num_rows: int, width: int) -> Tensor:
    """Return a float32 tensor [num_rows, width] for an op's result."""
    return torch.empty(num_rows, width) if _arena is None else _arena.empty(num_rows, width)
