"""Whatever tensor does not fit, an op refuses it or does what the reference does; it never reads what is not there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.errors import KernelUnsupported
from penstock.kernels import QUANTIZATIONS, CPUOps, HeadNorms, KVBlocks, Ops, Quantization, ReferenceOps, WeightCodes
from penstock.kernels.native import NATIVE
from tests.kernels.backends import needs_native, using
from tests.packing import layout_of

pytestmark = needs_native

T, E, N, H, G, D, P = 3, 64, 6, 4, 2, 8, 4
Tensors = dict[str, Tensor]
Call = Callable[..., Tensor]


def floats(*shape: int) -> Tensor:
    return torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float32).view(shape).sin()


def with_cache(ops: Ops, dtype: torch.dtype) -> Tensors:
    shapes = ops.cache_shapes(5, P, G, D)
    if dtype is torch.int8:
        codes = {"k": torch.ones(shapes.k, dtype=dtype), "v": torch.ones(shapes.v, dtype=dtype)}
        return codes | {"k_scales": torch.ones(shapes.scales), "v_scales": torch.ones(shapes.scales)}
    return {"k": torch.ones(shapes.k, dtype=dtype), "v": torch.ones(shapes.v, dtype=dtype)}


def attend(ops: Ops, *, q: Tensor, k: Tensor, v: Tensor, **others: Tensor) -> Tensor:
    scales = [others.pop(name) for name in ("k_scales", "v_scales") if name in others]
    layout = layout_of([1, 2], [6, 3], [[0, 1], [2]], P)
    for name, tensor in others.items():
        object.__setattr__(layout, name, tensor)
    attention = ops.plan_attention(layout, num_heads=H, num_kv_heads=G, head_dim=D, window=None)
    return attention(q, KVBlocks(k, v, *scales), scale=0.5)


def rope(ops: Ops, *, qkv: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, **others: Tensor) -> Tensor:
    scales = [others[name] for name in ("k_scales", "v_scales") if name in others]
    layout = layout_of([1, 2], [6, 3], [[0, 1], [2]], P)
    object.__setattr__(layout, "slots", others["slots"])
    norms = HeadNorms(others["q_norm"], others["k_norm"], 1e-6)
    return ops.rope_write_kv(qkv, KVBlocks(k, v, *scales), layout, cos, sin, num_heads=H, num_kv_heads=G, norms=norms)


def layout_parts() -> Tensors:
    layout = layout_of([1, 2], [6, 3], [[0, 1], [2]], P)
    names = ("query_starts", "context_lens", "tables", "table_starts")
    return {name: getattr(layout, name) for name in names}


def attention_tensors(ops: Ops, dtype: torch.dtype) -> Tensors:
    return {"q": floats(T, H, D), **with_cache(ops, dtype), **layout_parts()}


def rope_tensors(ops: Ops, dtype: torch.dtype) -> Tensors:
    return {
        "qkv": floats(T, (H + 2 * G) * D),
        **with_cache(ops, dtype),
        "cos": floats(T, 1, D),
        "sin": floats(T, 1, D),
        "slots": torch.tensor([5, 8, 9]),
        "q_norm": floats(D),
        "k_norm": floats(D),
    }


OPS: dict[str, tuple[Call, Callable[[Ops], Tensors]]] = {
    "linear": (
        lambda ops, x, weight, bias, added: ops.prepare_linear(weight, bias)(x, added),
        lambda _: {"x": floats(T, E), "weight": floats(N, E), "bias": floats(N), "added": floats(T, N)},
    ),
    "gated": (
        lambda ops, x, gate, up, gate_bias, up_bias: ops.prepare_gated_linear(gate, up, gate_bias, up_bias)(x),
        lambda _: {
            "x": floats(T, E),
            "gate": floats(N, E),
            "up": floats(N, E),
            "gate_bias": floats(N),
            "up_bias": floats(N),
        },
    ),
    "embed": (
        lambda ops, token_ids, table: ops.prepare_embedding(lambda: table, "float32")(token_ids),
        lambda _: {"token_ids": torch.tensor([2, 0, 4]), "table": floats(5, E)},
    ),
    "embed from a head": (
        lambda ops, token_ids, head: ops.prepare_embedding(
            lambda: head, "float32", tied=ops.prepare_linear(head, None)
        )(token_ids),
        lambda _: {"token_ids": torch.tensor([2, 0, 4]), "head": floats(5, E)},
    ),
    "add": (lambda ops, x, y: ops.add(x, y), lambda _: {"x": floats(T, E), "y": floats(T, E)}),
    "rms_norm": (
        lambda ops, x, weight, out: ops.rms_norm(x, weight, 1e-6, out=out),
        lambda _: {"x": floats(T, E), "weight": floats(E), "out": floats(T, E)},
    ),
    "layer_norm": (
        lambda ops, x, weight, bias: ops.layer_norm(x, weight, bias, 1e-6),
        lambda _: {"x": floats(T, E), "weight": floats(E), "bias": floats(E)},
    ),
    "rope_angles": (
        lambda ops, positions, inverse: torch.cat(ops.rope_angles(positions, inverse, D)),
        lambda _: {"positions": torch.tensor([7, 0, 3]), "inverse": floats(D // 2)},
    ),
    "rope_angles on axes": (
        lambda ops, positions, inverse, axes: torch.cat(ops.rope_angles(positions, inverse, D, axes=axes)),
        lambda _: {"positions": torch.arange(9).view(3, T), "inverse": floats(4), "axes": torch.tensor([0, 1, 2, 1])},
    ),
    "rope_write_kv": (rope, lambda ops: rope_tensors(ops, torch.float32)),
    "rope_write_kv in codes": (rope, lambda ops: rope_tensors(ops, torch.int8)),
    "attention": (attend, lambda ops: attention_tensors(ops, torch.float32)),
    "attention over codes": (attend, lambda ops: attention_tensors(ops, torch.int8)),
}

MISFITS: dict[str, Callable[[Tensor], Tensor]] = {
    "float64": Tensor.double,
    "float16": Tensor.half,
    "int32": Tensor.int,
    "int16": Tensor.short,
    "bool": Tensor.bool,
    "complex": lambda x: x.to(torch.complex64),
    "a row more": lambda x: torch.cat([x, x[:1]]),
    "a row less": lambda x: x[:-1].clone(),
    "no row": lambda x: x[:0].clone(),
    "a column more": lambda x: torch.cat([x, x[..., :1]], -1),
    "a column less": lambda x: x[..., :-1].clone(),
    "no column": lambda x: x[..., :0].clone(),
    "transposed": lambda x: x.transpose(0, -1),
    "rows apart": lambda x: x.repeat_interleave(2, 0)[::2],
    "columns apart": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "one row repeated": lambda x: x[:1].expand_as(x),
    "a dimension more": lambda x: x.unsqueeze(0),
    "a dimension less": lambda x: x[0].clone(),
    "a number": lambda x: x.flatten()[0].clone(),
    "nothing": lambda x: torch.empty(0, dtype=x.dtype),
}


TRUSTED = {
    ("attention", "tables", "a column less"),
    ("attention", "tables", "no column"),
    ("attention over codes", "tables", "a column less"),
    ("attention over codes", "tables", "no column"),
    ("rope_angles on axes", "positions", "a row less"),
    ("rope_angles on axes", "positions", "no row"),
}
"""What only other tensors' values tell, which are not looked at: contexts' blocks, and pairs' axes"""


