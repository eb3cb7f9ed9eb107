"""A workload is reproducible and has the lengths and arrivals it says."""

import base64
import dataclasses
import io
import statistics

import pytest
from PIL import Image

from penstock.bench import ImageSize, LengthRange, Workload, draw_requests

WORKLOAD = Workload(
    num_requests=400,
    prompt_tokens=LengthRange(low=3, high=9),
    output_tokens=LengthRange(low=5, high=5),
    rate_per_s=50.0,
    seed=7,
)
IDS = range(10, 20)


def test_the_same_seed_gives_the_same_requests() -> None:
    assert draw_requests(WORKLOAD, IDS) == draw_requests(WORKLOAD, IDS)


def test_repetitions_differ_in_prompts_only() -> None:
    first, second = (draw_requests(WORKLOAD, IDS, repetition=repetition) for repetition in (0, 1))
    assert [len(request.prompt_token_ids) for request in first] == [len(request.prompt_token_ids) for request in second]
    assert [request.arrival_s for request in first] == [request.arrival_s for request in second]
    assert [request.prompt_token_ids for request in first] != [request.prompt_token_ids for request in second]


def test_lengths_fill_their_ranges() -> None:
    requests = draw_requests(WORKLOAD, IDS)
    assert {len(request.prompt_token_ids) for request in requests} == set(range(3, 10))
    assert {request.num_output_tokens for request in requests} == {5}
    assert {token_id for request in requests for token_id in request.prompt_token_ids} == set(IDS)


def test_arrivals_are_a_poisson_process_of_the_rate() -> None:
    arrivals = [request.arrival_s for request in draw_requests(WORKLOAD, IDS)]
    waits = [after - before for before, after in zip([0.0, *arrivals], arrivals, strict=False)]
    assert statistics.fmean(waits) == pytest.approx(1 / 50, rel=0.15)
    # An exponential distribution's deviation equals its mean; even spacing would give 0.
    assert statistics.pstdev(waits) == pytest.approx(1 / 50, rel=0.2)


@pytest.mark.parametrize(("text", "low", "high"), [("128", 128, 128), ("32..256", 32, 256)])
def test_ranges_are_read(text: str, low: int, high: int) -> None:
    assert LengthRange.parse(text) == LengthRange(low=low, high=high)
    assert str(LengthRange.parse(text)) == text


@pytest.mark.parametrize("text", ["", "0", "9..3", "a", "1..", "..4", "1-4"])
def test_what_is_no_range(text: str) -> None:
    with pytest.raises(ValueError, match=r"write 128 or 32\.\.256"):
        LengthRange.parse(text)


def test_images_differ_from_request_to_request() -> None:
    workload = dataclasses.replace(WORKLOAD, num_requests=4, num_images=2, image_size=ImageSize.parse("40x24"))
    requests = draw_requests(workload, IDS)
    assert requests == draw_requests(workload, IDS)
    again = draw_requests(workload, IDS, repetition=1)
    urls = [url for request in (*requests, *again) for url in request.images]
    assert len(set(urls)) == 16
    file = base64.b64decode(urls[0].removeprefix("data:image/jpeg;base64,"))
    assert Image.open(io.BytesIO(file)).size == (40, 24)


@pytest.mark.parametrize("text", ["", "40", "x40", "-4x4", "4x4x4", "٤x4"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="write 640x480"):
        ImageSize.parse(text)


@pytest.mark.parametrize(("concurrency", "rate_per_s"), [(None, None), (4, 2.0)])
def test_a_load_is_open_or_closed(concurrency: int | None, rate_per_s: float | None) -> None:
    length = LengthRange(low=1, high=1)
    with pytest.raises(ValueError, match="either"):
        Workload(
            num_requests=1,
            prompt_tokens=length,
            output_tokens=length,
            concurrency=concurrency,
            rate_per_s=rate_per_s,
        )
