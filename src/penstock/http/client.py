"""Talk to an OpenAI-compatible server: ours or anybody's."""

import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Self

import aiohttp

from penstock.errors import (
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    PenstockError,
    UnavailableError,
    error_from_code,
)

_CONNECT_TIMEOUT_S = 10.0
_SILENCE_TIMEOUT_S = 600.0
"""A queued request may wait long for its first token; longer than this and nobody is there."""
_LINE_BYTES = 1 << 20
"""One event of a stream is one line; log probabilities make it long."""


class OpenAIClient:
    """One server under ``/v1``. Use as an async context manager; everything raises ``PenstockError`` only."""

    def __init__(self, base_url: str, *, api_key: str | None = None) -> None:
        """``base_url`` with or without a path; without one, ``/v1`` is meant."""
        self.base_url = api_root(base_url)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=None, connect=_CONNECT_TIMEOUT_S, sock_read=_SILENCE_TIMEOUT_S)
        # The load driver decides how many requests are under way; a connection limit here would queue them unseen.
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            timeout=timeout,
            connector=aiohttp.TCPConnector(limit=0),
            read_bufsize=_LINE_BYTES,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def model_names(self) -> list[str]:
        """Return the names the server lists, its default first."""
        body = await self._get("/models")
        return [str(model["id"]) for model in body.get("data", [])]

    async def first_model_name(self) -> str:
        """Return the name of the server's default model. Raises UnavailableError where it serves none."""
        names = await self.model_names()
        if not names:
            raise UnavailableError(f"{self.base_url} lists no models; name one with --model")
        return names[0]

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """POST ``body`` and yield each event's JSON until ``[DONE]``; closing early disconnects."""
        assert self._session is not None
        try:
            async with self._session.post(self.base_url + path, json={**body, "stream": True}) as response:
                if response.status != 200:
                    raise self._refusal(response.status, await response.text())
                async for line in response.content:
                    if not line.startswith(b"data:"):
                        continue
                    data = line[len(b"data:") :].strip()
                    if data == b"[DONE]":
                        return
                    event = json.loads(data)
                    if "error" in event:
                        raise self._refusal(response.status, data.decode())
                    yield event
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise self._unreachable(error) from error
        raise UnavailableError(f"{self.base_url} ended the stream before it was done; see the server's log")

    async def _get(self, path: str) -> Any:
        assert self._session is not None
        try:
            async with self._session.get(self.base_url + path) as response:
                text = await response.text()
                if response.status != 200:
                    raise self._refusal(response.status, text)
                return json.loads(text)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> UnavailableError:
        reason = str(error) or type(error).__name__
        return UnavailableError(
            f"no OpenAI-compatible server answers at {self.base_url} ({reason}); "
            "check the address, or start one with `penstock serve`"
        )

    def _refusal(self, status: int, text: str) -> PenstockError:
        """Return the server's own error where it is one of ours, else the nearest by status."""
        try:
            error = json.loads(text)["error"]
            code, message, param = error.get("code"), error.get("message") or text, error.get("param")
        except (ValueError, LookupError, TypeError, AttributeError):
            code, message, param = None, text[:200] or "no message", None
        known = error_from_code(str(code), str(message), param=param)
        if known.code == code:
            return known
        kind: type[PenstockError] = UnavailableError
        if status == 429:
            kind = Overloaded
        elif status == 404:
            kind = ModelNotFound
        elif 400 <= status < 500:
            kind = InvalidRequest
        return kind(f"{self.base_url} answered {status}: {message}", param=param)


def api_root(url: str) -> str:
    """Return ``url`` without a trailing slash, with ``/v1`` where it has no path."""
    trimmed = url.rstrip("/")
    _, _, rest = trimmed.partition("://")
    return trimmed if "/" in rest else f"{trimmed}/v1"
