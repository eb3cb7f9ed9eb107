"""In no precision does a request depend on its neighbours, not in the last bit of a log-probability."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from penstock.engine.engine import Engine
from penstock.kernels import QUANTIZATIONS, ops_for
from penstock.kernels.native import NATIVE
from penstock.protocol import TokenDelta
from tests.engines import build_engine, greedy, run_to_end
from tests.tiny_models import VOCAB_SIZE

pytestmark = pytest.mark.skipif(NATIVE is None, reason="the native kernels were not built")

NUM_TOKENS = 24
PRECISIONS = [
    (dtype, quantize, kv_dtype)
    for dtype in ("float32", "bfloat16")
    for quantize in (None, *QUANTIZATIONS)
    for kv_dtype in ("float32", "bfloat16", "int8")
    if quantize is None or dtype == "bfloat16"
]


def draw_prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()


def said(deltas: list[TokenDelta]) -> list[tuple[int, float]]:
    """Return each token with its log-probability, every bit of it."""
    return [(logprobs.chosen.token_id, logprobs.chosen.logprob) for delta in deltas for logprobs in delta.logprobs]


@pytest.mark.parametrize(("dtype", "quantize", "kv_dtype"), PRECISIONS)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_alone_equals_among_strangers(
    family: str, dtype: str, quantize: str | None, kv_dtype: str, checkpoint: Callable[[str], Path]
) -> None:
    def engine(num_blocks: int, step_tokens: int = 512) -> Engine:
        return build_engine(
            checkpoint(family),
            num_blocks=num_blocks,
            step_tokens=step_tokens,
            dtype=dtype,
            kv_dtype=kv_dtype,
            ops=ops_for(dtype, quantize),
        )

    mine = greedy("mine", draw_prompt(70, 1), NUM_TOKENS, logprobs=1)
    crowd = [greedy(f"stranger-{i}", draw_prompt(1 + 37 * i % 90, 100 + i), 1 + 11 * i % NUM_TOKENS) for i in range(32)]
    alone = said(run_to_end(engine(256), [mine])["mine"])
    assert len(alone) == NUM_TOKENS
    assert said(run_to_end(engine(2000), [*crowd[:16], mine, *crowd[16:]])["mine"]) == alone
    # In other chunks, and preempted: first answers are short, so that little growth is expected of those that follow.
    tight = engine(60, step_tokens=33)
    run_to_end(tight, [greedy(f"short-{i}", draw_prompt(20, 200 + i), 1) for i in range(8)])
    growing = [greedy(f"long-{i}", draw_prompt(20, 200 + i), 60) for i in range(8)]
    assert said(run_to_end(tight, [*growing, mine])["mine"]) == alone
    if family == "llama":  # the other's blocks slide out of its window
        assert tight.status().counters.num_preemptions > 0
