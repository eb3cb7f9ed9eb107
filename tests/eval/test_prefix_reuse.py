"""Reusing prefixes changes nothing, and the measurement would show it if it did."""

from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

from penstock.engine.aio import InProcessClient
from penstock.eval import Subject, cut_windows, prefix_reuse
from penstock.text import Tokenizer
from tests.engines import build_engine
from tests.eval.conftest import TEXT, OpenSubject


async def test_reuse_changes_nothing_at_all(
    checkpoint: Callable[[str], Path], no_progress: Callable[[int, int], None]
) -> None:
    path = checkpoint("qwen2")
    windows = cut_windows(TEXT, Tokenizer.load(path), window=160).windows[:3]
    async with AsyncExitStack() as stack:
        subjects = []
        for is_on in (True, False):
            client = InProcessClient(lambda is_on=is_on: build_engine(path, prefix_caching=is_on))  # type: ignore[misc]
            stack.push_async_callback(client.stop)
            await client.start()
            subjects.append(Subject(client, Tokenizer.load(path), None))
        found = await prefix_reuse(subjects[0], subjects[1], windows, no_progress)
    # The second prompt of a window reuses the first's whole blocks, and so on.
    assert found.num_reused_tokens >= 3 * (36 + 76 + 116)
    assert found.largest_difference == 0
    assert found.closeness.items.tolist() == [[0.0, 4.0, 4.0]] * 3
    assert found.closeness.candidate_nats == found.closeness.reference_nats


async def test_what_differs_is_seen(
    checkpoint: Callable[[str], Path], open_subject: OpenSubject, no_progress: Callable[[int, int], None]
) -> None:
    path = checkpoint("qwen2")
    windows = cut_windows(TEXT, Tokenizer.load(path), window=64).windows[:2]
    async with open_subject(path) as one, open_subject(checkpoint("llama")) as other:
        found = await prefix_reuse(one, other, windows, no_progress)
    assert found.largest_difference > 0.1
    assert (found.closeness.items[:, 0] > 0.01).all()
