"""Talk to an OpenAI-compatible server: ours or anybody's."""

import json
import math
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
from penstock.http.sse import Event, EventReader

_CONNECT_TIMEOUT_S = 10.0
_SILENCE_TIMEOUT_S = 600.0
"""A queued request may wait long for its first token; longer than this and nobody is there."""
_MAX_EVENT_BYTES = 16 << 20
"""Log probabilities and long answers in one piece make an event large; this one is a fault."""
_DONE = b"[DONE]"


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
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def model_names(self) -> list[str]:
        """Return the names the server lists, its default first."""
        body = await self._get("/models")
        try:
            return [str(model["id"]) for model in body["data"]]
        except (LookupError, TypeError) as error:
            raise self._not_understood(error) from error

    async def first_model_name(self) -> str:
        """Return the name of the server's default model. Raises UnavailableError where it serves none."""
        names = await self.model_names()
        if not names:
            raise UnavailableError(f"{self.base_url} lists no models; name one with --model")
        return names[0]

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """POST ``body`` and yield each event's JSON until ``[DONE]``; closing early disconnects."""
        assert self._session is not None
        has_begun = False
        try:
            async with self._session.post(self.base_url + path, json={**body, "stream": True}) as response:
                if response.status != 200:
                    raise self._refusal(response.status, await response.text(errors="replace"), response.headers)
                has_begun = True
                reader = EventReader(_MAX_EVENT_BYTES)
                async for piece in response.content.iter_any():
                    for event in reader.feed(piece):
                        if event.data == _DONE:
                            return
                        yield self._content(event)
                if any(event.data == _DONE for event in reader.end()):
                    return
        except (aiohttp.ClientError, TimeoutError) as error:
            raise (self._broken_off(error) if has_begun else self._unreachable(error)) from error
        except ValueError as error:
            # Before that it is an address that names no host.
            raise (self._not_understood(error) if has_begun else self._unreachable(error)) from error
        raise self._broken_off(None)

    def _content(self, event: Event) -> dict[str, Any]:
        """Return an event's JSON. Raises the error it carries, or ``ValueError`` if it is none of a stream's events."""
        try:
            content = json.loads(event.data)
        except RecursionError:
            raise ValueError("an event nested too deeply") from None
        if not isinstance(content, dict):
            raise ValueError(f"an event that holds {type(content).__name__}")
        if content.get("error") is not None or event.name == "error":
            raise self._refusal(None, event.data.decode(errors="replace"), {})
        return content

    async def _get(self, path: str) -> Any:
        assert self._session is not None
        try:
            async with self._session.get(self.base_url + path) as response:
                text = await response.text(errors="replace")
                if response.status != 200:
                    raise self._refusal(response.status, text, response.headers)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise self._unreachable(error) from error
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._not_understood(error) from error

    def _unreachable(self, error: Exception) -> UnavailableError:
        return UnavailableError(
            f"no OpenAI-compatible server answers at {self.base_url} ({_reason(error)}); "
            "check the address, or start one with `penstock serve`"
        )

    def _not_understood(self, error: Exception) -> UnavailableError:
        return UnavailableError(
            f"what answers at {self.base_url} does not speak OpenAI's API ({_reason(error)}); check the address"
        )

    def _broken_off(self, error: Exception | None) -> UnavailableError:
        reason = "" if error is None else f" ({_reason(error)})"
        return UnavailableError(f"{self.base_url} ended the stream before it was done{reason}; see the server's log")

    def _refusal(self, status: int | None, text: str, headers: Mapping[str, str]) -> PenstockError:
        """Return the server's own error where it is one of ours, else the nearest by status; None: within a stream."""
        try:
            error = json.loads(text)["error"]
            code, message, param = error.get("code"), error.get("message") or text, error.get("param")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            code, message, param = None, text[:200] or "no message", None
        param = None if param is None else str(param)
        retry_after_s = _seconds(headers.get("retry-after", ""))
        known = error_from_code(str(code), str(message), param=param, retry_after_s=retry_after_s)
        if known.code == code:
            return known
        kind: type[PenstockError] = UnavailableError
        if status == 429:
            kind = Overloaded
        elif status == 404:
            kind = ModelNotFound
        elif status is not None and 400 <= status < 500:
            kind = InvalidRequest
        answered = "broke off its answer" if status is None else f"answered {status}"
        return kind(f"{self.base_url} {answered}: {message}", param=param, retry_after_s=retry_after_s)


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _seconds(retry_after: str) -> float | None:
    """Return what a Retry-After header says in seconds; its other form, a date, is left alone."""
    try:
        seconds = float(retry_after)
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def api_root(url: str) -> str:
    """Return ``url`` without a trailing slash, with ``/v1`` where it has no path."""
    trimmed = url.rstrip("/")
    _, _, rest = trimmed.partition("://")
    return trimmed if "/" in rest else f"{trimmed}/v1"
