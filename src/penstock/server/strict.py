"""What the schemas of all routes are made of: they read strictly, and a request cannot make them work for long."""

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, model_validator
from pydantic_core import PydanticCustomError

_MOST_FIELDS = 300
"""Of one object. Each one that is wrong is reported, and a body has room for a million."""


def few_fields(value: Any) -> Any:
    """Check an object before its fields are looked at."""
    if isinstance(value, dict) and len(value) > _MOST_FIELDS:
        raise PydanticCustomError(
            "too_many_fields",
            "There are {seen} fields; at most {most} are read",
            {"seen": len(value), "most": _MOST_FIELDS},
        )
    return value


TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Text = Annotated[str, Field(max_length=16_000_000)]
# Long lists end at their first fault, for the reason above.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Texts = Annotated[list[Text], Field(fail_fast=True)]


class Strict(BaseModel):
    """Takes no field that it does not know, and no value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        return few_fields(value)


class Unreadable(Strict):
    """What cannot be read where it stands: the member of a union that is tagged ``[other]``."""

    type: str
    known: ClassVar[str]
    """The union's other members, in words"""

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        if not isinstance(value, dict) or value.get("type") is None:
            raise PydanticCustomError(
                "unreadable",
                "A part of the content must be a JSON object with a type; those of {known} can be read here",
                {"known": cls.known},
            )
        raise PydanticCustomError(
            "unreadable",
            "Content of type {kind} cannot be read here; {known} can",
            {"kind": repr(value["type"])[:60], "known": cls.known},
        )


def kind_among(*known: str) -> Discriminator:
    """Return what tells members of a union with the tags ``[one of known]`` and ``[other]`` apart, by their type."""

    def kind_of(value: Any) -> str:
        kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
        return f"[{kind}]" if kind in known else "[other]"

    return Discriminator(kind_of)
