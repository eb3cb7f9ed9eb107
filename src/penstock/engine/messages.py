"""What crosses the border between an engine and its clients, as msgpack where the border is a process."""

import msgspec

from penstock.errors import PenstockError
from penstock.protocol import EngineStatus, ErrorInfo, GenerateRequest, ModelInfo, TokenDelta


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """Client to engine: begin a request."""

    request: GenerateRequest


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Client to engine: end a request whose client left."""

    request_id: str


class LoadAdapter(msgspec.Struct, frozen=True, tag="load_adapter"):
    """Client to engine: load a LoRA adapter; ``call`` comes back with the answer."""

    call: int
    name: str
    path: str


class UnloadAdapter(msgspec.Struct, frozen=True, tag="unload_adapter"):
    """Client to engine: forget a LoRA adapter."""

    call: int
    name: str


class Answer(msgspec.Struct, frozen=True):
    """Engine to client: what became of a call."""

    call: int
    error: ErrorInfo | None = None


class Loaded(msgspec.Struct, frozen=True, tag="loaded"):
    """Engine to client: requests are taken from now on."""

    model: ModelInfo
    status: EngineStatus


class LoadFailed(msgspec.Struct, frozen=True, tag="load_failed"):
    """Engine to client: it cannot start, and why."""

    error: ErrorInfo


class Stepped(msgspec.Struct, frozen=True, tag="stepped"):
    """Engine to client: what a step did, all requests in one message."""

    deltas: list[TokenDelta]
    status: EngineStatus
    answers: list[Answer] = []


ToEngine = Submit | Abort | LoadAdapter | UnloadAdapter
FromEngine = Loaded | LoadFailed | Stepped


def error_info(error: PenstockError) -> ErrorInfo:
    """Return an error as plain data."""
    return ErrorInfo(code=error.code, message=error.message, param=error.param, retry_after_s=error.retry_after_s)
