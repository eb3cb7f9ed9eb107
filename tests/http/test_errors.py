"""One table from errors to HTTP."""

import json

import pytest

from penstock import errors
from penstock.errors import PenstockError
from penstock.http.errors import body, error_body, error_headers, status_of


def all_errors() -> list[type[PenstockError]]:
    found: list[type[PenstockError]] = [PenstockError]
    for kind in found:
        found += [child for child in kind.__subclasses__() if child.__module__ == errors.__name__]
    return found


EXPECTED = {
    "PenstockError": (500, "internal_error"),
    "RequestError": (400, "invalid_request_error"),
    "InvalidRequest": (400, "invalid_request_error"),
    "ContextTooLong": (400, "invalid_request_error"),
    "OverLimit": (413, "invalid_request_error"),
    "InvalidImage": (400, "invalid_request_error"),
    "ModelNotFound": (404, "invalid_request_error"),
    "ConfigError": (500, "internal_error"),
    "UnknownSetting": (500, "internal_error"),
    "InvalidSetting": (500, "internal_error"),
    "ModelUnreadable": (500, "internal_error"),
    "KernelUnsupported": (500, "internal_error"),
    "MissingExtra": (500, "internal_error"),
    "NotEnoughMemory": (500, "internal_error"),
    "PortInUse": (500, "internal_error"),
    "InvalidRecipe": (500, "internal_error"),
    "CalibrationUnfit": (500, "internal_error"),
    "NotEnoughDisk": (500, "internal_error"),
    "NotRegistered": (500, "internal_error"),
    "NotVerified": (500, "internal_error"),
    "UnavailableError": (503, "service_unavailable_error"),
    "Overloaded": (503, "service_unavailable_error"),
    "DeadlineUnmeetable": (504, "timeout_error"),
    "Draining": (503, "service_unavailable_error"),
    "NotReady": (503, "service_unavailable_error"),
    "InternalError": (500, "internal_error"),
    "WorkerDied": (500, "internal_error"),
    "StepFailed": (500, "internal_error"),
    "EncodingFailed": (500, "internal_error"),
}


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.__name__)
def test_every_error_has_a_status_and_a_type(kind: type[PenstockError]) -> None:
    error = kind("what is wrong", param="n")
    assert (status_of(error), error_body(error)["error"]["type"]) == EXPECTED[kind.__name__]
    assert error_body(error) == {
        "error": {"message": "what is wrong", "type": EXPECTED[kind.__name__][1], "param": "n", "code": kind.code}
    }


def test_what_is_not_known_is_null_and_never_a_word() -> None:
    text = json.dumps(body("m", kind="t"))
    assert json.loads(text) == {"error": {"message": "m", "type": "t", "param": None, "code": None}}
    assert "None" not in text


@pytest.mark.parametrize(
    ("retry_after_s", "header"),
    [(None, None), (0.0, "1"), (0.2, "1"), (1.0, "1"), (1.01, "2"), (59.5, "60")],
)
def test_retry_after_is_in_whole_seconds_never_too_early(retry_after_s: float | None, header: str | None) -> None:
    assert error_headers(errors.Overloaded("full", retry_after_s=retry_after_s)).get("retry-after") == header
