import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from penstock.errors import InvalidRequest, ModelUnreadable, OverLimit
from penstock.text.chat_template import ChatTemplate
from tests.fakes.tokenizer_files import CHAT_TEMPLATE, write_tokenizer

INSTRUCTION_BRACKETS = """\
{%- if messages[0]['role'] == 'system' -%}
    {%- set opening = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set opening = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('user and assistant must take turns') -}}
    {%- endif -%}
    {%- if turn['role'] == 'user' -%}
        {{- bos_token + '[INST] ' + (opening if loop.first else '') + turn['content'] | trim + ' [/INST]' -}}
    {%- else -%}
        {{- ' ' + turn['content'] | trim + ' ' + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""

HEADERS = """\
{{- bos_token }}
{%- set ns = namespace(seen=0) %}
{%- if date_string is not defined %}{% set date_string = '26 Jul 2024' %}{% endif %}
{%- for message in messages %}
    {%- set ns.seen = ns.seen + 1 %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {%- if message.role == 'system' %}
        {{- 'Today: ' + date_string + '\n\n' }}
    {%- endif %}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if tools %}{{- tools | tojson(indent=2) }}{% endif %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

LOOP_CONTROLS = """\
{% for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
    {% if loop.index > 6 %}{% break %}{% endif %}
    {% generation %}
        {% set note = 'inside' %}
{{ message.role | upper }}: {{ message.content }}
    {% endgeneration %}
    {{ note is defined }} {{ (message.content ~ "<&'é") | tojson }}
{% endfor %}
{% set options = dict(a=1) %}{{ options.a }} {{ enable_thinking }}
"""

STYLES = {
    "chatml": CHAT_TEMPLATE,
    "instruction brackets": INSTRUCTION_BRACKETS,
    "headers": HEADERS,
    "loop controls": LOOP_CONTROLS,
    "mixed whitespace": "  {% if true %}\n  a \n {%- endif %}\n\t{{ messages | length }}\n{# note #}\nend\n",
}

CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": " Be <b>brief</b>. "}, {"role": "user", "content": "Grüße 👍\n\n"}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": " two "},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four, "},
    ],
]


def both(path: Path, template: str) -> tuple[ChatTemplate, PreTrainedTokenizerFast]:
    write_tokenizer(path, chat_template=template)
    ours = ChatTemplate.load(path)
    assert ours is not None
    return ours, PreTrainedTokenizerFast.from_pretrained(path)


@pytest.mark.parametrize("style", STYLES)
def test_renders_as_transformers_does(tmp_path: Path, style: str) -> None:
    ours, theirs = both(tmp_path, STYLES[style])
    for messages in CONVERSATIONS:
        for prompt in (False, True):
            variables: dict[str, Any] = {"enable_thinking": False, "date_string": "1 May 2026"}
            expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **variables)
            assert ours.render(messages, add_generation_prompt=prompt, variables=variables) == expected


@pytest.mark.parametrize("style", ["chatml", "instruction brackets", "headers"])
@pytest.mark.parametrize("content", ["four, ", "four", "four\n"])
def test_continues_the_last_message_as_transformers_does(tmp_path: Path, style: str, content: str) -> None:
    ours, theirs = both(tmp_path, STYLES[style])
    messages = [*CONVERSATIONS[2][:-1], {"role": "assistant", "content": content}]
    expected = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert ours.render(messages, add_generation_prompt=False, continue_final_message=True) == expected


def test_tools_choose_the_template_for_tools() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "{{ tools[0].name }}"})
    assert template.render([], add_generation_prompt=False) == "plain"
    assert template.render([], add_generation_prompt=False, tools=[{"name": "clock"}]) == "clock"


def test_a_file_of_its_own_wins_over_the_config(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template=[{"name": "default", "template": "config"}])
    assert ChatTemplate.load(tmp_path).render([], add_generation_prompt=False) == "config"  # type: ignore[union-attr]
    (tmp_path / "chat_template.jinja").write_text("file")
    assert ChatTemplate.load(tmp_path).render([], add_generation_prompt=False) == "file"  # type: ignore[union-attr]


