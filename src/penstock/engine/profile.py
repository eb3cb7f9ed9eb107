"""Where an engine's steps spend their time: wrappers around its parts, put there only when somebody asks.

T packed tokens, S sequences, N outputs, K inputs, E width, H query heads, G KV heads, D head width, V vocabulary.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from penstock.engine.host import SteppedEngine
from penstock.engine.runner.base import Runner, StepResult
from penstock.engine.runner.cpu import RunnableModel
from penstock.engine.scheduler import ScheduledBatch
from penstock.kernels import (
    Attention,
    BatchLayout,
    HeadNorms,
    KVBlocks,
    Linear,
    Ops,
    Quantization,
    Replay,
    WeightCodes,
)
from penstock.kernels.ops import CacheShapes
from penstock.models import ModelConfig
from penstock.models.lora import Adapted, Adapter
from penstock.models.vision import Inserted
from penstock.protocol import EngineStatus, GenerateRequest, Picture, SamplingParams, TokenDelta

if TYPE_CHECKING:
    from llguidance import LLMatcher

_FLOAT32_BYTES = 4


class Span(NamedTuple):
    """One part of a step. Times are of ``time.perf_counter_ns``."""

    part: str
    began_ns: int
    ended_ns: int
    num_bytes: int
    """Weights, cache and activations read or written, each once; 0 where nobody counted"""
    num_ops: int
    """Multiplications and additions"""
    of_bytes: bool = False
    """Whether those were of bytes, not of floats"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfiledStep:
    """One step, cut without gaps into its parts."""

    num_tokens: int
    num_sequences: int
    spans: list[Span]

    @property
    def is_decode(self) -> bool:
        """Whether every sequence had one token to compute."""
        return self.num_tokens == self.num_sequences


class Profiler:
    """Records every step of the one engine whose parts it was put around.

    Each wrapper says what the time since the last one spoke was spent on, so nothing is left out and nothing counted
    twice: schedule, inputs, the model's ops and what lies between them, sampling, output (committing tokens and
    making text of them), and between steps (messages), where there was work all the while.
    """

    def __init__(self) -> None:
        self.steps: list[ProfiledStep] = []
        self._spans: list[Span] = []
        self._cursor_ns = 0
        self._num_tokens = self._num_sequences = 0

    def clear(self) -> None:
        """Forget the steps so far. For when the engine is idle."""
        self.steps = []

    def around_ops(self, ops: Ops, config: ModelConfig, *, quantization: Quantization | None = None) -> Ops:
        """Return ``ops`` that are timed and keep weights as ``quantization`` says."""
        return _Ops(ops, config, quantization, self)

    def around_model(self, model: RunnableModel) -> RunnableModel:
        """Return ``model`` with its borders marked."""
        return _Model(model, self)

    def around_runner(self, runner: Runner) -> Runner:
        """Return ``runner`` with its borders marked."""
        return _Runner(runner, self)

    def around_engine(self, engine: SteppedEngine) -> SteppedEngine:
        """Return ``engine`` with its steps' borders marked."""
        return _Engine(engine, self)

    # ---- for the wrappers

    def lap(self, part: str, num_bytes: int = 0, num_ops: int = 0, *, of_bytes: bool = False) -> None:
        """Say what the time since the last lap was spent on."""
        now_ns = time.perf_counter_ns()
        self._spans.append(Span(part, self._cursor_ns, now_ns, num_bytes, num_ops, of_bytes))
        self._cursor_ns = now_ns

    def begin_step(self, *, is_next: bool) -> None:
        """Begin a step; ``is_next``: the one before left work, so the time since belongs to this one."""
        self._spans = []
        self._num_tokens = self._num_sequences = 0
        if is_next:
            self.lap("between steps")
        else:
            self._cursor_ns = time.perf_counter_ns()

    def end_step(self) -> None:
        """Keep the step, if it ran the model."""
        self.lap("output")
        if self._num_tokens:
            step = ProfiledStep(num_tokens=self._num_tokens, num_sequences=self._num_sequences, spans=self._spans)
            self.steps.append(step)

    def count(self, num_tokens: int, num_sequences: int) -> None:
        """Note what the step computes."""
        self._num_tokens += num_tokens
        self._num_sequences += num_sequences


