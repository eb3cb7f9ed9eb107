"""What clients send, read strictly: OpenAI's parameters, vLLM's sampling extensions and our own object."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from penstock.server.chat_messages import Message
from penstock.server.strict import Strict, Text, Texts, TokenIds, few_fields

LATER: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": (),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_cache_retention": ("in_memory",),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "verbosity": (),
    "web_search_options": (),
}
"""Parameters that exist elsewhere and are not supported yet -> values, beside null, that ask for nothing: clients send
them, and they are taken for absent."""

RENAMED = {f"guided_{name}": f"structured_outputs.{name}" for name in ("choice", "grammar", "json", "regex")}
"""Parameters of older releases of vLLM -> what they are called now."""


class PenstockOptions(Strict):
    """Scheduling options that OpenAI's API has no words for."""

    priority: Literal["P0", "P1", "P2", "P3"] = "P3"
    deadline_s: float | None = Field(None, gt=0, le=86_400)
    tenant: str = Field("default", min_length=1, max_length=128)
    timeline: bool = False


class LoadAdapterRequest(Strict):
    """What /v1/load_lora_adapter takes."""

    lora_name: str = Field(min_length=1, max_length=512)
    lora_path: str = Field(min_length=1, max_length=4096)


class UnloadAdapterRequest(Strict):
    """What /v1/unload_lora_adapter takes."""

    lora_name: str = Field(min_length=1, max_length=512)


class StreamOptions(Strict):
    """What a stream carries besides text."""

    include_usage: bool = False


class TextFormat(Strict):
    """Answers as the model gives them."""

    type: Literal["text"]


class JSONObjectFormat(Strict):
    """Answers that are JSON objects."""

    type: Literal["json_object"]


class JSONSchema(Strict):
    """A named schema. It is always followed to the letter, whether ``strict`` asks for it or not."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class JSONSchemaFormat(Strict):
    """Answers that a JSON schema describes."""

    type: Literal["json_schema"]
    json_schema: JSONSchema


ResponseFormat = Annotated[TextFormat | JSONObjectFormat | JSONSchemaFormat, Discriminator("type")]


class StructuredOutputs(Strict):
    """vLLM's way to say what an answer must look like; one of these."""

    json_: Text | dict[str, Any] | None = Field(None, alias="json")
    """A JSON schema, as an object or as text"""
    regex: Text | None = None
    choice: Annotated[list[Annotated[str, Field(min_length=1)]] | None, Field(min_length=1)] = None
    grammar: Text | None = None
    """In Lark's syntax or in GBNF"""
    json_object: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> "StructuredOutputs":
        given = [name for name, value in self if value is not None and value is not False]
        if len(given) != 1:
            raise PydanticCustomError(
                "one_structure", "Exactly one of json, regex, choice, grammar and json_object must be given"
            )
        return self


class Sampling(Strict):
    """What every generating route takes: how tokens are picked and when, and how the request is scheduled."""

    model: str | None = Field(None, max_length=512)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None,
        BeforeValidator(few_fields),
    ] = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    allowed_token_ids: TokenIds | None = Field(None, min_length=1)
    bad_words: Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]] | None, Field(max_length=128)] = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1, lt=2**31)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    stop_token_ids: TokenIds | None = Field(None, max_length=64)
    min_tokens: int = Field(0, ge=0, lt=2**31)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    cache_salt: str = Field("", max_length=512)
    penstock: PenstockOptions = Field(default_factory=lambda: PenstockOptions.model_validate({}))


class _Sampling(Sampling):
    """What OpenAI's completions and chat completions take."""

    @model_validator(mode="before")
    @classmethod
    def _without_nothing(cls, value: Any) -> Any:
        """Leave out what is not supported yet where it asks for nothing."""
        if not isinstance(value, dict):
            return value
        asks = {name for name in LATER if value.get(name) is not None and value[name] not in LATER[name]}
        return {name: one for name, one in value.items() if name not in LATER or name in asks}

    n: int | None = Field(1, ge=1)
    best_of: int | None = Field(None, ge=1)
    use_beam_search: bool | None = None
    length_penalty: float | None = Field(None, ge=-10, le=10)
    early_stopping: bool | Literal["never"] | None = None
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    stop: str | Texts | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    user: str | None = Field(None, max_length=512)
    safety_identifier: str | None = Field(None, max_length=512)
    prompt_cache_key: str | None = Field(None, max_length=512)
    """These three name the caller, or what a router may keep together; nothing here depends on them."""
    metadata: Annotated[dict[str, str] | None, BeforeValidator(few_fields)] = None

    @property
    def num_choices(self) -> int:
        """Choices for each prompt; null is OpenAI's word for the default."""
        return self.n or 1


def _prompt_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "[text]"
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    return "[ids]" if isinstance(first, int) else "[lists]" if isinstance(first, list) else "[texts]"


Prompt = Annotated[
    Annotated[Text, Tag("[text]")]
    | Annotated[Texts, Tag("[texts]")]
    | Annotated[TokenIds, Tag("[ids]")]
    | Annotated[list[TokenIds], Field(fail_fast=True), Tag("[lists]")],
    Discriminator(
        _prompt_kind,
        custom_error_type="prompt_type",
        custom_error_message="It can be a string, a list of strings, a list of token ids or a list of such lists",
    ),
]
"""Told apart by its first item, so that complaints are about the kind that was meant."""


class CompletionRequest(_Sampling):
    """POST /v1/completions."""

    prompt: Prompt
    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0)
    prompt_logprobs: int | None = Field(None, ge=0)
    add_special_tokens: bool = True


class Function(Strict):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema; None: it takes nothing"""
    strict: bool | None = None


class ToolDefinition(Strict):
    """A tool that the model may use."""

    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    """Which function to call."""

    name: str = Field(max_length=256)


class NamedTool(Strict):
    """A tool that the model has to use."""

    type: Literal["function"]
    function: FunctionName


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
"""How much to reason, for templates that know the word"""


class _Conversation(Strict):
    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1, max_length=4096)
    tools: Annotated[list[ToolDefinition], Field(fail_fast=True, max_length=256)] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Effort | None = None
    add_special_tokens: bool = False

    @property
    def template_variables(self) -> dict[str, Any]:
        """What the chat template is given beside the conversation."""
        effort = self.reasoning_effort
        asked = {} if effort is None else {"reasoning_effort": effort, "enable_thinking": effort != "none"}
        return asked | (self.chat_template_kwargs or {})


class ChatCompletionRequest(_Conversation, _Sampling):
    """POST /v1/chat/completions."""

    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @property
    def may_call(self) -> bool:
        """Whether the answer may be calls of tools."""
        return bool(self.tools) and self.tool_choice != "none"


class TokenizeTextRequest(Strict):
    """POST /tokenize with a prompt."""

    prompt: Text
    model: str | None = Field(None, max_length=512)
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatRequest(_Conversation):
    """POST /tokenize with a conversation."""

    model: str | None = Field(None, max_length=512)
    return_token_strs: bool = False


def _tokenize_kind(value: Any) -> str:
    return "[chat]" if isinstance(value, dict) and "messages" in value else "[text]"


TokenizeRequest = Annotated[
    Annotated[TokenizeTextRequest, Tag("[text]")] | Annotated[TokenizeChatRequest, Tag("[chat]")],
    Discriminator(_tokenize_kind),
]
"""Told apart by ``messages``, so that complaints are about the one that was meant."""


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    tokens: TokenIds
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