def test_a_model_without_a_template_has_none(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template=None)
    assert ChatTemplate.load(tmp_path) is None


def test_the_templates_own_words_reach_the_caller() -> None:
    template = ChatTemplate({"default": "{{ raise_exception('roles must alternate') }}"})
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        template.render([], add_generation_prompt=False)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content + 1 }}",
        "{{ undefined_name.attribute }}",
        "{{ 1 / 0 }}",
        "{{ range(10**9) }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_fails_is_an_invalid_request(source: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template"):
        ChatTemplate({"default": source}).render([{"content": "x"}], add_generation_prompt=False)


def test_rendered_size_is_bounded() -> None:
    template = ChatTemplate({"default": "{% for i in range(100000) %}{{ messages[0].content }}{% endfor %}"})
    with pytest.raises(OverLimit, match="more than 1000 characters"):
        template.render([{"content": "x" * 100}], add_generation_prompt=False, max_chars=1000)


def test_variables_cannot_replace_the_conversation() -> None:
    with pytest.raises(InvalidRequest, match="'messages' is set by the conversation"):
        ChatTemplate({"default": ""}).render([], add_generation_prompt=False, variables={"messages": []})


def test_a_template_that_is_not_jinja_is_named(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template="{% for %}")
    with pytest.raises(ModelUnreadable, match=r"'default' is not valid Jinja.*line 1"):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize("wrong", [5, ["x"], [{"template": "x"}], [{"name": [], "template": "x"}], {"default": None}])
def test_a_template_of_the_wrong_type_is_named(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelUnreadable, match=r"chat_template in .*tokenizer_config\.json is neither"):
        ChatTemplate.load(write_tokenizer(tmp_path, chat_template=wrong))


def test_templates_by_name_come_as_a_list_or_an_object(tmp_path: Path) -> None:
    for declared in ([{"name": "default", "template": "a"}], {"default": "a"}):
        template = ChatTemplate.load(write_tokenizer(tmp_path, chat_template=declared))
        assert template is not None
        assert template.render([], add_generation_prompt=False) == "a"


def test_messages_are_left_as_they_were() -> None:
    messages = [{"role": "assistant", "content": "x"}]
    before = json.dumps(messages)
    ChatTemplate({"default": CHAT_TEMPLATE}).render(messages, add_generation_prompt=False, continue_final_message=True)
    assert json.dumps(messages) == before


PARTS_ALONE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}<image>{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "{% endfor %}"
)
FIRST_PART = (
    "{% for m in messages %}{% if m['content'][0]['type'] == 'image' %}: {% endif %}"
    "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
)
EITHER = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] if part['type'] == 'text' else '<image>' }}{% endfor %}"
    "{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("source", "takes_text", "takes_parts"),
    [
        (CHAT_TEMPLATE, True, False),
        (INSTRUCTION_BRACKETS, True, False),
        ("{% for message in messages %}{{ message.content }}{% endfor %}", True, False),
        ("{% for message in messages %}{{ message.content | tojson }}{% endfor %}", True, False),
        (PARTS_ALONE, False, True),
        (FIRST_PART, False, True),
        (EITHER, True, True),
    ],
)
def test_what_contents_a_template_reads(source: str, takes_text: bool, takes_parts: bool) -> None:
    template = ChatTemplate({"default": source}, {"bos_token": "<s>", "eos_token": "</s>"})
    assert (template.takes_text, template.takes_parts) == (takes_text, takes_parts)


def test_go_on_with_a_message_of_parts() -> None:
    template = ChatTemplate({"default": PARTS_ALONE + "<end>"})
    parts = [{"type": "image"}, {"type": "text", "text": "It is"}]
    text = template.render(
        [{"role": "assistant", "content": parts}], add_generation_prompt=False, continue_final_message=True
    )
    assert text == "assistant: <image>It is"
    with pytest.raises(InvalidRequest, match="text to go on from"):
        template.render(
            [{"role": "user", "content": parts[:1]}], add_generation_prompt=False, continue_final_message=True
        )
