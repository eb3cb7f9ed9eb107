"""The memory plan fits, is used fully, and says what to do when it cannot."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import NotEnoughMemory
from penstock.estimate import ModelShape, activation_peak_bytes, format_memory_plan, plan_memory
from penstock.protocol import MemoryPlan

MIB = 1024**2

SHAPE = ModelShape(
    weights_bytes=20 * MIB,
    num_layers=8,
    hidden_size=256,
    intermediate_size=704,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    vocab_size=8192,
    activation_element_bytes=2,
    kv_element_bytes=2,
)


def plan(
    *,
    shape: ModelShape = SHAPE,
    available_bytes: int = 1024 * MIB,
    memory_bytes: int | None = None,
    memory_share: float = 0.5,
    max_running: int = 256,
    max_model_tokens: int = 1024,
) -> MemoryPlan:
    return plan_memory(
        shape,
        block_size=16,
        step_tokens=512,
        max_running=max_running,
        max_model_tokens=max_model_tokens,
        available_bytes=available_bytes,
        memory_bytes=memory_bytes,
        memory_share=memory_share,
    )


def test_a_token_takes_keys_and_values_of_every_layer() -> None:
    assert SHAPE.kv_bytes_per_token == 2 * 8 * 4 * 32 * 2
    assert plan().block_bytes == 16 * SHAPE.kv_bytes_per_token


def test_codes_bring_a_scale_for_each_key_and_value() -> None:
    shape = dataclasses.replace(SHAPE, kv_element_bytes=1, kv_scale_bytes=4)
    assert shape.kv_bytes_per_token == 2 * 8 * 4 * (32 + 4)


def test_logits_take_three_copies_and_what_sampling_works_in() -> None:
    wide = dataclasses.replace(SHAPE, vocab_size=200_000, sampling_scratch_bytes=5 * MIB)
    more = dataclasses.replace(wide, vocab_size=200_001)
    few, many = (activation_peak_bytes(s, step_tokens=512, max_running=256) for s in (wide, more))
    assert many - few == 256 * 3 * 4
    without = dataclasses.replace(wide, sampling_scratch_bytes=0)
    assert few - activation_peak_bytes(without, step_tokens=512, max_running=256) == 5 * MIB


def test_attention_works_in_memory_of_its_own() -> None:
    more = dataclasses.replace(SHAPE, vocab_size=64, attention_scratch_bytes=5 * MIB)
    less = dataclasses.replace(more, attention_scratch_bytes=4 * MIB)
    first, second = (activation_peak_bytes(shape, step_tokens=512, max_running=256) for shape in (more, less))
    assert first - second == MIB


def test_the_cache_takes_what_is_left_of_the_share() -> None:
    made = plan()
    used = made.weights_bytes + made.activation_peak_bytes + made.cache_bytes
    assert 512 * MIB - made.block_bytes < used <= 512 * MIB
    assert made.left_bytes == 1024 * MIB - used


def test_the_cache_takes_what_the_operator_gave() -> None:
    made = plan(memory_bytes=64 * MIB)
    assert made.num_blocks == 64 * MIB // made.block_bytes


def test_no_more_blocks_than_the_running_requests_can_fill() -> None:
    assert plan(max_running=2).num_blocks == 2 * 1024 // 16
    assert plan(max_running=2, memory_bytes=512 * MIB).num_blocks == 2 * 1024 // 16


def test_a_length_that_is_no_multiple_of_the_block_still_fits() -> None:
    assert plan(max_running=1, max_model_tokens=1025).num_blocks == 65


def test_too_little_memory_names_the_length_that_would_fit() -> None:
    small = plan(max_running=1, max_model_tokens=100_000, memory_share=1.0, available_bytes=4096 * MIB)
    assert small.num_blocks == 6250
    with pytest.raises(NotEnoughMemory, match=r"lower --max-model-tokens to [\d,]+ or less") as caught:
        plan(max_model_tokens=100_000, available_bytes=700 * MIB)
    assert "700.0 MiB available" in caught.value.message
    assert "100,000 tokens" in caught.value.message


def test_no_room_for_the_weights_asks_for_a_smaller_model() -> None:
    with pytest.raises(NotEnoughMemory, match="smaller model"):
        plan(available_bytes=30 * MIB)


def test_a_given_cache_that_holds_no_full_request_is_refused() -> None:
    with pytest.raises(NotEnoughMemory, match=r"--cache-memory allows 1\.0 MiB.*raise --cache-memory"):
        plan(memory_bytes=1 * MIB)


def test_a_given_cache_beyond_the_machine_is_refused() -> None:
    with pytest.raises(NotEnoughMemory, match=r"4\.0 GiB .*exceeds .*lower --cache-memory"):
        plan(memory_bytes=4096 * MIB)


@given(
    available_mib=st.integers(1, 1 << 16),
    share=st.floats(0.01, 1.0),
    given_mib=st.none() | st.integers(0, 1 << 16),
    max_running=st.integers(1, 1024),
    max_model_tokens=st.integers(1, 1 << 17),
)
def test_a_plan_never_promises_what_is_not_there(
    available_mib: int, share: float, given_mib: int | None, max_running: int, max_model_tokens: int
) -> None:
    try:
        made = plan(
            available_bytes=available_mib * MIB,
            memory_share=share,
            memory_bytes=None if given_mib is None else given_mib * MIB,
            max_running=max_running,
            max_model_tokens=max_model_tokens,
        )
    except NotEnoughMemory:
        return
    assert made.left_bytes >= 0
    assert made.cache_tokens >= max_model_tokens
    assert made.num_blocks <= max_running * -(-max_model_tokens // 16)


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size", "intermediate_size", "activation_element_bytes"])
def test_a_larger_model_never_needs_less(field: str) -> None:
    larger = dataclasses.replace(SHAPE, **{field: 4 * getattr(SHAPE, field)})
    arguments = {"step_tokens": 512, "max_running": 256}
    assert activation_peak_bytes(larger, **arguments) >= activation_peak_bytes(SHAPE, **arguments)


def test_seeing_is_set_aside_before_the_cache() -> None:
    seeing = dataclasses.replace(
        SHAPE,
        encoder_weights_bytes=10 * MIB,
        encoder_cache_bytes=20 * MIB,
        encoder_peak_bytes=30 * MIB,
        image_bytes=40 * MIB,
    )
    blind, made = plan(), plan(shape=seeing)
    num_lost = (blind.num_blocks - made.num_blocks) * made.block_bytes
    assert abs(num_lost - 100 * MIB) < made.block_bytes
    assert made.left_bytes == pytest.approx(blind.left_bytes, abs=made.block_bytes)
    table = format_memory_plan(made)
    assert all(row in table for row in ("encoder peak       30.0 MiB", "images             40.0 MiB"))
    with pytest.raises(NotEnoughMemory, match=r"with 100\.0 MiB for images"):
        plan(shape=seeing, available_bytes=200 * MIB)


def test_the_table_says_it_all() -> None:
    table = format_memory_plan(plan(max_running=4))
    assert "weights" in table
    assert "20.0 MiB" in table
    assert "256 blocks of 16 tokens: 4,096 tokens fit" in table
    assert "activation peak" in table
    assert "of 1.0 GiB available" in table
