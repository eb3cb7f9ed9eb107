"""How far outputs move when one unit is compressed, measured on tiny models."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from penstock.compress.auto import sensitivity
from penstock.compress.auto.sensitivity import CANDIDATES, Sensitivity, measure, rank_correlations
from penstock.compress.calibration.texts import CalibrationOptions, Texts
from penstock.compress.checkpoint import Checkpoint
from penstock.compress.layer import compress_layer
from penstock.compress.recipe import parse_recipe
from penstock.compress.run import Compression, CompressOptions
from penstock.compress.units import units_of
from penstock.compress.work import WorkDirectory
from penstock.models.decoder import load_model
from tests.packing import layout_of


def _sequences(*lengths: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(0, 320, (length,), generator=random).tolist() for length in lengths]


def _measured(path: Path, work: Path, texts: list[list[int]]) -> list[Sensitivity]:
    source = Checkpoint(path)
    units = [unit for unit in units_of(source.config) if unit.role != "gate"]
    directory = WorkDirectory(work / "out", {}, restart=False)
    seen, judged = (Texts(some, [()] * len(some)) for some in (_sequences(40, 40, 40), texts))
    return measure(source, units, seen, judged, directory, lambda what, done, total: None)


@torch.inference_mode()
def _log_probs(path: Path, ids: list[int]) -> torch.Tensor:
    model = load_model(path, dtype="float32")
    layout = layout_of([len(ids)], [len(ids)], [list(range(-(-len(ids) // 16)))], 16)
    hidden = model.forward(torch.tensor(ids), layout, model.new_cache(4, 16))
    return model.logits(hidden).log_softmax(-1)


def test_the_kl_is_that_of_a_model_with_one_unit_compressed(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the whole model written and loaded; in parts, so that changes go ahead in several lots."""
    monkeypatch.setattr(sensitivity, "AT_ONCE", 3)
    path, texts = checkpoint("llama"), _sequences(30, 17)
    rows = _measured(path, tmp_path, texts)
    label = "model.layers.0.mlp.down_proj"
    text = f"steps: [{{match: {label}, method: rtn, bits: 8, group: null}}]"
    options = CompressOptions(
        model=path,
        out=tmp_path / "one",
        recipe=parse_recipe(text),
        calibration=CalibrationOptions(num_samples=2, length=32, force=True),
    )
    Compression(options).run()
    kl = sum(
        F.kl_div(_log_probs(tmp_path / "one", ids), _log_probs(path, ids), reduction="sum", log_target=True).item()
        for ids in texts
    )
    row = next(row for row in rows if row.unit == label and row.bits == 8)
    assert row.kl == pytest.approx(kl / sum(map(len, texts)), rel=0.02)


@pytest.mark.parametrize("family", ["gemma3", "qwen3-moe"])
def test_fewer_bits_move_outputs_more(family: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    rows = _measured(checkpoint(family), tmp_path, _sequences(48, 48))
    by_unit: dict[str, list[Sensitivity]] = {}
    for row in rows:
        by_unit.setdefault(row.unit, []).append(row)
    for unit in by_unit.values():
        assert [row.bits for row in unit] == [one.bits for one in CANDIDATES]
        assert unit[0].weight_error < unit[1].weight_error < unit[2].weight_error < unit[3].weight_error
    totals = [sum(row.kl for row in rows if row.bits == one.bits) for one in CANDIDATES]
    assert 0 < totals[0] < totals[1] < totals[2] < totals[3]


def test_layers_that_were_measured_are_not_measured_again(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, texts = checkpoint("llama"), _sequences(30)
    rows = _measured(path, tmp_path, texts)
    (tmp_path / "out.partial" / "sensitivity-00001.json").unlink()
    original, measured = compress_layer, []

    def spy(*arguments: object) -> object:
        measured.append(arguments)
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(sensitivity, "compress_layer", spy)
    again = _measured(path, tmp_path, texts)
    assert again == rows
    assert len(measured) == 4 * len(CANDIDATES)


def test_correlations_are_of_ranks() -> None:
    # The order of KLs; weights' errors in that order, products' in the opposite one.
    rows = [Sensitivity(f"u{i}", 4, kl=10.0**i, weight_error=float(i), product_error=-float(i)) for i in range(5)]
    whole, at_4 = rank_correlations(rows)
    assert (whole.bits, at_4.bits) == (None, 4)
    assert (whole.weight_error, whole.product_error) == pytest.approx((1, -1))
