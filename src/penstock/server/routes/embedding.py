"""OpenAI's embeddings: a prompt's hidden states, pooled into one vector."""

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from fastapi import FastAPI, Request
from pydantic import Field
from starlette.responses import Response

from penstock.errors import InvalidRequest
from penstock.protocol import Pooling
from penstock.server.api import API
from penstock.server.prepare import check_model
from penstock.server.prompts import PromptsRequest, read_prompts
from penstock.server.rendering import off_loop
from penstock.server.replies import ERRORS, json_response
from penstock.server.schemas import Prompt

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class EmbeddingsRequest(PromptsRequest):
    """POST /v1/embeddings."""

    input: Prompt
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    pooling: Pooling | None = None
    normalize: bool = True
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = Field(None, ge=-1, lt=2**31)


def add_embedding(app: FastAPI, api: API) -> None:
    """Add the route."""

    @app.post("/v1/embeddings", responses=ERRORS)
    async def embeddings(body: EmbeddingsRequest, request: Request) -> Response:
        """Return a vector for each text."""
        check_model(body.model, api.names)
        info = api.client.model()
        size = info.hidden_size if body.dimensions is None else body.dimensions
        if size > info.hidden_size:
            raise InvalidRequest(
                f"dimensions is {size} and this model's vectors have {info.hidden_size} numbers; ask for no more",
                param="dimensions",
            )
        prompts = await api.prompts(
            body.input, param="input", most=api.config.max_inputs, add_special_tokens=body.add_special_tokens
        )
        readings = await read_prompts(
            api,
            request,
            body,
            [_truncated(token_ids, body.truncate_prompt_tokens, info.max_model_tokens) for token_ids in prompts],
            kind="embd",
            param="input",
            pooling=body.pooling or info.pooling,
        )
        pooled = [delta.embedding or b"" for delta in readings.deltas]
        vectors = await off_loop(lambda: _encoded(pooled, size, body), len(pooled) * size)
        data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)]
        return json_response({"object": "list", "data": data, "model": readings.model, **readings.ends})


def _truncated(token_ids: list[int], wanted: int | None, most: int) -> list[int]:
    """Return the end of a prompt, as long as is wanted; -1: as the model holds."""
    if wanted is None:
        return token_ids
    if wanted == 0:
        raise InvalidRequest("truncate_prompt_tokens is 0, which would leave nothing", param="truncate_prompt_tokens")
    return token_ids[-(most if wanted < 0 else wanted) :]


def _encoded(pooled: Sequence[bytes], size: int, body: EmbeddingsRequest) -> list[Any]:
    """Return each vector as it goes into the answer."""
    # A server that nobody asks for vectors does without.
    import numpy as np

    vectors = [_shaped(np.frombuffer(one, dtype="<f4"), size, normalize=body.normalize) for one in pooled]
    if body.encoding_format == "base64":
        return [base64.b64encode(vector.tobytes()).decode() for vector in vectors]
    return [msgspec.Raw(msgspec.json.encode(vector.tolist())) for vector in vectors]


def _shaped(vector: "npt.NDArray[np.float32]", size: int, *, normalize: bool) -> "npt.NDArray[np.float32]":
    """Return the first ``size`` numbers, at length 1 if they are to be."""
    part = vector[:size]
    if not normalize:
        return part
    import numpy as np

    length = float(np.linalg.norm(part.astype(np.float64)))
    return (part / max(length, 1e-12)).astype("<f4")
