"""What every setting may be is declared with it: nothing starts on a value that could never work."""

import pytest

from penstock.config import load_settings
from penstock.errors import InvalidSetting
from penstock.launch.settings import Settings


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("MODEL__NAME", "", "length >= 1"),
        ("SERVER__PORT", "65536", "<= 65535"),
        ("SERVER__PORT", "-1", ">= 0"),
        ("SERVER__MAX_LOGPROBS", "-1", ">= 0"),
        ("SERVER__DRAIN_TIMEOUT_S", "-0.5", ">= 0"),
        ("SCHEDULER__STEP_TOKENS", "0", ">= 1"),
        ("SCHEDULER__MAX_RUNNING", "0", ">= 1"),
        ("CACHE__BLOCK_SIZE", "0", ">= 1"),
        ("CACHE__MEMORY_SHARE", "0", "> 0"),
        ("CACHE__MEMORY_SHARE", "1.5", "<= 1"),
        ("RUNNER__THREADS", "0", ">= 1"),
        ("RUNNER__THREADS", "1025", "<= 1024"),
        ("RUNNER__MAX_MODEL_TOKENS", "0", ">= 1"),
    ],
)
def test_values_out_of_range_are_refused_with_the_range(name: str, text: str, why: str) -> None:
    with pytest.raises(InvalidSetting, match=why) as caught:
        load_settings(Settings, environ={f"PENSTOCK__{name}": text})
    assert f"PENSTOCK__{name}" in str(caught.value)


@pytest.mark.parametrize(
    "key",
    [row.key for row in load_settings(Settings).values if isinstance(row.value, int | float) and row.value is not True],
)
def test_no_number_may_be_negative(key: str) -> None:
    with pytest.raises(InvalidSetting):
        load_settings(Settings, environ={f"PENSTOCK__{key.replace('.', '__').upper()}": "-1"})
