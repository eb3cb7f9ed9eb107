"""From YAML to matrices."""

from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.compress.recipe import KEEP, NAMED, parse_recipe, read_recipe, resolve
from penstock.compress.units import Unit, ends_of, units_of
from penstock.errors import InvalidRecipe
from penstock.models import read_config

STATIC = "steps: [{match: decoder, method: rtn, bits: 8, group: null, activations: static, %s}]"


@pytest.fixture
def units(checkpoint: Callable[[str], Path]) -> list[Unit]:
    config = read_config(checkpoint("llama"))
    return [*units_of(config), *ends_of(config)]


def _resolved(text: str, units: list[Unit]) -> dict[str, str]:
    """Return by label what a unit gets, and its bits."""
    return {unit.label: f"{one.method} {one.bits}" for unit, one in resolve(parse_recipe(text), units).items()}


def test_what_shares_an_input_is_one_unit(checkpoint: Callable[[str], Path]) -> None:
    def labels(family: str) -> list[tuple[str, str]]:
        found = units_of(read_config(checkpoint(family)))
        return [(unit.role, unit.label.removeprefix("model.layers.0.")) for unit in found if unit.layer == 0]

    assert labels("llama") == [
        ("qkv", "self_attn.q_proj+k_proj+v_proj"),
        ("o", "self_attn.o_proj"),
        ("gate_up", "mlp.gate_proj+up_proj"),
        ("down", "mlp.down_proj"),
    ]
    assert [label for _, label in labels("phi3")] == [
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        "mlp.gate_up_proj",
        "mlp.down_proj",
    ]
    # Heads' norms lie between the projections of Qwen3.
    assert labels("qwen3-moe")[:4] == [
        ("qkv", "self_attn.q_proj+k_proj+v_proj"),
        ("o", "self_attn.o_proj"),
        ("gate", "mlp.gate"),
        ("gate_up", "mlp.experts.0.gate_proj+up_proj"),
    ]


def test_shapes_are_those_of_the_checkpoint(units: list[Unit]) -> None:
    assert units[0].shapes == ((64, 64), (32, 64), (32, 64))
    assert (units[3].num_inputs, units[3].num_weights) == (96, 64 * 96)


def test_later_steps_count(units: list[Unit]) -> None:
    resolved = _resolved(
        """
        steps:
          - {match: decoder, method: gptq}
          - {match: mlp, layers: 1, method: rtn, bits: 8, group: null}
          - {match: "*.self_attn.o_proj", layers: "0-1", method: keep}
        """,
        units,
    )
    assert resolved["model.layers.0.self_attn.q_proj+k_proj+v_proj"] == "gptq 4"
    assert resolved["model.layers.0.self_attn.o_proj"] == "keep 4"
    assert resolved["model.layers.0.mlp.down_proj"] == "gptq 4"
    assert resolved["model.layers.1.mlp.gate_proj+up_proj"] == "rtn 8"


def test_what_no_step_reaches_is_kept(units: list[Unit]) -> None:
    resolved = resolve(parse_recipe("steps: [{match: attention, method: rtn}]"), units)
    kept = {unit.component for unit, treatment in resolved.items() if treatment is KEEP}
    assert kept == {"mlp", "embeddings", "lm_head"}


