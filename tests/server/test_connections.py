"""Headers and connections as they are on the wire, over a real engine."""

import json
import os
import re
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from structlog.testing import capture_logs

from tests.servers import RunningServer

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
BODY = {"prompt": "abc", "max_tokens": 24, "ignore_eos": True}
LIMIT = 200_000
"""``server``'s ``max_body_bytes``."""


def connect(server: RunningServer) -> socket.socket:
    url = urlsplit(server.url)
    assert url.port is not None
    return socket.create_connection((url.hostname, url.port), timeout=10)


def head(path: str = "/v1/completions", *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", *headers, "", ""]
    return "\r\n".join(lines).encode()


def read_to_end(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


def is_well(server: RunningServer) -> bool:
    return httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_overhead_is_a_small_part_of_the_whole(server: RunningServer, stream: bool) -> None:
    shares = []
    for _ in range(5):
        began_s = time.perf_counter()
        response = httpx.post(f"{server.url}/v1/completions", json={**BODY, "stream": stream})
        elapsed_ms = (time.perf_counter() - began_s) * 1e3
        overhead = response.headers["x-penstock-overhead-ms"]
        assert re.fullmatch(r"\d+\.\d{3}", overhead)
        assert 0 < float(overhead) < elapsed_ms
        shares.append(float(overhead) / elapsed_ms)
    # 24 steps of an engine are most of it.
    assert min(shares) < 0.5


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/v1/models", None, 200),
        ("GET", "/health/live", None, 200),
        ("GET", "/metrics", None, 200),
        ("GET", "/nothing", None, 404),
        ("DELETE", "/v1/models", None, 405),
        ("POST", "/v1/completions", {"prompt": "x", "nonsense": 1}, 400),
        ("POST", "/v1/completions", {"prompt": "x", "model": "other"}, 404),
        ("POST", "/v1/completions", {"prompt": "x" * 1000}, 400),
        ("POST", "/v1/completions", {"prompt": "x" * LIMIT}, 413),
        ("POST", "/v1/completions", {"prompt": "x", "penstock": {"deadline_s": 1e-9}}, 504),
        ("POST", "/v1/completions", {"prompt": "x", "max_tokens": 1, "stream": True}, 200),
    ],
)
def test_every_answer_says_who_it_answers_and_what_it_cost(
    server: RunningServer, method: str, path: str, body: Any, status: int
) -> None:
    headers = {"x-request-id": "mine.1:2-3_4", "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
    response = httpx.request(method, server.url + path, json=body, headers=headers)
    assert response.status_code == status
    assert response.headers.get_list("x-request-id") == ["mine.1:2-3_4"]
    assert float(response.headers["x-penstock-overhead-ms"]) > 0
    assert re.fullmatch(f"00-{TRACE}-[0-9a-f]{{16}}-01", response.headers["traceparent"])


def test_the_summary_holds_the_ids_and_not_the_prompt(server: RunningServer) -> None:
    headers = {"x-request-id": "in-the-log", "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
    with capture_logs() as logs:
        httpx.post(f"{server.url}/v1/completions", json={**BODY, "prompt": "a secret"}, headers=headers)
        other = httpx.post(f"{server.url}/v1/completions", json=BODY, headers={"traceparent": "nonsense"})
        ids = ("in-the-log", other.headers["x-request-id"])
        # The summary is written once the answer has been sent, which its reader may see before: others' come here too.
        while len(summaries := {event["request_id"]: event for event in logs if event.get("request_id") in ids}) < 2:
            httpx.get(f"{server.url}/ping")
    traced, untraced = (summaries[request_id] for request_id in ids)
    assert (traced["request_id"], traced["trace_id"]) == ("in-the-log", TRACE)
    assert (traced["status"], traced["num_output_tokens"], traced["finish_reason"]) == (200, 24, "length")
    assert traced["timeline"]["num_output_tokens"] == 24
    assert "secret" not in str(logs)
    assert "trace_id" not in untraced


@pytest.mark.parametrize(
    "offered", [b"two words", b"a" * 129, b"<script>", b'"', b"\xc3\xa9", b"a,b", b"a%0d%0aset-cookie:x"]
)
def test_ids_that_could_hurt_are_replaced(server: RunningServer, offered: bytes) -> None:
    response = httpx.get(f"{server.url}/version", headers={b"x-request-id": offered})
    assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])


@pytest.mark.parametrize("traceparent", ["", "nonsense", f"00-{TRACE}-00f067aa0ba902b7-01-x", "x" * 10_000])
def test_a_broken_trace_is_no_error(server: RunningServer, traceparent: str) -> None:
    response = httpx.get(f"{server.url}/version", headers={"traceparent": traceparent})
    assert response.status_code == 200
    assert "traceparent" not in response.headers


def test_a_client_that_sends_too_much_reads_why(server: RunningServer) -> None:
    body = b"x" * (20 * LIMIT)
    for _ in range(5):
        with connect(server) as connection:
            connection.sendall(head("/v1/completions", f"content-length: {len(body)}") + body)
            answer = read_to_end(connection)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"request_too_large" in answer
    assert is_well(server)


def test_a_chunked_body_is_cut_off_at_the_limit(server: RunningServer) -> None:
    with connect(server) as connection:
        connection.sendall(head("/v1/completions", "transfer-encoding: chunked"))
        for _ in range(3 * LIMIT // 10_000):
            connection.sendall(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
        # It is refused although its end never came.
        answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 413 ")
    assert is_well(server)


def test_a_chunked_body_within_the_limit_is_read(server: RunningServer) -> None:
    def pieces() -> Iterator[bytes]:
        raw = json.dumps(BODY).encode()
        for start in range(0, len(raw), 7):
            yield raw[start : start + 7]

    response = httpx.post(
        f"{server.url}/v1/completions", content=pieces(), headers={"content-type": "application/json"}
    )
    assert response.status_code == 200


def test_nobody_is_told_to_go_on_with_a_body_that_is_too_large(server: RunningServer) -> None:
    with connect(server) as connection:
        connection.sendall(head("/v1/completions", f"content-length: {LIMIT + 1}", "expect: 100-continue"))
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")
    raw = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    with connect(server) as connection:
        connection.sendall(
            head("/v1/completions", f"content-length: {len(raw)}", "expect: 100-continue", "connection: close")
        )
        assert connection.recv(65536).startswith(b"HTTP/1.1 100 ")
        connection.sendall(raw)
        assert read_to_end(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("how", ["content-length: 1000", "transfer-encoding: chunked"])
def test_a_client_that_leaves_before_its_body_ends_is_499_in_the_log(server: RunningServer, how: str) -> None:
    with capture_logs() as logs:
        with connect(server) as connection:
            connection.sendall(head("/v1/completions", how, "x-request-id: left-early") + b'5\r\n{"pro\r\n')
        while not logs:  # what ended the request is on another thread; the test's own timeout bounds it
            os.sched_yield()
    (event,) = [event for event in logs if event.get("request_id") == "left-early"]
    assert event["status"] == 499
    assert is_well(server)


def test_no_body_at_all_is_the_callers_fault(server: RunningServer) -> None:
    with connect(server) as connection:
        connection.sendall(head("/v1/completions", "content-length: 0", "connection: close"))
        answer = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"the body is missing" in answer


def test_a_body_where_none_belongs_is_ignored(server: RunningServer) -> None:
    assert httpx.request("GET", f"{server.url}/v1/models", content=b"x" * 10).status_code == 200