def spoiled(ops: Ops, op: str, name: str, misfit: str) -> Tensor:
    call, tensors_for = OPS[op]
    tensors = tensors_for(ops)
    tensor = MISFITS[misfit](tensors[name])
    if isinstance(ops, ReferenceOps):  # which does not convert where compiled code may
        tensor = tensor.to(tensors[name].dtype)
    with torch.inference_mode():
        return call(ops, **tensors | {name: tensor})


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, (_, of) in OPS.items() for name in of(CPUOps())])
def test_what_does_not_fit_is_refused_or_computed(op: str, name: str) -> None:
    call, tensors_for = OPS[op]
    with using(str(NATIVE and NATIVE.isa()), 2):
        fits = call(CPUOps(), **tensors_for(CPUOps()))
        torch.testing.assert_close(fits, call(ReferenceOps(), **tensors_for(ReferenceOps())), atol=1e-5, rtol=1e-5)
        num_refused = 0
        for misfit in MISFITS:
            if (op, name, misfit) in TRUSTED:
                continue
            try:
                found = spoiled(CPUOps(), op, name, misfit)
            except (KernelUnsupported, ValueError, IndexError):
                num_refused += 1
                continue
            expected = spoiled(ReferenceOps(), op, name, misfit)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, msg=f"{misfit} is computed otherwise")
    assert num_refused >= 8


FORM = Quantization(bits=4, group=32, int8_activations=True)


def codes(**changes: Any) -> WeightCodes:
    tensors = {
        "codes": torch.randint(0, 16, (N, E), dtype=torch.uint8),
        "scales": torch.rand(N, E // 32),
        "zeros": torch.randint(0, 16, (N, E // 32), dtype=torch.uint8),
    }
    return WeightCodes(FORM, **tensors | changes)


@pytest.mark.parametrize("name", ["codes", "scales", "zeros"])
@pytest.mark.parametrize("misfit", MISFITS)
def test_codes_that_do_not_fit_are_refused(name: str, misfit: str) -> None:
    spoiled = codes(**{name: MISFITS[misfit](getattr(codes(), name))})
    with pytest.raises((KernelUnsupported, ValueError)):
        CPUOps().prepare_linear(spoiled, None)(floats(T, E))


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("quantize", [None, *QUANTIZATIONS])
def test_no_tokens_have_no_result(quantize: str | None, num_threads: int) -> None:
    ops = CPUOps(QUANTIZATIONS[quantize] if quantize else None)
    with using(str(NATIVE and NATIVE.isa()), num_threads):
        assert ops.prepare_linear(floats(N, E), None)(torch.empty(0, E)).shape == (0, N)
        assert ops.prepare_gated_linear(floats(N, E), floats(N, E), None, None)(torch.empty(0, E)).shape == (0, N)


def test_heads_that_cannot_be_shared_out_are_refused() -> None:
    layout = layout_of([1], [3], [[0]], P)
    for num_heads, num_kv_heads in ((3, 2), (2, 4), (4, 0), (-4, 2), (4, -2)):
        with pytest.raises(KernelUnsupported, match=f"{num_heads} query heads cannot share {num_kv_heads} KV"):
            CPUOps().plan_attention(layout, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=D, window=None)


@pytest.mark.parametrize("num_threads", [0, -1])
def test_no_threads_are_refused(num_threads: int) -> None:
    assert NATIVE is not None
    with pytest.raises(ValueError, match="at least one thread"):
        NATIVE.set_num_threads(1, num_threads, [])


def test_more_threads_for_few_rows_than_there_are_are_refused() -> None:
    assert NATIVE is not None
    with pytest.raises(ValueError, match="no more threads than many"):
        NATIVE.set_num_threads(2, 3, [])


@pytest.mark.parametrize("token_id", [-1, 5, 2**62, -(2**63)])
def test_tokens_that_are_none_are_refused(token_id: int) -> None:
    with pytest.raises(IndexError, match=f"token {token_id} is not one of 5"):
        CPUOps().prepare_embedding(lambda: floats(5, E), "float32")(torch.tensor([0, token_id]))
