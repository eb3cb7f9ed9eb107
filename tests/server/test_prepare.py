"""From a body to an engine's request."""

from typing import Any

import msgspec

from penstock.protocol import SamplingDefaults, SamplingParams
from penstock.server import ServerConfig
from penstock.server.prepare import generate_request
from penstock.server.schemas import CompletionRequest
from tests.server.fakes import MODEL

SUGGESTED = SamplingDefaults(temperature=0.6, top_k=20, top_p=0.95, min_p=0.1, repetition_penalty=1.1)


def sampling(**body: Any) -> SamplingParams:
    return generate_request(
        CompletionRequest.model_validate({"prompt": "x", **body}),
        [1],
        request_id="r",
        model=msgspec.structs.replace(MODEL, sampling=SUGGESTED),
        config=ServerConfig(),
    ).sampling


def picks(params: SamplingParams) -> tuple[float, ...]:
    return params.temperature, params.top_k, params.top_p, params.min_p, params.repetition_penalty


def test_what_a_request_leaves_out_is_as_the_model_suggests() -> None:
    assert picks(sampling()) == (0.6, 20, 0.95, 0.1, 1.1)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    assert picks(sampling(**dict.fromkeys(names))) == (0.6, 20, 0.95, 0.1, 1.1), "null is left out"


def test_what_a_request_says_counts_even_if_it_is_zero() -> None:
    asked = {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
    assert picks(sampling(**asked)) == (0, 0, 1, 0, 1)
    assert sampling(top_k=-1).top_k == 0, "vLLM's word for all"
