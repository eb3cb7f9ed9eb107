"""A task of the user's own: a YAML file that says what it is, and beside it the data.

    name: capitals
    kind: generation            # or multiple_choice, or perplexity
    data: capitals.jsonl        # beside this file; of perplexity, a text
    prompt: "{question}"        # what is asked, made of a line's fields
    format: auto                # chat, plain, text; see tasks.base.Format
    max_tokens: 64              # generation alone, as is the next
    stop: ["\\n"]

A line of JSONL is an object: for generation with ``answer``, a text or a list of texts that all count as right; for
multiple choice with ``choices``, a list of texts, and ``answer``, the number of the right one from 0; and with whatever
fields the prompt names.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from penstock.errors import InvalidSetting
from penstock.eval.files import read_text
from penstock.eval.tasks import ChoiceItem, GenerationTask, MultipleChoiceTask, PerplexityTask, Question, Task
from penstock.eval.tasks.base import Format

_FIELD = re.compile(r"\{(\w+)\}")
LineT = TypeVar("LineT", bound=BaseModel)
NonEmpty = Annotated[str, StringConstraints(min_length=1)]


class _Described(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: NonEmpty
    data: NonEmpty


class _Asking(_Described):
    prompt: NonEmpty = "{question}"
    format: Format = "auto"


class _Perplexity(_Described):
    kind: Literal["perplexity"]


class _MultipleChoice(_Asking):
    kind: Literal["multiple_choice"]


class _Generation(_Asking):
    kind: Literal["generation"]
    max_tokens: Annotated[int, Field(ge=1)] = 64
    stop: list[NonEmpty] = ["\n"]


class _ChoiceLine(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    choices: Annotated[list[NonEmpty], Field(min_length=2)]
    answer: Annotated[int, Field(ge=0)]


class _AnswerLine(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    answer: NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)]


_TASK: TypeAdapter[_Perplexity | _MultipleChoice | _Generation] = TypeAdapter(
    Annotated[_Perplexity | _MultipleChoice | _Generation, Field(discriminator="kind")]
)


def read_own_task(path: Path, *, window: int) -> Task:
    """Return the task that the YAML file ``path`` describes. Raises ``InvalidSetting``, naming file and line."""
    described = _read_description(path, read_text(path))
    data = path.parent / described.data
    if not data.is_file():
        raise InvalidSetting(f"{path}: there is no data file {data}; data is a path from the task's own directory")
    text = read_text(data)
    if isinstance(described, _Perplexity):
        return PerplexityTask(described.name, text, window=window)
    if isinstance(described, _Generation):
        questions = [_question(described, line, place) for place, line in _lines(data, text)]
        return GenerationTask(
            described.name,
            questions,
            max_tokens=described.max_tokens,
            stop=tuple(described.stop),
            form=described.format,
        )
    items = [_choice_item(described, line, place) for place, line in _lines(data, text)]
    return MultipleChoiceTask(described.name, items, form=described.format)


def _read_description(path: Path, text: str) -> _Perplexity | _MultipleChoice | _Generation:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}, line {mark.line + 1}" if mark is not None else str(path)
        raise InvalidSetting(f"{place}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(root, yaml.MappingNode) or not isinstance(raw, dict):
        raise InvalidSetting(f"{path}: a task is a mapping with name, kind and data")
    try:
        return _TASK.validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        # The first part of the place is the kind, where that was known.
        keys = [part for part in first["loc"] if part in raw or first["type"] != "union_tag_invalid"]
        key = next((part for part in keys if part not in ("perplexity", "multiple_choice", "generation")), "kind")
        lines = {node.value: node.start_mark.line + 1 for node, _ in root.value}
        place = f"{path}, line {lines[key]}" if key in lines else str(path)
        raise InvalidSetting(f"{place}: {_complaint(str(key), first)}") from error


def _lines(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where it is, object) of each line that is not empty."""
    is_empty = True
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise InvalidSetting(f"{place}: not JSON: {error.msg} (column {error.colno})") from error
        if not isinstance(value, dict):
            raise InvalidSetting(f"{place}: each line is a JSON object")
        is_empty = False
        yield place, value
    if is_empty:
        raise InvalidSetting(f"{path} has no lines; each is one item, as a JSON object")


def _question(task: _Generation, line: dict[str, Any], place: str) -> Question:
    checked = _checked(_AnswerLine, line, place)
    answers = (checked.answer,) if isinstance(checked.answer, str) else tuple(checked.answer)
    return Question(_fill(task.prompt, line, place), answers)


def _choice_item(task: _MultipleChoice, line: dict[str, Any], place: str) -> ChoiceItem:
    checked = _checked(_ChoiceLine, line, place)
    if checked.answer >= len(checked.choices):
        raise InvalidSetting(
            f"{place}: answer is {checked.answer}, and the {len(checked.choices)} choices are numbered from 0"
        )
    return ChoiceItem(_fill(task.prompt, line, place), tuple(checked.choices), checked.answer)


def _checked(kind: type[LineT], line: dict[str, Any], place: str) -> LineT:
    try:
        return kind.model_validate(line)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidSetting(f"{place}: {_complaint(str(first['loc'][0]), first)}") from error


def _fill(prompt: str, line: Mapping[str, Any], place: str) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name not in line:
            raise InvalidSetting(f"{place}: lacks {name!r}, which the prompt names")
        if not isinstance(line[name], str | int | float):
            raise InvalidSetting(f"{place}: {name!r} is neither a text nor a number, and the prompt names it")
        return str(line[name])

    text = _FIELD.sub(value, prompt)
    if not text.strip():
        raise InvalidSetting(f"{place}: the question is empty")
    return text


def _complaint(key: str, error: Any) -> str:
    match error["type"]:
        case "missing" | "union_tag_not_found":
            return f"lacks {key!r}"
        case "extra_forbidden":
            return f"unknown key {key!r}; see docs/evaluating.md for those there are"
        case _:
            message = str(error["msg"])
            return f"{key!r} cannot be {error['input']!r}: {message[0].lower()}{message[1:]}"
