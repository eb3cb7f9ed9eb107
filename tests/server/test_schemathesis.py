"""Whatever a stranger sends, the server answers within its schema and never with a 5xx."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from tests.servers import RunningServer

ROUTES = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("GET", "/health"),
    ("GET", "/health/ready"),
    ("GET", "/version"),
    ("GET", "/metrics"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "path", "mode"),
    # A GET has nothing to send wrongly.
    [
        (*route, mode)
        for route in ROUTES
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
        if (route[0], mode) != ("GET", GenerationMode.NEGATIVE)
    ],
)
def test_no_input_breaks_the_server(server: RunningServer, method: str, path: str, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operation = schema[path][method]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def attack(case: schemathesis.Case) -> None:
        response = case.call()
        if response.status_code == 504:
            # The one 5xx a caller can ask for: a deadline that nobody could meet.
            assert response.json()["error"]["code"] == "deadline_unmeetable"
        else:
            assert response.status_code < 500, response.text
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    attack()


def test_every_route_is_attacked(server: RunningServer) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    documented = {(method.upper(), path) for path in schema for method in schema[path]}
    attacked = {(method, path.replace("{name}", "{name}")) for method, path in ROUTES}
    assert {route for route in documented if route[1] not in ("/health/live",)} <= attacked
