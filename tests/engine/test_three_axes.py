"""Positions in time, row and column in the engine: what is said of images and videos stays what transformers says."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from penstock.images.families import load_processor
from penstock.protocol import GenerateRequest
from tests.engines import build_engine, greedy, run_to_end, tokens_of
from tests.seeing_models import THREE_AXES, upstream_model, with_images
from tests.three_axes import SEEN, Prompt, prompt

NUM_NEW = 10


@torch.no_grad()
def expected(asked: Prompt) -> list[int]:
    """Return transformers' greedy tokens."""
    T = len(asked.token_ids)
    output = upstream_model(asked.path).generate(
        **asked.upstream(),
        attention_mask=torch.ones(1, T, dtype=torch.int64),
        do_sample=False,
        max_new_tokens=NUM_NEW,
        min_new_tokens=NUM_NEW,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = output[0, T:].tolist()
    return tokens


def request_of(asked: Prompt, name: str) -> GenerateRequest:
    request = greedy(name, asked.token_ids, NUM_NEW)
    return msgspec.structs.replace(request, pictures=tuple(asked.pictures))


@pytest.mark.parametrize("family", THREE_AXES)
@pytest.mark.parametrize("step_tokens", [17, 512])
def test_chunks_neighbours_and_cached_prefixes_change_nothing(
    family: str, step_tokens: int, seeing_checkpoint: Callable[[str], Path]
) -> None:
    asked = prompt(seeing_checkpoint(family))
    tokens, text = expected(asked), list(range(40))
    alone = tokens_of(run_to_end(build_engine(asked.path), [greedy("text", text, 20)])["text"])
    engine = build_engine(asked.path, step_tokens=step_tokens)
    for turn in ("first", "again"):
        # Text decodes beside them, with positions of its own.
        requests = [greedy(f"text-{turn}", text, 20), *(request_of(asked, f"{i}-{turn}") for i in range(2))]
        deltas = run_to_end(engine, requests)
        assert [tokens_of(deltas[f"{i}-{turn}"]) for i in range(2)] == [tokens, tokens]
        assert tokens_of(deltas[f"text-{turn}"]) == alone
    assert engine.status().counters.num_prefix_hits >= len(asked.token_ids) - 4


CROWD: dict[str, tuple[str, list[int]]] = {
    "text": ("what is a penstock?", []),
    "image": ("@what is this?", [0]),
    "same image": ("@where is it?", [2]),
    "other sizes": ("@ and @ and @", [1, 3, 5]),
    "video": ("@what is this?", [4]),
    "video and image": ("@ and @", [6, 0]),
}
"""Prompts, and which of ``SEEN`` they show"""


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("family", THREE_AXES)
def test_a_mixed_crowd_says_what_each_says_alone(
    family: str, prefix_caching: bool, seeing_checkpoint: Callable[[str], Path]
) -> None:
    path = seeing_checkpoint(family)
    processor = load_processor(path)
    assert processor is not None
    requests = []
    for name, (text, seen) in CROWD.items():
        marked = text.replace("@", "<|vision_start|>@<|vision_end|>")
        token_ids, pictures = with_images(path, processor, marked, [SEEN[i] for i in seen])
        requests.append(msgspec.structs.replace(greedy(name, token_ids, NUM_NEW), pictures=tuple(pictures)))
    alone = [tokens_of(run_to_end(build_engine(path, num_blocks=512), [one])[one.request_id]) for one in requests]
    engine = build_engine(path, num_blocks=1024, step_tokens=64, prefix_caching=prefix_caching, encoder_patches=64)
    for turn in ("first", "again"):
        named = [msgspec.structs.replace(one, request_id=f"{one.request_id}, {turn}") for one in requests]
        deltas = run_to_end(engine, named)
        assert [tokens_of(deltas[one.request_id]) for one in named] == alone
    assert alone[1] != alone[4], "a model that sees nothing would hide a wrong picture"


@pytest.mark.parametrize("family", THREE_AXES)
def test_what_is_preempted_is_computed_again(family: str, seeing_checkpoint: Callable[[str], Path]) -> None:
    asked = prompt(seeing_checkpoint(family))
    # Room for the prompts, and not for all that they go on with; answers have been short so far.
    num_blocks = 4 * -(-len(asked.token_ids) // 4) + 4
    engine = build_engine(asked.path, num_blocks=num_blocks, prefix_caching=False)
    run_to_end(engine, [greedy(f"short-{i}", [i, 2, 3], 1) for i in range(4)])
    deltas = run_to_end(engine, [request_of(asked, str(i)) for i in range(4)])
    assert engine.status().counters.num_preemptions > 0
    assert [tokens_of(deltas[str(i)]) for i in range(4)] == [expected(asked)] * 4
