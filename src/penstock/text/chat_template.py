"""Render a conversation as the one text a model was trained to continue."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from penstock.errors import InvalidRequest, ModelUnreadable, OverLimit, RequestError
from penstock.gguf import is_gguf
from penstock.json_objects import read_json_object
from penstock.text.special_tokens import read_special_tokens

_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "self"})
_END_MARK = "\ue000penstock-continues-here\ue001"
"""Put behind the message to continue, with a space, to find its end in the rendered text."""
_BUILT_IN = {
    "PaliGemmaForConditionalGeneration": """
{%- for message in messages -%}
    {%- if message.role not in ("user", "system") -%}
        {{- raise_exception("it answers a single question and holds no conversation; send one message of the user") -}}
    {%- endif -%}
    {%- if message.content is not string -%}
        {%- for part in message.content if part.type == "image" -%}<image>{%- endfor -%}
    {%- endif -%}
{%- endfor -%}
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.content is string -%}{{- message.content -}}{%- else -%}
        {%- for part in message.content if part.type == "text" -%}{{- part.text -}}{%- endfor -%}
    {%- endif -%}
{%- endfor -%}
{{- "\n" -}}""",
}
"""By architecture, for checkpoints that come without, as their papers and upstream's processors have prompts"""
_PROBE = "\ue000penstock-probes\ue001"
"""What a template is tried with, to see what kinds of content it reads."""


