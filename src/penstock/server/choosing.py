"""More choices than are returned: beam search, and the likeliest of those that were drawn."""

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import msgspec

from penstock.errors import InvalidRequest
from penstock.protocol import BeamParams, TokenDelta
from penstock.server.config import ServerConfig
from penstock.server.schemas import ChatCompletionRequest, CompletionRequest
from penstock.server.streaming import Deltas

_DRAWING: dict[str, tuple[Any, ...]] = {
    "temperature": (0,),
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "typical_p": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "min_tokens": (0,),
    "prompt_logprobs": (),
}
"""Parameters that a search for the likeliest text has no use for -> values, beside null, that ask for nothing."""


def num_followed(body: CompletionRequest | ChatCompletionRequest, config: ServerConfig) -> int:
    """Return how many choices are drawn, or beams followed, for one prompt. Raises ``InvalidRequest``."""
    count = body.num_choices if body.best_of is None else body.best_of
    name = "n" if body.best_of is None else "best_of"
    if count > config.max_choices:
        raise InvalidRequest(f"{name} is {count}; this server makes at most {config.max_choices} choices", param=name)
    if count < body.num_choices:
        raise InvalidRequest(f"best_of is {count} and n is {body.num_choices}: it cannot be less", param="best_of")
    if body.stream and (body.use_beam_search or count > body.num_choices):
        cause = "use_beam_search" if body.use_beam_search else "best_of"
        raise InvalidRequest(f"{cause} decides at the end what is returned, so it cannot be streamed", param="stream")
    return count


def beam_params(
    body: CompletionRequest | ChatCompletionRequest, config: ServerConfig, grammar: str | None
) -> BeamParams | None:
    """Return how to search, if ``body`` asks for it. Raises ``InvalidRequest`` for what does not go with it."""
    if not body.use_beam_search:
        for name, asks in (
            ("length_penalty", body.length_penalty not in (None, 1)),
            ("early_stopping", bool(body.early_stopping)),
        ):
            if asks:
                raise InvalidRequest(f"{name} needs use_beam_search to be true", param=name)
        return None
    for name, nothing in _DRAWING.items():
        value = getattr(body, name, None)
        if value is not None and value not in nothing:
            raise InvalidRequest(f"use_beam_search looks for the likeliest text; leave out {name}", param=name)
    if isinstance(body, CompletionRequest) and body.echo and body.logprobs is not None:
        raise InvalidRequest("use_beam_search gives no log probabilities of the prompt; leave out echo", param="echo")
    if grammar is not None:
        raise InvalidRequest(
            "use_beam_search cannot be had where the answer must match a grammar; leave it out", param="use_beam_search"
        )
    return BeamParams(
        width=num_followed(body, config),
        length_penalty=1.0 if body.length_penalty is None else body.length_penalty,
        early_stopping=body.early_stopping or False,
    )


async def likeliest(
    deltas: Deltas, num_drawn: int, num_wanted: int, *, keeps_logprobs: bool
) -> AsyncGenerator[tuple[int, TokenDelta], None]:
    """Yield the ``num_wanted`` of each prompt's ``num_drawn`` choices whose tokens are likeliest on average.

    Each is one delta, numbered by how likely it is. What the others cost is counted with the first.
    """
    drawn: dict[int, dict[int, list[TokenDelta]]] = {}
    async with contextlib.aclosing(deltas):
        async for prompt, delta in deltas:
            choices = drawn.setdefault(prompt, {})
            choices.setdefault(delta.index, []).append(delta)
            if delta.finish_reason is None:
                continue
            if len(choices) == num_drawn and all(pieces[-1].finish_reason for pieces in choices.values()):
                whole = [_joined(drawn[prompt].pop(index)) for index in range(num_drawn)]
                for one in _chosen(whole, num_wanted, keeps_logprobs=keeps_logprobs):
                    yield prompt, one


def _joined(pieces: list[TokenDelta]) -> TokenDelta:
    """Return the deltas of one choice as one."""
    return msgspec.structs.replace(
        pieces[-1],
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(token_id for piece in pieces for token_id in piece.token_ids),
        logprobs=tuple(one for piece in pieces for one in piece.logprobs),
        prompt_logprobs=pieces[0].prompt_logprobs,
    )


def _chosen(choices: list[TokenDelta], num_wanted: int, *, keeps_logprobs: bool) -> list[TokenDelta]:
    order = sorted(choices, key=lambda one: -sum(token.chosen.logprob for token in one.logprobs) / len(one.logprobs))
    of_prompt = choices[0].prompt_logprobs
    kept = [
        msgspec.structs.replace(
            one, index=index, logprobs=one.logprobs if keeps_logprobs else (), prompt_logprobs=of_prompt
        )
        for index, one in enumerate(order[:num_wanted])
    ]
    num_others = sum(one.usage.num_output_tokens for one in order[num_wanted:] if one.usage is not None)
    first = kept[0]
    assert first.usage is not None, "the last delta of a choice carries it"
    usage = msgspec.structs.replace(first.usage, num_output_tokens=first.usage.num_output_tokens + num_others)
    return [msgspec.structs.replace(first, usage=usage), *kept[1:]]