class _Engine:
    def __init__(self, engine: SteppedEngine, profiler: Profiler) -> None:
        self.model = engine.model
        self.grammars = engine.grammars
        self._engine = engine
        self._profiler = profiler
        self._left_work = False

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    def add(self, request: GenerateRequest, matcher: "LLMatcher | None" = None) -> None:
        self._engine.add(request, matcher)

    def load_adapter(self, name: str, path: Path) -> None:
        self._engine.load_adapter(name, path)

    def unload_adapter(self, name: str) -> None:
        self._engine.unload_adapter(name)

    def abort(self, request_id: str) -> None:
        self._engine.abort(request_id)

    def step(self) -> list[TokenDelta]:
        self._profiler.begin_step(is_next=self._left_work)
        deltas = self._engine.step()
        self._profiler.end_step()
        self._left_work = self._engine.has_work
        return deltas

    def on_news(self, wake: Callable[[], object]) -> None:
        self._engine.on_news(wake)

    def close(self) -> None:
        self._engine.close()

    def status(self) -> EngineStatus:
        return self._engine.status()


class _Runner:
    def __init__(self, runner: Runner, profiler: Profiler) -> None:
        self._runner = runner
        self._profiler = profiler

    def add(
        self,
        sequence_id: int,
        index: int,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        matcher: "LLMatcher | None" = None,
        adapter: object | None = None,
        pictures: Sequence[Picture] = (),
    ) -> None:
        self._runner.add(sequence_id, index, params, prompt_token_ids, matcher, adapter, pictures)

    def load_adapter(self, path: Path) -> object:
        return self._runner.load_adapter(path)

    def remove(self, sequence_id: int) -> None:
        self._runner.remove(sequence_id)

    def commit(self, sequence_id: int, token_id: int) -> bool:
        return self._runner.commit(sequence_id, token_id)

    def matcher(self, sequence_id: int) -> "LLMatcher | None":
        return self._runner.matcher(sequence_id)

    def num_possible(self, sequence_id: int, draft: Sequence[int]) -> int:
        return self._runner.num_possible(sequence_id, draft)

    def execute(self, batch: ScheduledBatch) -> StepResult:
        self._profiler.lap("schedule")
        result = self._runner.execute(batch)
        self._profiler.lap("sampling")
        return result


class _Model:
    def __init__(self, model: RunnableModel, profiler: Profiler) -> None:
        self._model = model
        self._profiler = profiler

    def load_adapter(self, path: Path) -> Adapter:
        return self._model.load_adapter(path)

    def forward(
        self,
        token_ids: Tensor,
        layout: BatchLayout,
        cache: list[KVBlocks],
        adapted: Adapted = (),
        inserted: Inserted | None = None,
    ) -> Tensor:
        self._profiler.count(len(token_ids), len(layout.query_lens_list))
        self._profiler.lap("inputs")
        hidden = self._model.forward(token_ids, layout, cache, adapted, inserted)
        self._profiler.lap("between ops")
        return hidden

    def replay(self, cache: list[KVBlocks], block_size: int) -> None:
        """Return nothing: what is repeated in one call has no parts to be timed."""

    def logits(self, hidden: Tensor) -> Tensor:
        logits = self._model.logits(hidden)
        self._profiler.lap("between ops")
        return logits


