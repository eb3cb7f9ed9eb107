"""Whether the server is well, its metrics and its version."""

from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, generate_latest
from starlette.responses import PlainTextResponse, Response

import penstock
from penstock.protocol import EngineClient, EngineState
from penstock.server.replies import json_response


def add_health(app: FastAPI, client: EngineClient, registry: CollectorRegistry) -> None:
    """Add the routes. ``registry`` is what /metrics shows."""

    async def live() -> Response:
        """Say that the process answers; depends on nothing."""
        return json_response({"status": "alive"})

    async def ready() -> Response:
        """Say whether requests are taken now, and if not why."""
        status = client.status()
        is_ready = status.state is EngineState.READY
        headers = {} if is_ready else {"retry-after": "1"}
        return json_response({"status": status.state, "reason": status.reason}, 200 if is_ready else 503, headers)

    async def health() -> Response:
        """Return everything the engine says about itself."""
        status = client.status()
        is_ready = status.state is EngineState.READY
        return json_response(status, 200 if is_ready else 503, {} if is_ready else {"retry-after": "1"})

    async def metrics() -> Response:
        """Return Prometheus metrics."""
        return PlainTextResponse(generate_latest(registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def version() -> Response:
        """Return the server's version."""
        return json_response({"version": penstock.__version__})

    unready: dict[int | str, dict[str, Any]] = {503: {"description": "Not ready; the body says why."}}
    documented = ("/health/live", "/health/ready", "/health")
    for path, answer in (
        ("/health/live", live),
        ("/health/ready", ready),
        ("/health", health),
        ("/ping", live),
        ("/healthz", live),
        ("/readyz", ready),
    ):
        app.get(path, include_in_schema=path in documented, responses={} if answer is live else unready)(answer)
        # Load balancers may ask for no body; the server that runs this leaves it out.
        app.head(path, include_in_schema=False)(answer)
    app.get("/metrics", response_class=PlainTextResponse)(metrics)
    app.get("/version")(version)
