"""Other wire forms as chat completions, and the complaints about those in the words of the form."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from penstock.errors import RequestError
from penstock.server.complaints import explain
from penstock.server.schemas import ChatCompletionRequest, Sampling

Places = Sequence[tuple[str, str]]
"""Patterns of parameters of a chat completion -> what stands there in the form; the first that matches counts."""


def as_chat(body: Sampling, **fields: Any) -> ChatCompletionRequest:
    """Return the chat completion that has the sampling of ``body`` and these ``fields``. Raises ``InvalidRequest``."""
    shared = body.model_dump(include=set(Sampling.model_fields), exclude_unset=True)
    given = {**shared, **{name: value for name, value in fields.items() if value is not None}}
    try:
        return ChatCompletionRequest.model_validate(given)
    except ValidationError as error:
        problems = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
        raise explain(problems, given) from error


@contextlib.contextmanager
def said_as(places: Places) -> Iterator[None]:
    """Have complaints about parameters name the places that the client knows."""
    try:
        yield
    except RequestError as error:
        for pattern, place in places:
            if error.param is not None and re.match(pattern, error.param):
                param = re.sub(pattern, place, error.param)
                # A parameter whose name is a word may be meant as one.
                is_word = error.param.isalpha()
                message = error.message if is_word else error.message.replace(error.param, param)
                raise type(error)(message, param=param, retry_after_s=error.retry_after_s) from error
        raise


def refused(reason: str, *nothing: Any) -> Any:
    """Return a validator that takes null and ``nothing``, which ask for nothing, for null and refuses the rest."""

    def check(value: Any) -> None:
        if value is not None and value not in nothing:
            raise PydanticCustomError("not_supported", "{reason}", {"reason": reason})

    return check
