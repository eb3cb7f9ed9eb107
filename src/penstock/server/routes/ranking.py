"""How well documents go with a query, by the likelihood of the query after each: as vLLM, Jina and Cohere name it.

The query likelihood of Ponte and Croft, "A Language Modeling Approach to Information Retrieval" (SIGIR 1998), by a
language model that reads the document first, as Sachan et al., "Improving Passage Retrieval with Zero-Shot Question
Generation" (EMNLP 2022), have it.
"""

import math
import time
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import FastAPI, Request
from pydantic import Field
from starlette.responses import Response

from penstock.errors import InvalidRequest
from penstock.server.api import API
from penstock.server.prepare import check_model
from penstock.server.prompts import PromptReadings, PromptsRequest, read_prompts
from penstock.server.replies import ERRORS, json_response
from penstock.server.strict import Strict, Text

_BEFORE_DOCUMENT = "Passage: "
_BEFORE_QUERY = "\n\nA question or request that this passage answers:\n"

_Texts = Annotated[list[Text], Field(fail_fast=True, min_length=1)]


class ScoreRequest(PromptsRequest):
    """POST /v1/score."""

    text_1: Text | _Texts
    text_2: Text | _Texts


class Document(Strict):
    """A document as an object."""

    text: Text


class RerankRequest(PromptsRequest):
    """POST /v1/rerank."""

    query: Text
    documents: Annotated[list[Text | Document], Field(fail_fast=True, min_length=1)]
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = True
    max_tokens_per_doc: int | None = Field(None, ge=1)


def add_ranking(app: FastAPI, api: API) -> None:
    """Add the routes."""

    async def score(body: ScoreRequest, request: Request) -> Response:
        """Score pairs of a query and a document: one query with every document, or pair by pair."""
        check_model(body.model, api.names)
        queries = [body.text_1] if isinstance(body.text_1, str) else body.text_1
        documents = [body.text_2] if isinstance(body.text_2, str) else body.text_2
        if len(queries) not in (1, len(documents)):
            raise InvalidRequest(
                f"text_1 has {len(queries)} texts and text_2 {len(documents)}: give one, or as many as text_2 has",
                param="text_1",
            )
        _check_count(len(documents), api, "text_2")
        if len(queries) == 1:
            queries *= len(documents)
        readings = await _read(api, request, body, queries, documents, kind="score", params=("text_1", "text_2"))
        data = [
            {"index": i, "object": "score", "score": value}
            for i, value in enumerate(map(_likelihood, _scores(readings)))
        ]
        head = {"id": readings.answer_id, "object": "list", "created": int(time.time()), "model": readings.model}
        return json_response({**head, "data": data, **readings.ends})

    async def rerank(body: RerankRequest, request: Request) -> Response:
        """Sort documents by how well each goes with the query."""
        check_model(body.model, api.names)
        _check_count(len(body.documents), api, "documents")
        documents = [one if isinstance(one, str) else one.text for one in body.documents]
        readings = await _read(
            api,
            request,
            body,
            [body.query] * len(documents),
            documents,
            kind="rerank",
            params=("query", "documents"),
            most=body.max_tokens_per_doc,
        )
        scores = _scores(readings)
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: body.top_n]
        results: list[dict[str, Any]] = [{"index": i, "relevance_score": _likelihood(scores[i])} for i in order]
        if body.return_documents:
            for result in results:
                result["document"] = {"text": documents[result["index"]]}
        head = {"id": readings.answer_id, "model": readings.model}
        return json_response({**head, "results": results, **readings.ends})

    for path in ("/v1/score", "/score"):
        app.post(path, responses=ERRORS, include_in_schema=path.startswith("/v1/"))(score)
    for path in ("/v1/rerank", "/rerank", "/v2/rerank"):
        app.post(path, responses=ERRORS, include_in_schema=path.startswith("/v1/"))(rerank)


def _check_count(count: int, api: API, param: str) -> None:
    if count > api.config.max_inputs:
        raise InvalidRequest(
            f"{param} has {count} items; this server takes at most {api.config.max_inputs} at once", param=param
        )


async def _read(
    api: API,
    request: Request,
    body: PromptsRequest,
    queries: Sequence[str],
    documents: Sequence[str],
    *,
    kind: str,
    params: tuple[str, str],
    most: int | None = None,
) -> PromptReadings:
    """Have the engine read each document, ``most`` tokens of it, and score the query after it.

    The pieces are tokenized apart, so that a query is the same tokens after every document, and a document the same
    before every query: the prefix cache then holds it for the next one.
    """
    distinct = list(dict.fromkeys(queries))
    (begin,) = await api.text_tokens([_BEFORE_DOCUMENT], add_special_tokens=True)
    middle, *spelled = await api.text_tokens([_BEFORE_QUERY, *distinct], add_special_tokens=False)
    tokens_of = dict(zip(distinct, spelled, strict=True))
    if not all(spelled):
        raise InvalidRequest(f"{params[0]} is empty: it must hold at least one token", param=params[0])
    read = await api.text_tokens(list(documents), add_special_tokens=False)
    contexts = [[*begin, *token_ids[:most], *middle] for token_ids in read]
    return await read_prompts(
        api,
        request,
        body,
        [[*context, *tokens_of[query]] for context, query in zip(contexts, queries, strict=True)],
        kind=kind,
        param=params[1],
        scored_from=[len(context) for context in contexts],
    )


def _scores(readings: PromptReadings) -> list[float]:
    """Return the mean log probability of each query's tokens."""
    return [
        sum(score.chosen.logprob for score in delta.prompt_logprobs) / len(delta.prompt_logprobs)
        for delta in readings.deltas
    ]


def _likelihood(mean_logprob: float) -> float:
    """Return the likelihood of a token of the query, in [0, 1]: the geometric mean over all of them."""
    return math.exp(min(mean_logprob, 0.0))
