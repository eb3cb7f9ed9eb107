"""What the engine process does before it has torch."""

from pathlib import Path

from penstock.launch.ahead import prefetch


def test_weights_that_are_here_are_read_ahead(tmp_path: Path) -> None:
    for name in ("model-1.safetensors", "model-2.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"weights")
    assert prefetch(str(tmp_path)) == 2
    assert prefetch(str(tmp_path / "model-1.safetensors")) == 1


def test_other_names_are_left_to_whoever_loads() -> None:
    assert [prefetch(name) for name in ("penstock-mini", "shape:qwen2.5-0.5b", "organisation/name")] == [0, 0, 0]
