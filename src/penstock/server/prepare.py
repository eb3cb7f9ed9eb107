"""From a client's parameters to what an engine takes, checking what the wire schema cannot."""

from typing import TypeVar

from penstock.errors import ContextTooLong, InvalidRequest, ModelNotFound
from penstock.protocol import GenerateRequest, ModelInfo, Picture, Priority, SamplingParams
from penstock.server.choosing import beam_params, num_followed
from penstock.server.config import ServerConfig
from penstock.server.schemas import ChatCompletionRequest, CompletionRequest
from penstock.text import Tokenizer

T = TypeVar("T")

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for /v1/completions."""


def check_model(name: str | None, names: tuple[str, ...]) -> str:
    """Return the name to answer under. Raises ``ModelNotFound``."""
    if name is None or name in names:
        return name or names[0]
    raise ModelNotFound(f"there is no model {name!r} here; this server has {', '.join(names)}", param="model")


def generate_request(
    body: CompletionRequest | ChatCompletionRequest,
    prompt_token_ids: list[int],
    *,
    request_id: str,
    model: ModelInfo,
    config: ServerConfig,
    grammar: str | None = None,
    keeps_special_tokens: bool = False,
    bad_words: tuple[tuple[int, ...], ...] = (),
    adapter: str | None = None,
    pictures: tuple[Picture, ...] = (),
) -> GenerateRequest:
    """Return the engine's request for one prompt.

    ``grammar`` is what answers are held to, and has been checked. ``keeps_special_tokens`` leaves them in the text
    whatever ``body`` says, for whoever reads the answer needs them. ``bad_words`` are those of ``body`` as tokens.
    ``adapter`` is the loaded one that ``body`` names as its model. ``pictures`` are the prompt's.
    Raises ``InvalidRequest`` or ``ContextTooLong`` naming the parameter at fault.
    """
    room = model.max_model_tokens - len(prompt_token_ids)
    longest = config.max_prompt_tokens
    prompt_param = "messages" if isinstance(body, ChatCompletionRequest) else "prompt"
    if not prompt_token_ids:
        raise InvalidRequest("the prompt is empty: it must hold at least one token", param=prompt_param)
    if longest is not None and len(prompt_token_ids) > longest:
        raise ContextTooLong(
            f"the prompt has {len(prompt_token_ids)} tokens and this server takes {longest}; shorten it",
            param=prompt_param,
        )
    if room < 1:
        raise ContextTooLong(
            f"the prompt has {len(prompt_token_ids)} tokens and this model holds {model.max_model_tokens}, prompt and "
            "answer together; shorten it",
            param=prompt_param,
        )
    max_tokens_param = "max_tokens"
    if isinstance(body, ChatCompletionRequest):
        if body.max_completion_tokens is not None:
            max_tokens_param = "max_completion_tokens"
        max_tokens = body.max_completion_tokens or body.max_tokens or room
        logprobs = _chat_logprobs(body)
    else:
        if body.max_tokens == 0 and not body.echo:
            raise InvalidRequest("max_tokens is 0, which only echo has a use for", param="max_tokens")
        default = min(DEFAULT_COMPLETION_TOKENS, room)
        # To look at a prompt the engine has to say one token; the answer leaves it out.
        max_tokens = default if body.max_tokens is None else max(1, body.max_tokens)
        logprobs = body.logprobs
    if max_tokens > room:
        raise ContextTooLong(
            f"{len(prompt_token_ids)} prompt tokens and {max_tokens} to generate are more than the "
            f"{model.max_model_tokens} this model holds; shorten the prompt or lower {max_tokens_param}",
            param=max_tokens_param,
        )
    options = body.penstock
    return GenerateRequest(
        request_id=request_id,
        prompt_token_ids=prompt_token_ids,
        sampling=_sampling(body, max_tokens, logprobs, model, config, grammar, keeps_special_tokens, bad_words),
        priority=Priority[options.priority],
        deadline_s=options.deadline_s,
        tenant=options.tenant,
        cache_salt=body.cache_salt,
        adapter=adapter,
        pictures=pictures,
    )


def truncated(
    body: CompletionRequest | ChatCompletionRequest,
    prompt_token_ids: list[int],
    most: int,
    *,
    has_pictures: bool = False,
) -> list[int]:
    """Return the end of a prompt, as long as ``body`` wants it; ``most`` tokens are what a model holds."""
    wanted = body.truncate_prompt_tokens
    if wanted is None:
        return prompt_token_ids
    if has_pictures:
        raise InvalidRequest(
            "truncate_prompt_tokens could cut an image in two; leave it out where there are images",
            param="truncate_prompt_tokens",
        )
    if wanted == 0:
        raise InvalidRequest("truncate_prompt_tokens is 0, which would leave nothing", param="truncate_prompt_tokens")
    if wanted < 0:
        in_chat = body.max_completion_tokens if isinstance(body, ChatCompletionRequest) else None
        wanted = max(1, most - max(1, in_chat or body.max_tokens or DEFAULT_COMPLETION_TOKENS))
    return prompt_token_ids[-wanted:]


def bad_word_tokens(words: list[str] | None, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Return the ways in which ``words`` may begin as tokens: as they are, and after a space."""
    found: dict[tuple[int, ...], None] = {}
    for word in words or ():
        for spelled in (word, f" {word.lstrip()}"):
            token_ids = tuple(tokenizer.encode(spelled, add_special_tokens=False))
            if token_ids:
                found[token_ids] = None
    return tuple(found)