@pytest.mark.parametrize("name", NAMED)
def test_named_recipes_resolve_and_are_sound(name: str, units: list[Unit]) -> None:
    import msgspec
    import yaml

    written = yaml.safe_dump(msgspec.to_builtins(read_recipe(name)))
    assert parse_recipe(written) == NAMED[name]
    if name == "vlm-mixed":
        with pytest.raises(InvalidRecipe, match=r"'vision_encoder' matches nothing\. .* lm_head, and modules"):
            resolve(NAMED[name], units)
        return
    resolved = resolve(NAMED[name], units)
    assert all((treatment.method == "keep") is (unit.layer is None) for unit, treatment in resolved.items())


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("steps: [{match: decoder, method: gtpq}]", "gtpq"),
        ("steps: [{match: decoder, method: gptq, bit: 4}]", "bit"),
        ("steps: [{match: decoder, method: gptq, bits: 9}]", "step 1: bits is 9"),
        ("steps: [{match: decoder, method: gptq, bits: four}]", "bits"),
        ("steps: [{match: decoder, method: gptq, group: 4}]", "group is 4"),
        ("steps: [{match: decoder, method: rtn, activations: dynamic}]", "set bits: 8"),
        ("steps: [{match: decoder, method: rtn, bits: 8, activations: dynamic}]", "set group: null"),
        ("steps: [{match: decoder, method: rtn, bits: 8, group: null, observer: mse}]", "set activations: static"),
        (STATIC % "percentile: 99", "set observer: percentile"),
        (STATIC % "observer: percentile, percentile: 10", "percentile is 10"),
        (STATIC % "observer: mean", "mean"),
        ("steps: [{match: decoder, method: awq, smooth: 0.5}]", "leave smooth out"),
        ("steps: [{match: decoder, method: rtn, smooth: 2}]", "smooth is 2"),
        ("steps: [{match: decoder, method: wanda}]", "either sparsity, such as 0.5, or pattern"),
        ("steps: [{match: decoder, method: wanda, sparsity: 0.5, pattern: '2:4'}]", "either sparsity"),
        ("steps: [{match: decoder, method: sparsegpt, pattern: '4:2'}]", "pattern is '4:2'"),
        ("steps: [{match: decoder, method: magnitude, sparsity: 1}]", "sparsity is 1"),
        ("steps: [{match: decoder, method: gptq, sparsity: 0.5}]", "gptq makes no zeros"),
        ("steps: [{match: decoder, method: wanda, sparsity: 0.5, bits: 8}]", "wanda leaves floats"),
        ("{remove: {layers: 1}, steps: [{match: mlp, method: rtn}]}", "remove stands alone"),
        ("remove: {heads: 1}", "remove.heads is 1"),
        ("steps: [{match: decoder, method: svd}]", "size, such as 0.5"),
        ("steps: [{match: decoder, method: rtn, size: 0.5}]", "no other method"),
        ("steps: [{match: decoder, method: svd, size: 1.5}]", "size is 1.5"),
        ("steps: [{match: decoder, method: svd, size: 0.5, bits: 8}]", "svd leaves floats"),
        ("{remove: {layers: 1}, kv_cache: fp8}", "remove stands alone"),
        ("kv_cache: int8", "int8"),
        ("remove: {neurons: 1}", "neurons"),
        ("remove: {layers: -1}", "remove.layers is -1"),
        ("remove: {channels: 1.5}", "remove.channels is 1.5"),
        ("remove: {}", "takes nothing out"),
        ("steps: []", "no steps"),
        ("steps: [", "not YAML"),
        ("- 1", "Expected `object`"),
    ],
)
def test_bad_recipes_are_refused_by_name(text: str, complaint: str) -> None:
    with pytest.raises(InvalidRecipe, match=complaint):
        parse_recipe(text)


@pytest.mark.parametrize(
    ("step", "complaint"),
    [
        ("match: vision_encoder", "'vision_encoder' matches nothing"),
        ("match: embeddings, bits: 8, activations: dynamic, group: null", "outside of the layers"),
        ("match: '*.q_proj'", "matches a part of model.layers.0.self_attn.q_proj"),
        ("match: mlp, layers: 2", "layers 0-1"),
        ("match: mlp, layers: first", "write numbers and ranges"),
        ("match: 'model.layers.1.mlp.down_proj', layers: 0", "matches nothing in layers 0"),
    ],
)
def test_steps_that_do_not_fit_the_model_are_refused(step: str, complaint: str, units: list[Unit]) -> None:
    with pytest.raises(InvalidRecipe, match=complaint):
        resolve(parse_recipe(f"steps: [{{{step}, method: rtn}}]"), units)


def test_a_pattern_that_does_not_divide_the_inputs_is_refused(units: list[Unit]) -> None:
    with pytest.raises(InvalidRecipe, match=r"multiple of 10 inputs, and model\.layers\.0\.self_attn\.q_proj"):
        resolve(parse_recipe("steps: [{match: decoder, method: wanda, pattern: '5:10'}]"), units)


def test_a_recipe_that_is_no_file_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(InvalidRecipe, match="w4a16-awq"):
        read_recipe("w3")
    (tmp_path / "recipe.yaml").write_text("steps: [{match: mlp}]")
    with pytest.raises(InvalidRecipe, match=r"recipe\.yaml: .*method"):
        read_recipe(str(tmp_path / "recipe.yaml"))
