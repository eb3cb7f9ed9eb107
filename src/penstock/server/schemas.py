"""What clients send, read strictly: OpenAI's parameters, vLLM's sampling extensions and our own object."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

LATER = frozenset(
    {
        "allowed_token_ids",
        "audio",
        "bad_words",
        "best_of",
        "echo",
        "function_call",
        "functions",
        "guided_choice",
        "guided_grammar",
        "guided_json",
        "guided_regex",
        "length_penalty",
        "modalities",
        "parallel_tool_calls",
        "prediction",
        "prompt_logprobs",
        "reasoning_effort",
        "service_tier",
        "store",
        "structured_outputs",
        "suffix",
        "tool_choice",
        "tools",
        "truncate_prompt_tokens",
        "typical_p",
        "use_beam_search",
        "verbosity",
        "web_search_options",
    }
)
"""Parameters that exist elsewhere and are not supported yet."""

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Text = Annotated[str, Field(max_length=16_000_000)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class PenstockOptions(_Strict):
    """Scheduling options that OpenAI's API has no words for."""

    priority: Literal["P0", "P1", "P2", "P3"] = "P3"
    deadline_s: float | None = Field(None, gt=0, le=86_400)
    tenant: str = Field("default", min_length=1, max_length=128)
    timeline: bool = False


class StreamOptions(_Strict):
    """What a stream carries besides text."""

    include_usage: bool = False


class TextFormat(_Strict):
    """The only response format so far."""

    type: Literal["text"]


class _Sampling(_Strict):
    """What both endpoints take."""

    model: str | None = Field(None, max_length=512)
    n: int = Field(1, ge=1)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: (
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None
    ) = Field(None, max_length=300)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=512)
    metadata: dict[str, str] | None = None
    top_k: int = Field(0, ge=-1, lt=2**31)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    stop_token_ids: list[TokenId] | None = Field(None, max_length=64)
    min_tokens: int = Field(0, ge=0, lt=2**31)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    cache_salt: str = Field("", max_length=512)
    penstock: PenstockOptions = Field(default_factory=lambda: PenstockOptions.model_validate({}))


class CompletionRequest(_Sampling):
    """POST /v1/completions."""

    prompt: Text | list[Text] | list[TokenId] | list[list[TokenId]]
    logprobs: int | None = Field(None, ge=0)
    add_special_tokens: bool = True


class TextPart(_Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class Message(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = Field(None, max_length=256)

    def as_template_input(self) -> dict[str, Any]:
        """Return the turn as chat templates expect it, with its text in one piece."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        turn = {"role": "system" if self.role == "developer" else self.role, "content": content}
        return turn if self.name is None else {**turn, "name": self.name}


class _Conversation(_Strict):
    messages: list[Message] = Field(min_length=1, max_length=4096)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool = False


class ChatCompletionRequest(_Conversation, _Sampling):
    """POST /v1/chat/completions."""

    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)
    response_format: TextFormat | None = None


class TokenizeTextRequest(_Strict):
    """POST /tokenize with a prompt."""

    prompt: Text
    model: str | None = Field(None, max_length=512)
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatRequest(_Conversation):
    """POST /tokenize with a conversation."""

    model: str | None = Field(None, max_length=512)
    return_token_strs: bool = False


class DetokenizeRequest(_Strict):
    """POST /detokenize."""

    tokens: list[TokenId]
    model: str | None = Field(None, max_length=512)


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Every error's body."""

    error: ErrorDetail