def _chat_logprobs(body: ChatCompletionRequest) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def _sampling(
    body: CompletionRequest | ChatCompletionRequest,
    max_tokens: int,
    logprobs: int | None,
    model: ModelInfo,
    config: ServerConfig,
    grammar: str | None,
    keeps_special_tokens: bool,
    bad_words: tuple[tuple[int, ...], ...],
) -> SamplingParams:
    beam = beam_params(body, config, grammar)
    num_drawn = num_followed(body, config) if beam is None else body.num_choices
    if logprobs is not None and logprobs > config.max_logprobs:
        param = "top_logprobs" if isinstance(body, ChatCompletionRequest) else "logprobs"
        raise InvalidRequest(f"{param} is {logprobs}; this server gives at most {config.max_logprobs}", param=param)
    prompt_logprobs = body.prompt_logprobs if isinstance(body, CompletionRequest) else None
    if isinstance(body, CompletionRequest) and body.echo and logprobs is not None:
        prompt_logprobs = max(logprobs, prompt_logprobs or 0)
    if prompt_logprobs is not None and prompt_logprobs > config.max_logprobs:
        raise InvalidRequest(
            f"prompt_logprobs is {prompt_logprobs}; this server gives at most {config.max_logprobs}",
            param="prompt_logprobs",
        )
    if body.min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens is {body.min_tokens} and at most {max_tokens} tokens may come; lower it", param="min_tokens"
        )
    if grammar is not None and body.ignore_eos:
        raise InvalidRequest(
            "ignore_eos cannot be had where the answer must match a grammar, which says where it ends; leave it out",
            param="ignore_eos",
        )
    logit_bias = {int(token_id): bias for token_id, bias in (body.logit_bias or {}).items()}
    for name, ids in (
        ("logit_bias", logit_bias),
        ("stop_token_ids", body.stop_token_ids or ()),
        ("allowed_token_ids", body.allowed_token_ids or ()),
    ):
        for token_id in ids:
            if token_id >= model.vocab_size:
                raise InvalidRequest(
                    f"token id {token_id} is not in the vocabulary: ids go from 0 to {model.vocab_size - 1}", param=name
                )
    suggested = model.sampling
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        n=num_drawn,
        beam=beam,
        temperature=_first(body.temperature, suggested.temperature),
        top_k=max(_first(body.top_k, suggested.top_k), 0),
        top_p=_first(body.top_p, suggested.top_p),
        min_p=_first(body.min_p, suggested.min_p),
        repetition_penalty=_first(body.repetition_penalty, suggested.repetition_penalty),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=logit_bias,
        typical_p=1.0 if body.typical_p is None else body.typical_p,
        allowed_token_ids=None if body.allowed_token_ids is None else tuple(body.allowed_token_ids),
        bad_words=bad_words,
        seed=body.seed,
        stop=_stop_strings(body.stop, config),
        include_stop_str_in_output=body.include_stop_str_in_output,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=body.ignore_eos,
        # The likeliest are to be found.
        logprobs=0 if logprobs is None and num_drawn > body.num_choices else logprobs,
        prompt_logprobs=prompt_logprobs,
        skip_special_tokens=body.skip_special_tokens and not keeps_special_tokens,
        grammar=grammar,
        # Somebody may run a call that was cut, so nothing is made up for it: it stays one that cannot be read.
        completes_grammar=grammar is not None and not (isinstance(body, ChatCompletionRequest) and body.may_call),
    )


def _first(asked: T | None, suggested: T) -> T:
    return suggested if asked is None else asked


def _stop_strings(stop: str | list[str] | None, config: ServerConfig) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(strings) > config.max_stop_strings:
        raise InvalidRequest(
            f"there are {len(strings)} stop strings; this server takes at most {config.max_stop_strings}", param="stop"
        )
    for string in strings:
        if not string:
            raise InvalidRequest("a stop string is empty; leave it out", param="stop")
        if len(string) > config.max_stop_chars:
            raise InvalidRequest(
                f"a stop string has {len(string)} characters; this server takes at most {config.max_stop_chars}",
                param="stop",
            )
    return strings
