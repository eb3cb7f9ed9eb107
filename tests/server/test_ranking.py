"""Scores and rankings by the likelihood of a query after a document."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from penstock.server.routes.ranking import _BEFORE_DOCUMENT, _BEFORE_QUERY
from penstock.text import Tokenizer
from tests.servers import RunningServer
from tests.tiny_models import reference_logits

QUERY = "where is f?"
DOCUMENTS = ["def f(x):", "import os, sys", "", "class A: pass"]


@pytest.fixture
def path(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("llama")


def expected(path: Path, query: str, document: str) -> float:
    """The geometric mean of the probabilities of the query's tokens."""
    tokenizer = Tokenizer.load(path)
    context = tokenizer.encode(_BEFORE_DOCUMENT + document + _BEFORE_QUERY, add_special_tokens=True)
    tokens = context + tokenizer.encode(query, add_special_tokens=False)
    values = torch.log_softmax(reference_logits(path, tokens).double(), dim=-1)
    picked = [float(values[i - 1, tokens[i]]) for i in range(len(context), len(tokens))]
    return math.exp(sum(picked) / len(picked))


def post(server: RunningServer, route: str, **body: Any) -> dict[str, Any]:
    response = httpx.post(server.url + route, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_scores_are_the_models(server: RunningServer, path: Path) -> None:
    answer = post(server, "/v1/score", model="tiny", text_1=QUERY, text_2=DOCUMENTS)
    assert (answer["object"], answer["model"]) == ("list", "tiny")
    assert [one["index"] for one in answer["data"]] == [0, 1, 2, 3]
    for one, document in zip(answer["data"], DOCUMENTS, strict=True):
        assert one["object"] == "score"
        assert one["score"] == pytest.approx(expected(path, QUERY, document), rel=1e-3)
    usage = answer["usage"]
    frame = len(_BEFORE_DOCUMENT + _BEFORE_QUERY + QUERY)
    assert usage["prompt_tokens"] == usage["total_tokens"] == sum(frame + len(document) for document in DOCUMENTS)


def test_pairs(server: RunningServer, path: Path) -> None:
    queries = ["one", "another", "one", "third"]
    answer = post(server, "/score", text_1=queries, text_2=DOCUMENTS)
    scores = [one["score"] for one in answer["data"]]
    assert scores == pytest.approx([expected(path, *pair) for pair in zip(queries, DOCUMENTS, strict=True)], rel=1e-3)
    assert len(post(server, "/v1/score", text_1="a", text_2="b")["data"]) == 1
    assert len(post(server, "/v1/score", text_1=["a"], text_2=["b", "c"])["data"]) == 2


def test_ranking(server: RunningServer, path: Path) -> None:
    scores = [expected(path, QUERY, document) for document in DOCUMENTS]
    order = sorted(range(4), key=lambda i: -scores[i])
    answer = post(server, "/v1/rerank", model="tiny", query=QUERY, documents=DOCUMENTS)
    results = answer["results"]
    assert [one["index"] for one in results] == order
    assert [one["relevance_score"] for one in results] == pytest.approx([scores[i] for i in order], rel=1e-3)
    assert [one["document"]["text"] for one in results] == [DOCUMENTS[i] for i in order]
    as_objects = [{"text": document} for document in DOCUMENTS]
    for route in ("/rerank", "/v2/rerank"):
        few = post(server, route, query=QUERY, documents=as_objects, top_n=2, return_documents=False)["results"]
        assert [one["index"] for one in few] == order[:2]
        assert "document" not in few[0]
    assert len(post(server, "/v1/rerank", query=QUERY, documents=DOCUMENTS, top_n=9)["results"]) == 4


def test_a_document_is_read_once_for_all_queries(server: RunningServer, path: Path) -> None:
    document = "a document that nobody else reads " * 8
    first = post(server, "/v1/score", text_1="first?", text_2=document)
    again = post(server, "/v1/score", text_1="a second question", text_2=document)
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] < 16
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= len(document)
    assert again["data"][0]["score"] == pytest.approx(expected(path, "a second question", document), rel=1e-3)


def test_documents_are_cut_if_asked(server: RunningServer, path: Path) -> None:
    long = "x" * 900
    refused = httpx.post(f"{server.url}/v1/rerank", json={"query": QUERY, "documents": ["a", long]})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "documents.1"
    (one,) = post(server, "/v1/rerank", query=QUERY, documents=[long], max_tokens_per_doc=10)["results"]
    assert one["relevance_score"] == pytest.approx(expected(path, QUERY, long[:10]), rel=1e-3)


def test_through_openais_client(client: openai.OpenAI, path: Path) -> None:
    answer = client.post(
        "/rerank", cast_to=object, body={"model": "tiny", "query": QUERY, "documents": DOCUMENTS, "top_n": 1}
    )
    assert isinstance(answer, dict)
    assert answer["results"][0]["relevance_score"] == pytest.approx(
        max(expected(path, QUERY, document) for document in DOCUMENTS), rel=1e-3
    )


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["c"]}, "text_1"),
        ("/v1/score", {"text_1": "", "text_2": "c"}, "text_1"),
        ("/v1/score", {"text_1": "a", "text_2": []}, "text_2"),
        ("/v1/score", {"text_1": "a", "text_2": ["b"] * 3000}, "text_2"),
        ("/v1/score", {"text_1": "a"}, "text_2"),
        ("/v1/rerank", {"query": "", "documents": ["a"]}, "query"),
        ("/v1/rerank", {"query": "a", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "top_n": 0}, "top_n"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "rank_fields": ["x"]}, "rank_fields"),
        ("/v1/rerank", {"query": "a", "documents": [{"title": "x"}]}, "documents.0.text"),
    ],
)
def test_what_is_wrong_is_named(server: RunningServer, route: str, body: dict[str, Any], param: str) -> None:
    answer = httpx.post(server.url + route, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
