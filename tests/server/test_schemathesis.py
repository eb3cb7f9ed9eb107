"""Whatever a stranger sends, the answer is one that the API describes, and no 5xx but those one may ask for."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from penstock.server import ServerConfig
from tests.servers import RunningServer, serve_checkpoint

# A GET has nothing to send wrongly.
BOTH = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
ROUTES = {
    ("POST", "/v1/completions"): BOTH,
    ("POST", "/v1/chat/completions"): BOTH,
    ("POST", "/v1/responses"): BOTH,
    ("POST", "/v1/messages"): BOTH,
    ("POST", "/v1/messages/count_tokens"): BOTH,
    ("POST", "/v1/embeddings"): BOTH,
    ("POST", "/v1/score"): BOTH,
    ("POST", "/v1/rerank"): BOTH,
    ("POST", "/v1/load_lora_adapter"): BOTH,
    ("POST", "/v1/unload_lora_adapter"): BOTH,
    ("POST", "/tokenize"): BOTH,
    ("POST", "/detokenize"): BOTH,
    ("GET", "/v1/models"): BOTH[:1],
    ("GET", "/v1/models/{name}"): BOTH[:1],
    ("GET", "/health"): BOTH[:1],
    ("GET", "/health/live"): BOTH[:1],
    ("GET", "/health/ready"): BOTH[:1],
    ("GET", "/version"): BOTH[:1],
    ("GET", "/metrics"): BOTH[:1],
}
CHECKS = [
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
]


@pytest.fixture(scope="module")
def described(server: RunningServer) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.fixture(scope="module")
def seeing(seeing_checkpoint: Callable[[str], Path]) -> Iterator[schemathesis.BaseSchema]:
    with serve_checkpoint(seeing_checkpoint("llava"), ServerConfig(served_names=("tiny",))) as running:
        yield schemathesis.openapi.from_url(f"{running.url}/openapi.json")


@pytest.fixture(scope="module")
def session() -> requests.Session:
    return requests.Session()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        pytest.param(*route, mode, id=f"{' '.join(route)} {mode.value}")
        for route, modes in ROUTES.items()
        for mode in modes
    ],
)
def test_no_input_breaks_the_server(
    described: schemathesis.BaseSchema, session: requests.Session, method: str, path: str, mode: GenerationMode
) -> None:
    attack(described[path][method], session, mode)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"])
def test_no_input_breaks_a_server_that_sees(
    seeing: schemathesis.BaseSchema, session: requests.Session, path: str
) -> None:
    for mode in BOTH:
        attack(seeing[path]["POST"], session, mode)


def attack(operation: schemathesis.APIOperation, session: requests.Session, mode: GenerationMode) -> None:
    path = operation.path

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def one(case: schemathesis.Case) -> None:
        response = case.call(session=session)
        status = response.status_code
        # A body that is too large is refused before anybody sees what is wrong with it.
        rejects = mode is GenerationMode.NEGATIVE and status != 413
        case.validate_response(response, checks=[*CHECKS, negative_data_rejection] if rejects else CHECKS)
        if status >= 400:
            error = response.json()["error"]
            is_anthropics = path.startswith("/v1/messages")
            assert set(error) == {"message", "type"} | (set() if is_anthropics else {"param", "code"})
        if status >= 500:
            # The one a caller can ask for: a deadline that nobody could meet. 503 is for servers that are not ready.
            assert (status, error["type"]) == (504, "timeout_error"), response.text

    one()


def test_every_route_is_attacked(described: schemathesis.BaseSchema) -> None:
    assert {(method.upper(), path) for path in described for method in described[path]} == set(ROUTES)


def test_every_status_of_the_error_table_is_described(described: schemathesis.BaseSchema) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"):
        documented = set(described[path]["POST"].definition.raw["responses"])
        assert documented == {"200", "400", "404", "413", "500", "503", "504"}
