"""What an operator may tell the server. Each note says what turning the value up and down does."""

from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from penstock.config import Count, Seconds

Limit = Annotated[int, msgspec.Meta(ge=0)]
"""Most of what a request may have; 0 allows none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """Where to listen and what to accept."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all interfaces."""
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes any that is free."""
    served_names: tuple[str, ...] = ()
    """Names clients may call the model by; empty: the name it was started with."""
    max_body_bytes: Count = 8 * 1024 * 1024
    """Largest request body; for a model that sees, `images.max_body_bytes` if that is more. Up: longer prompts in one
    request. Down: less memory a stranger can claim."""
    max_bodies_bytes: Count = 128 * 1024 * 1024
    """Bytes of the bodies of all requests that are read or answered; each is in memory twice, as it came and as what it
    says. Up: more images in base64 at a time. Down: earlier refusals, less memory strangers can claim."""
    max_prompt_tokens: Count | None = None
    """Longest prompt; None: as long as the model's context."""
    max_prompts: Count = 64
    """Most prompts in one completion request. Up: bigger batches by one client. Down: fairer sharing."""
    max_inputs: Count = 2048
    """Most texts in one request for embeddings, scores or a ranking; ``max_prompts`` of them run at a time. Up: fewer
    requests. Down: less work by one."""
    max_choices: Count = 16
    """Most choices (n) for one prompt. Up: more load by one request. Down: less."""
    max_stop_strings: Limit = 16
    """Most stop strings."""
    max_stop_chars: Count = 256
    """Longest stop string. Up: more text may be held back while streaming. Down: less."""
    max_logprobs: Limit = 20
    """Most alternatives per token. Up: larger answers. Down: smaller ones."""
    tool_call_parser: Literal["hermes", "llama3_json", "mistral", "mistral_args", "qwen3_coder"] | None = None
    """How the model writes calls of tools: hermes, llama3_json, mistral, mistral_args or qwen3_coder; None: as its chat
    template says."""
    max_grammar_chars: Annotated[int, msgspec.Meta(ge=1, le=131_072)] = 131_072
    """Largest schema or grammar an answer may be held to, as JSON. Up: larger ones. Down: less work a stranger can ask
    for."""
    grammar_timeout_s: Seconds = 2.0
    """How long compiling one may take. Up: more complex ones. Down: others wait less for theirs."""
    drain_timeout_s: Seconds = 30.0
    """How long shutting down waits for running requests. Up: fewer cut-off answers. Down: faster restarts."""
