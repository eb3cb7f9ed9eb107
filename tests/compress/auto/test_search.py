"""Recipes found for a size or a loss, on tiny models."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.compress.auto import search
from penstock.compress.auto.search import Goal, Search
from penstock.compress.calibration.texts import CalibrationOptions
from penstock.compress.recipe import NAMED, parse_recipe
from penstock.compress.run import Compression, CompressOptions
from penstock.errors import CalibrationUnfit, InvalidSetting


@pytest.fixture
def options(checkpoint: Callable[[str], Path], tmp_path: Path) -> CompressOptions:
    return CompressOptions(
        model=checkpoint("llama"),
        out=tmp_path / "out",
        recipe=NAMED["int8"],
        calibration=CalibrationOptions(num_samples=4, length=48, force=True),
    )


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq_v2"])
def test_what_is_written_fits_the_size_and_fills_it(layout: str, options: CompressOptions) -> None:
    options = replace(options, layout=layout)
    reach = Search(options, Goal(max_loss=0.0))
    target = (reach.smallest_bytes + reach.largest_bytes) // 2
    found = Search(options, Goal(target_bytes=target)).run()
    assert found.rounded_to is None
    report = Compression(replace(options, recipe=found.recipe, beside=found.files())).run()
    assert report.bytes_after <= found.planned_bytes <= target
    assert report.bytes_after > 0.9 * target
    # Beside the weights is what makes them again.
    assert parse_recipe((options.out / "recipe.yaml").read_text()) == found.recipe
    said = json.loads((options.out / "sensitivity.json").read_text())
    assert len(said["sensitivities"]) == 8 * 4
    assert {one["bits"] for one in said["correlations"]} == {None, 8, 4, 3, 2}


def test_more_room_loses_less(options: CompressOptions) -> None:
    reach = Search(options, Goal(max_loss=0.0))
    span = reach.largest_bytes - reach.smallest_bytes
    targets = [reach.smallest_bytes + span * share // 8 for share in (0, 1, 3, 5, 7)]
    found = [Search(options, Goal(target_bytes=target)).run() for target in targets]
    losses = [one.added_kl for one in found]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 10 * losses[-1]
    (step,) = found[0].recipe.steps
    assert step.bits == 2


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_size_out_of_reach_is_refused_with_those_in_reach(share: float, options: CompressOptions) -> None:
    reach = Search(options, Goal(max_loss=0.0))
    target = int(share * (reach.smallest_bytes if share < 1 else reach.largest_bytes))
    with pytest.raises(InvalidSetting, match=f"take {reach.smallest_bytes:,}, and they are {reach.largest_bytes:,}"):
        Search(options, Goal(target_bytes=target))
    assert not list(options.out.parent.iterdir())


def test_the_smallest_model_within_a_loss_is_measured(
    options: CompressOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny random model's loss says nothing, so here it is what share of its bytes a model lacks."""
    tried: list[tuple[int, float]] = []

    def lacking(self: Search, path: Path) -> float:
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        tried.append((size, 1 - size / self.largest_bytes))
        return tried[-1][1]

    monkeypatch.setattr(Search, "increase", lacking)
    reach = Search(options, Goal(max_loss=0))
    bound = 0.6 * (1 - reach.smallest_bytes / reach.largest_bytes)
    finder = Search(options, Goal(max_loss=bound))
    found = finder.run()
    within = [size for size, loss in tried if loss <= bound]
    too_small = [size for size, loss in tried if loss > bound]
    assert min(within) > max(too_small)
    assert 0 <= found.planned_bytes - min(within) < 0.05 * min(within)
    assert min(within) - (1 - bound) * reach.largest_bytes < 0.05 * reach.largest_bytes
    count = len(tried)
    assert finder.run().recipe == found.recipe
    assert len(tried) == count, "trials were made twice"


def test_a_loss_that_nothing_keeps_to_is_refused_with_the_nearest(
    options: CompressOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Search, "increase", lambda self, path: 0.5)
    monkeypatch.setattr(search, "_NUM_TRIALS", 1)
    with pytest.raises(InvalidSetting, match=r"nearest lost 50\.00%"):
        Search(options, Goal(max_loss=0.01)).run()


def test_nothing_is_judged_by_what_it_was_calibrated_with(options: CompressOptions, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{i} is a text of some few words"}) for i in range(4)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    calibration = replace(options.calibration, path=tmp_path / "texts.jsonl")
    with pytest.raises(CalibrationUnfit, match="none are left to judge by"):
        Search(replace(options, calibration=calibration), Goal(max_loss=0.1))
