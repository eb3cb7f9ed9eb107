"""Several adapters in one batch, loaded and unloaded while others run."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from penstock.engine.engine import Engine
from penstock.errors import InvalidRequest, ModelNotFound
from penstock.protocol import GenerateRequest
from tests.adapters import merged, write_adapter
from tests.engines import build_engine, greedy, is_whole, run_to_end, tokens_of
from tests.tiny_models import reference_greedy

PROMPT = [(11 * i + 5) % 256 for i in range(50)]


def using(name: str, adapter: str | None, prompt: list[int] = PROMPT, **sampling: object) -> GenerateRequest:
    return msgspec.structs.replace(greedy(name, prompt, 16, **sampling), adapter=adapter)


@pytest.fixture
def base(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("qwen3")


@pytest.fixture
def adapters(base: Path, tmp_path: Path) -> list[Path]:
    return [write_adapter(tmp_path / f"a{i}", base, seed=i) for i in range(2)]


@pytest.fixture
def expected(base: Path, adapters: list[Path], tmp_path: Path) -> dict[str | None, list[int]]:
    """What the model as it is, and with each adapter merged, says after the prompt."""
    found: dict[str | None, list[int]] = {None: reference_greedy(base, PROMPT, 16)}
    for i, adapter in enumerate(adapters):
        found[f"a{i}"] = reference_greedy(merged(tmp_path / f"m{i}", base, adapter), PROMPT, 16)
    assert len({tuple(tokens) for tokens in found.values()}) == 3
    return found


def loaded(base: Path, adapters: list[Path], step_tokens: int = 512) -> Engine:
    engine = build_engine(base, max_adapters=2, num_blocks=600, step_tokens=step_tokens)
    for i, path in enumerate(adapters):
        engine.load_adapter(f"a{i}", path)
    return engine


@pytest.mark.parametrize("step_tokens", [16, 200])
def test_adapters_in_one_batch(
    base: Path, adapters: list[Path], expected: dict[str | None, list[int]], step_tokens: int
) -> None:
    engine = loaded(base, adapters, step_tokens=step_tokens)
    names: list[str | None] = ["a0", None, "a1", "a0", None]
    deltas = run_to_end(engine, [using(f"{i}", name) for i, name in enumerate(names)])
    for i, name in enumerate(names):
        assert tokens_of(deltas[f"{i}"]) == expected[name]
    # Again, from the prefix cache: each finds its own blocks and nobody else's.
    again = run_to_end(engine, [using(f"{i}", name) for i, name in enumerate(names)])
    for i, name in enumerate(names):
        usage = again[f"{i}"][-1].usage
        assert tokens_of(again[f"{i}"]) == expected[name]
        assert usage is not None
        assert usage.num_cached_tokens == 48
    assert is_whole(engine)


def test_choices_of_an_adapter(base: Path, adapters: list[Path], expected: dict[str | None, list[int]]) -> None:
    deltas = run_to_end(loaded(base, adapters), [using("n", "a1", n=3), using("other", None)])["n"]
    assert [tokens_of(deltas, index) for index in range(3)] == [expected["a1"]] * 3


def test_unloading_leaves_those_that_run(
    base: Path, adapters: list[Path], expected: dict[str | None, list[int]]
) -> None:
    engine = loaded(base, adapters)
    engine.add(using("running", "a0"))
    first = engine.step()
    engine.unload_adapter("a0")
    # Another of the same name: the cache must not mix the two.
    engine.load_adapter("a0", adapters[1])
    deltas = run_to_end(engine, [using("next", "a0")])
    assert tokens_of(deltas["next"]) == expected["a1"]
    assert tokens_of([*first, *deltas["running"]]) == expected["a0"]


def test_what_is_refused(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    engine = loaded(base, adapters)
    with pytest.raises(InvalidRequest, match="'a0' is loaded; unload it first"):
        engine.load_adapter("a0", adapters[0])
    with pytest.raises(InvalidRequest, match="2 adapters are loaded"):
        engine.load_adapter("a2", adapters[0])
    engine.unload_adapter("a1")
    with pytest.raises(InvalidRequest, match="adapter_config") as caught:
        engine.load_adapter("a1", tmp_path)
    assert caught.value.param == "lora_path"
    with pytest.raises(ModelNotFound, match="no adapter named 'a1'"):
        engine.add(using("x", "a1"))
    assert not engine.has_work
    with pytest.raises(InvalidRequest, match="start it with --max-loras"):
        build_engine(base).load_adapter("a0", adapters[0])


def test_salts_cannot_reach_an_adapters_blocks(base: Path, adapters: list[Path]) -> None:
    engine = loaded(base, adapters)
    run_to_end(engine, [using("a", "a0")])
    for salt in ("1:", "1", ":"):
        sneaky = msgspec.structs.replace(greedy(salt, PROMPT, 1), cache_salt=salt)
        usage = run_to_end(engine, [sneaky])[salt][-1].usage
        assert usage is not None
        assert usage.num_cached_tokens == 0