class _Ops:
    """See ``ops.Ops``. Products are told apart by their sizes, which differ within every family."""

    def __init__(self, ops: Ops, config: ModelConfig, quantization: Quantization | None, profiler: Profiler) -> None:
        self._ops = ops
        self._quantization = quantization
        self._profiler = profiler
        E, D, H, G = config.hidden_size, config.head_dim, config.num_heads, config.num_kv_heads
        self._roles = {
            (config.vocab_size, E): "lm_head",
            (E, config.intermediate_size): "down",
            (E, H * D): "o",
            ((H + 2 * G) * D, E): "qkv",
        }

    @property
    def name(self) -> str:
        return self._ops.name

    def activation_dtype(self, weights_dtype: torch.dtype) -> torch.dtype:
        return self._ops.activation_dtype(weights_dtype)

    def cache_shapes(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> CacheShapes:
        return self._ops.cache_shapes(num_blocks, block_size, num_kv_heads, head_dim)

    def form_of_codes(self, bits: int, group: int | None, *, int8_activations: bool) -> Quantization | None:
        return self._ops.form_of_codes(bits, group, int8_activations=int8_activations)

    def prepare_linear(
        self, weight: Tensor | WeightCodes, bias: Tensor | None, *, exact: bool = False, activation: str | None = None
    ) -> Linear:
        N, K = weight.shape
        role = self._roles.get((N, K), f"linear {N} x {K}")
        linear = self._ops.prepare_linear(weight, bias, exact=exact, activation=activation)
        return self._timed(linear, role, weight, num_rows=N, num_outputs=N, exact=exact)

    def prepare_gated_linear(
        self,
        gate: Tensor | WeightCodes,
        up: Tensor | WeightCodes,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        *,
        activation: str = "silu",
    ) -> Linear:
        F, _ = gate.shape
        linear = self._ops.prepare_gated_linear(gate, up, gate_bias, up_bias, activation=activation)
        return self._timed(linear, "gate_up", gate, num_rows=2 * F, num_outputs=F)

    def _timed(
        self,
        linear: Linear,
        role: str,
        weight: Tensor | WeightCodes,
        *,
        num_rows: int,
        num_outputs: int,
        exact: bool = False,
    ) -> Linear:
        form, K = None if exact else self._quantization, weight.shape[1]
        if isinstance(weight, Tensor):
            element_bytes = weight.element_size() if form is None else form.weight_bytes
        else:
            form = weight.form
            element_bytes = form.weight_bytes
        return _Linear(
            linear,
            role,
            self._profiler,
            weight_bytes=int(num_rows * K * element_bytes),
            ops_per_token=2 * num_rows * K,
            bytes_per_token=(K + num_outputs) * _FLOAT32_BYTES,
            of_bytes=form is not None and form.int8_activations,
        )

    def record(self, forward: Callable[[Tensor, BatchLayout], Tensor], block_size: int) -> Replay | None:
        return self._ops.record(forward, block_size)

    def embed(self, token_ids: Tensor, table: Tensor, dtype: torch.dtype, *, scale: float = 1.0) -> Tensor:
        self._profiler.lap("between ops")
        out = self._ops.embed(token_ids, table, dtype, scale=scale)
        self._profiler.lap("embed", out.numel() * (table.element_size() + out.element_size()), out.numel())
        return out

    def add(self, x: Tensor, y: Tensor, *, scale: float = 1.0) -> Tensor:
        self._profiler.lap("between ops")
        out = self._ops.add(x, y, scale=scale)
        self._profiler.lap("add", 3 * out.numel() * out.element_size(), 2 * out.numel())
        return out

    def rope_angles(
        self, positions: Tensor, inverse: Tensor, head_dim: int, *, factor: float = 1.0, axes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        self._profiler.lap("between ops")
        angles = self._ops.rope_angles(positions, inverse, head_dim, factor=factor, axes=axes)
        self._profiler.lap("rope_angles")
        return angles

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        self._profiler.lap("between ops")
        out = self._ops.rms_norm(x, weight, eps, out)
        self._profiler.lap("rms_norm", 2 * x.numel() * x.element_size(), 4 * x.numel())
        return out

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        self._profiler.lap("between ops")
        out = self._ops.layer_norm(x, weight, bias, eps)
        self._profiler.lap("layer_norm", 2 * x.numel() * x.element_size(), 8 * x.numel())
        return out

    def rope_write_kv(
        self,
        qkv: Tensor,
        kv: KVBlocks,
        layout: BatchLayout,
        cos: Tensor,
        sin: Tensor,
        *,
        num_heads: int,
        num_kv_heads: int,
        norms: HeadNorms | None,
    ) -> Tensor:
        self._profiler.lap("between ops")
        q = self._ops.rope_write_kv(
            qkv, kv, layout, cos, sin, num_heads=num_heads, num_kv_heads=num_kv_heads, norms=norms
        )
        T, _, D = q.shape
        num_written = q.numel() * q.element_size() + T * num_kv_heads * _head_bytes(kv, D)
        self._profiler.lap("rope_write_kv", qkv.numel() * qkv.element_size() + num_written, 3 * qkv.numel())
        return q

    def plan_attention(
        self,
        layout: BatchLayout,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int | None,
        score_cap: float | None = None,
    ) -> Attention:
        self._profiler.lap("between ops")
        plan = self._ops.plan_attention(
            layout,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            window=window,
            score_cap=score_cap,
        )
        num_seen, num_scores = _attended(layout, window)
        self._profiler.lap("attention plan")
        return _Attention(plan, num_seen * num_kv_heads, num_scores * num_heads, self._profiler)


class _Linear:
    def __init__(
        self,
        linear: Linear,
        role: str,
        profiler: Profiler,
        *,
        weight_bytes: int,
        ops_per_token: int,
        bytes_per_token: int,
        of_bytes: bool,
    ) -> None:
        self._linear = linear
        self._role = role
        self._profiler = profiler
        self._weight_bytes = weight_bytes
        self._ops_per_token = ops_per_token
        self._bytes_per_token = bytes_per_token
        self._of_bytes = of_bytes

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        self._profiler.lap("between ops")
        out = self._linear(x, added)
        T = len(x)
        num_bytes = self._weight_bytes + T * self._bytes_per_token
        self._profiler.lap(self._role, num_bytes, T * self._ops_per_token, of_bytes=self._of_bytes)
        return out


class _Attention:
    def __init__(self, attention: Attention, num_keys: int, num_scores: int, profiler: Profiler) -> None:
        self._attention = attention
        self._profiler = profiler
        self._num_keys = num_keys
        self._num_scores = num_scores

    def __call__(self, q: Tensor, kv: KVBlocks, *, scale: float) -> Tensor:
        self._profiler.lap("between ops")
        out = self._attention(q, kv, scale=scale)
        num_bytes = self._num_keys * _head_bytes(kv, q.shape[-1]) + 2 * q.numel() * q.element_size()
        self._profiler.lap("attention", num_bytes, 4 * self._num_scores * q.shape[-1])
        return out


def _head_bytes(kv: KVBlocks, head_dim: int) -> int:
    """Return what one head's key and value of one token take, with their scales."""
    return 2 * (head_dim * kv.k.element_size() + (0 if kv.k_scales is None else _FLOAT32_BYTES))


def _attended(layout: BatchLayout, window: int | None) -> tuple[int, int]:
    """Return how many tokens' keys a step reads, each once, and how many pairs of query and key it scores."""
    num_seen = num_scores = 0
    for num_queries, context_len in zip(layout.query_lens_list, layout.context_lens_list, strict=True):
        if window is None or context_len <= window:
            num_seen += context_len
            num_scores += num_queries * context_len - num_queries * (num_queries - 1) // 2
        else:
            num_seen += min(context_len, window + num_queries - 1)
            first = context_len - num_queries + 1
            num_scores += sum(min(window, first + i) for i in range(num_queries))
    return num_seen, num_scores