class ChatTemplate:
    """A model's chat templates, rendered as transformers renders them. Thread-safe."""

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str] | None = None) -> None:
        """Compile ``templates``, by name; ``special_tokens`` by role are variables in every one of them.

        Raises ``ModelUnreadable`` for a template that is not Jinja.
        """
        environment = _environment()
        self.sources = dict(templates)
        """By name, as ``templates`` has them"""
        self._templates: dict[str, jinja2.Template] = {}
        for name, source in templates.items():
            try:
                self._templates[name] = environment.from_string(source)
            except jinja2.TemplateSyntaxError as error:
                raise ModelUnreadable(
                    f"the chat template {name!r} is not valid Jinja: {error.message} (line {error.lineno}). "
                    "Correct it in chat_template.jinja or tokenizer_config.json."
                ) from error
        self._special_tokens = dict(special_tokens or {})

    @classmethod
    def load(cls, path: Path) -> "ChatTemplate | None":
        """Return the templates of the model in directory or GGUF file ``path``, None if it has none.

        Raises ``ModelUnreadable`` if a file is broken.
        """
        if is_gguf(path):
            # Brings numpy.
            from penstock.text.gguf_tokenizer import gguf_chat_templates, gguf_special_tokens

            templates, special_tokens = gguf_chat_templates(path), gguf_special_tokens(path)
        else:
            templates, special_tokens = _read_templates(path) or _built_in(path), read_special_tokens(path)
        return cls(templates, special_tokens) if templates else None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        max_chars: int = 16_000_000,
    ) -> str:
        """Return the conversation as text, ending where the answer begins.

        ``continue_final_message`` cuts the text right after the last message's content, for the model to go on
        with it. ``variables`` are further variables for the template. Raises ``InvalidRequest`` with the
        template's own words if it refuses the conversation, ``OverLimit`` past ``max_chars``.
        """
        variables = variables or {}
        reserved = sorted(_RESERVED & variables.keys())
        if reserved:
            raise InvalidRequest(
                f"{reserved[0]!r} is set by the conversation itself; leave it out of chat_template_kwargs.",
                param="chat_template_kwargs",
            )
        template = self._choose(has_tools=tools is not None)
        scope = {
            **self._special_tokens,
            **variables,
            "messages": _mark_end(messages) if continue_final_message else [dict(message) for message in messages],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        text = _run(template, scope, max_chars)
        return _cut_at_mark(text) if continue_final_message else text

    @cached_property
    def takes_text(self) -> bool:
        """Whether the content of a message may be one text. Templates of some models that see only read lists of parts,
        and pass over a text in silence.
        """
        return self._shows(_PROBE)

    @cached_property
    def takes_parts(self) -> bool:
        """Whether it may be a list of parts, such as ``{"type": "text", "text": ...}``."""
        return self._shows([{"type": "text", "text": _PROBE}])

    def _shows(self, content: Any) -> bool:
        try:
            text = self.render([{"role": "user", "content": content}], add_generation_prompt=True)
        except RequestError:
            return False
        # A list that is put into a text as it is shows more than what it holds.
        return _PROBE in text and not re.search(r"""["']type["']""", text)

    def _choose(self, *, has_tools: bool) -> jinja2.Template:
        name = "tool_use" if has_tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise InvalidRequest(
                f"this model has no default chat template, only {', '.join(sorted(self._templates))}; "
                "use /v1/completions.",
                param="messages",
            )
        return self._templates[name]


def _run(template: jinja2.Template, variables: dict[str, Any], max_chars: int) -> str:
    pieces: list[str] = []
    num_chars = 0
    try:
        for piece in template.generate(variables):
            num_chars += len(piece)
            if num_chars > max_chars:
                raise OverLimit(
                    f"the conversation renders to more than {max_chars} characters; shorten it.", param="messages"
                )
            pieces.append(piece)
    except OverLimit:
        raise
    except jinja2.TemplateError as error:
        raise InvalidRequest(
            f"the model's chat template refuses these messages: {error.message or type(error).__name__}",
            param="messages",
        ) from error
    except Exception as error:  # the template is a program that came with the model, run on the caller's data
        raise InvalidRequest(
            f"the model's chat template cannot render these messages: {type(error).__name__}: {error}",
            param="messages",
        ) from error
    return "".join(pieces)


def _mark_end(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    content = messages[-1].get("content") if messages else None
    marked: Any
    match content:
        case str():
            marked = f"{content}{_END_MARK} "
        case [*before, {"type": "text", "text": str(text)} as last]:
            marked = [*before, {**last, "text": f"{text}{_END_MARK} "}]
        case _:
            raise InvalidRequest(
                "continue_final_message needs a last message with text to go on from.", param="messages"
            )
    return [*(dict(message) for message in messages[:-1]), {**messages[-1], "content": marked}]


def _cut_at_mark(text: str) -> str:
    position = text.rfind(_END_MARK)
    if position < 0:
        raise InvalidRequest(
            "this model's chat template leaves the last message out or changes it, so it cannot be continued.",
            param="continue_final_message",
        )
    end = position + len(_END_MARK)
    # A template that trims messages has trimmed the space; it would have trimmed the message itself as well.
    return text[:position] if text[end : end + 1] == " " else text[:position].rstrip()


def _read_templates(path: Path) -> dict[str, str]:
    """Return the directory's templates by name; files of their own win over tokenizer_config.json."""
    templates = _declared_templates(path / "tokenizer_config.json")
    files = {"default": path / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((path / "additional_chat_templates").glob("*.jinja"))}
    for name, file in files.items():
        if file.is_file():
            try:
                templates[name] = file.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise ModelUnreadable(f"{file} cannot be read ({error}): copy or download it again.") from error
    return templates


def _built_in(path: Path) -> dict[str, str]:
    """Return the template that models of this architecture are known to read."""
    names = read_json_object(path / "config.json").get("architectures")
    known = [name for name in names if name in _BUILT_IN] if isinstance(names, list) else []
    return {"default": _BUILT_IN[known[0]]} if known else {}


def _declared_templates(file: Path) -> dict[str, str]:
    """Return the templates in tokenizer_config.json: one, a list of named ones, or an object of them."""
    declared = read_json_object(file).get("chat_template")
    match declared:
        case None:
            return {}
        case str():
            return {"default": declared}
        case list() if all(isinstance(entry, dict) for entry in declared):
            named = [(entry.get("name"), entry.get("template")) for entry in declared]
        case dict():
            named = list(declared.items())
        case _:
            named = [(None, declared)]
    if not all(isinstance(name, str) and isinstance(source, str) for name, source in named):
        raise ModelUnreadable(
            f"chat_template in {file} is neither text nor texts by name: correct it or write chat_template.jinja."
        )
    return dict(named)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}``: marks the model's own words in training templates; renders what it holds."""

    tags = {"generation"}  # noqa: RUF012 - declared by the base class

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which would change what the model reads.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(date_format: str) -> str:
    return datetime.now().strftime(date_format)
