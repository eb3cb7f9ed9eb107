"""Tokens of text, and text of tokens, as vLLM names the routes."""

from fastapi import FastAPI
from starlette.responses import Response

from penstock.errors import InvalidRequest
from penstock.server.api import API
from penstock.server.prepare import check_model
from penstock.server.rendering import off_loop
from penstock.server.replies import ERRORS, json_response
from penstock.server.schemas import DetokenizeRequest, TokenizeChatRequest, TokenizeRequest


def add_tokenizing(app: FastAPI, api: API) -> None:
    """Add the routes."""

    @app.post("/tokenize", responses=ERRORS)
    async def tokenize(body: TokenizeRequest) -> Response:
        """Return the tokens of a prompt or a conversation."""
        check_model(body.model, api.names)
        if isinstance(body, TokenizeChatRequest):
            tokens = (await api.conversation(body)).token_ids
        else:
            tokens = (await api.text_tokens([body.prompt], add_special_tokens=body.add_special_tokens))[0]
        strings = None
        if body.return_token_strs:
            strings = await off_loop(lambda: [api.tokenizer.token_text(token_id) for token_id in tokens], len(tokens))
        return json_response(
            {
                "count": len(tokens),
                "max_model_len": api.client.model().max_model_tokens,
                "tokens": tokens,
                "token_strs": strings,
            }
        )

    @app.post("/detokenize", responses=ERRORS)
    async def detokenize(body: DetokenizeRequest) -> Response:
        """Return the text of tokens."""
        check_model(body.model, api.names)
        vocab_size = api.client.model().vocab_size
        if max(body.tokens, default=0) >= vocab_size:
            raise InvalidRequest(
                f"token id {max(body.tokens)} is not in the vocabulary: ids go from 0 to {vocab_size - 1}",
                param="tokens",
            )
        text = await off_loop(lambda: api.tokenizer.decode(body.tokens), len(body.tokens))
        return json_response({"prompt": text})
