"""Prompts that are read whole: neighbours, caches and preemption leave what is said as transformers says it."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from penstock.engine.engine import Engine
from penstock.errors import InvalidRequest
from penstock.images.families import load_processor
from penstock.protocol import GenerateRequest
from tests.engines import build_engine, greedy, is_whole, run_to_end, tokens_of
from tests.seeing_models import drawing, upstream_image_processor, upstream_model, with_images

QUESTION = "what is this?\n"
IMAGE_TOKENS = 25
WHOLE = IMAGE_TOKENS + len(QUESTION)
families = pytest.mark.parametrize("family", ["paligemma", "paligemma2"])


@pytest.fixture
def path(family: str, seeing_checkpoint: Callable[[str], Path]) -> Path:
    return seeing_checkpoint(family)


def ask(
    path: Path, name: str, seed: int | None, text: str = QUESTION, max_tokens: int = 12, **sampling: object
) -> GenerateRequest:
    """Return a greedy request of a drawing, if there is a ``seed``, and text."""
    if seed is None:
        return greedy(name, list(text.encode()), max_tokens, **sampling)
    processor = load_processor(path)
    assert processor is not None
    token_ids, pictures = with_images(path, processor, f"@{text}", [drawing(50, 60, seed)])
    return msgspec.structs.replace(greedy(name, token_ids, max_tokens, **sampling), pictures=tuple(pictures))


@torch.no_grad()
def expected(path: Path, family: str, request: GenerateRequest, seed: int) -> list[int]:
    """Return transformers' greedy tokens, from pixels on."""
    T, num_tokens = len(request.prompt_token_ids), request.sampling.max_tokens
    pixels = upstream_image_processor(family)([drawing(50, 60, seed)], return_tensors="pt")["pixel_values"]
    output = upstream_model(path).generate(
        input_ids=torch.tensor([request.prompt_token_ids]),
        pixel_values=pixels,
        token_type_ids=torch.zeros(1, T, dtype=torch.int64),
        attention_mask=torch.ones(1, T, dtype=torch.int64),
        do_sample=False,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = output[0, T:].tolist()
    return tokens


def num_cached(engine: Engine, request: GenerateRequest) -> int:
    """Return how many tokens of a request's prompt came from the cache."""
    usage = run_to_end(engine, [request])[request.request_id][-1].usage
    assert usage is not None
    return usage.num_cached_tokens


@families
@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("step_tokens", [WHOLE, 512])
def test_a_mixed_crowd_says_what_transformers_says(
    family: str, prefix_caching: bool, step_tokens: int, path: Path
) -> None:
    engine = build_engine(path, step_tokens=step_tokens, prefix_caching=prefix_caching)
    text = ask(path, "text", None, "a penstock is a pipe, and " * 4, 40)
    said_alone = tokens_of(run_to_end(build_engine(path), [text])["text"])
    seen = {"one": (1, QUESTION), "again": (1, QUESTION), "other": (2, QUESTION), "short": (1, "what?\n")}
    for turn in range(2):
        requests = {name: ask(path, f"{name}-{turn}", *args) for name, args in seen.items()}
        # Text decodes beside them, and is in the way where a step is as small as a prompt.
        deltas = run_to_end(engine, [msgspec.structs.replace(text, request_id=f"text-{turn}"), *requests.values()])
        assert tokens_of(deltas[f"text-{turn}"]) == said_alone
        for name, request in requests.items():
            assert tokens_of(deltas[request.request_id]) == expected(path, family, request, seen[name][0])
    assert is_whole(engine)
    assert (engine.status().counters.num_prefix_hits > 0) == prefix_caching


@families
def test_blocks_are_shared_with_the_same_prompt_alone(path: Path, family: str) -> None:
    engine = build_engine(path)
    assert num_cached(engine, ask(path, "first", 1)) == 0
    again = ask(path, "again", 1)
    assert num_cached(engine, again) == (WHOLE - 1) // 4 * 4
    # A prompt that goes on from it was another to the model from its first token on, and so is one that ends earlier.
    longer = ask(path, "longer", 1, f"{QUESTION}why?\n")
    assert num_cached(engine, longer) == 0
    assert num_cached(engine, ask(path, "shorter", 1, "what")) == 0
    assert num_cached(engine, ask(path, "other", 2)) == 0
    seeing = engine.status().seeing
    assert seeing is not None
    assert seeing.num_encoded_pictures == 2, "features depend on the image alone"
    for request in (again, longer):
        named = msgspec.structs.replace(request, request_id=f"{request.request_id}-2")
        deltas = run_to_end(engine, [named])
        assert tokens_of(deltas[named.request_id]) == expected(path, family, request, 1)


@families
def test_an_evicted_end_of_a_prompt_is_read_with_what_the_cache_still_has(path: Path, family: str) -> None:
    # Whoever comes between takes the blocks that were given back first: the last of the prompt.
    engine = build_engine(path, num_blocks=16)
    run_to_end(engine, [ask(path, "first", 1, max_tokens=1)])
    run_to_end(engine, [ask(path, "text", None, "x" * 40, 1)])
    again = ask(path, "again", 1)
    deltas = run_to_end(engine, [again])
    usage = deltas["again"][-1].usage
    assert usage is not None
    assert 0 < usage.num_cached_tokens < (WHOLE - 1) // 4 * 4
    assert tokens_of(deltas["again"]) == expected(path, family, again, 1)


@families
def test_choices_and_guesses_see_the_same(path: Path, family: str) -> None:
    engine = build_engine(path, speculate="ngram")
    request = ask(path, "n", 1, max_tokens=30, n=3)
    deltas = run_to_end(engine, [request, ask(path, "text", None)])
    tokens = expected(path, family, request, 1)
    assert [tokens_of(deltas["n"], index) for index in range(3)] == [tokens] * 3


@families
def test_what_is_preempted_is_read_whole_again(path: Path, family: str) -> None:
    num_blocks = 4 * -(-WHOLE // 4) + 4
    engine = build_engine(path, num_blocks=num_blocks)
    run_to_end(engine, [ask(path, f"short-{i}", None, "ab", 1) for i in range(4)])
    requests = [ask(path, str(i), i, max_tokens=20) for i in range(4)]
    deltas = run_to_end(engine, requests)
    assert engine.status().counters.num_preemptions > 0
    for seed, request in enumerate(requests):
        assert tokens_of(deltas[request.request_id]) == expected(path, family, request, seed)


@pytest.mark.parametrize("family", ["paligemma"])
def test_what_cannot_be_read_whole_is_refused(path: Path, family: str) -> None:
    engine = build_engine(path, step_tokens=WHOLE - 1)
    with pytest.raises(InvalidRequest, match=f"the prompt is {WHOLE} tokens, .* or raise --step-tokens"):
        engine.add(ask(path, "long", 1))
    with pytest.raises(InvalidRequest, match="leave out prompt_logprobs"):
        engine.add(ask(path, "scored", 1, "x", prompt_logprobs=0))
    one = ask(path, "two", 1, "x")
    twice = (*one.pictures, msgspec.structs.replace(one.pictures[0], offset=IMAGE_TOKENS))
    with pytest.raises(InvalidRequest, match="one image with a question, and there are 2"):
        engine.add(
            msgspec.structs.replace(one, prompt_token_ids=one.prompt_token_ids[:IMAGE_TOKENS] * 2, pictures=twice)
        )
    assert not engine.has_work
    long_text = ask(path, "text", None, "x" * 3 * WHOLE, prompt_logprobs=0)
    assert len(tokens_of(run_to_end(engine, [long_text])["text"])) == 12
