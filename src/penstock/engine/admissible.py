"""Which requests a model can run at all, however long they wait."""

from penstock.engine.beam import num_proposed
from penstock.errors import ContextTooLong, InvalidRequest
from penstock.protocol import GenerateRequest, ModelInfo


def require_admissible(request: GenerateRequest, model: ModelInfo) -> None:
    """Raise ``RequestError`` naming what is wrong."""
    sampling, most = request.sampling, model.max_model_tokens
    num_prompt = len(request.prompt_token_ids)
    assert sampling.max_tokens or (sampling.n == 1 and sampling.grammar is None), "nothing is generated"
    assert request.pooling is None or not sampling.max_tokens, "what is pooled generates nothing"
    if not num_prompt:
        raise InvalidRequest("the prompt is empty: it must hold at least one token", param="prompt")
    vocab_size = model.vocab_size
    beam = sampling.beam
    if beam is not None:
        assert beam.width >= sampling.n, "a search finds no more than it follows"
        assert sampling.grammar is None, "a search follows none"
        proposed = num_proposed(sampling, model.eos_token_ids)
        if proposed > vocab_size:
            raise InvalidRequest(
                f"each of {beam.width} beams proposes {proposed} tokens, and there are "
                f"{vocab_size}: lower best_of, or give fewer stop_token_ids",
                param="best_of",
            )
    low, high = min(request.prompt_token_ids), max(request.prompt_token_ids)
    if low < 0 or high >= vocab_size:
        raise InvalidRequest(
            f"token id {low if low < 0 else high} is not in the vocabulary: ids go from 0 to {vocab_size - 1}",
            param="prompt",
        )
    for name, ids in (
        ("logit_bias", sampling.logit_bias),
        ("stop_token_ids", sampling.stop_token_ids),
        ("allowed_token_ids", sampling.allowed_token_ids or ()),
        ("bad_words", [token_id for word in sampling.bad_words for token_id in word]),
    ):
        for token_id in ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidRequest(
                    f"token id {token_id} is not in the vocabulary: ids go from 0 to {vocab_size - 1}",
                    param=name,
                )
    if num_prompt + sampling.max_tokens > most:
        raise ContextTooLong(
            f"{num_prompt} prompt tokens and {sampling.max_tokens} to generate are more than the {most} this model "
            "holds: shorten the prompt or lower max_tokens",
            param="max_tokens" if num_prompt < most else "prompt",
        )
