"""What a request shows, before anything is made of it; apart from what is, for that brings numpy and Pillow."""

from dataclasses import dataclass
from typing import Literal

Detail = Literal["auto", "low", "high"]
"""How closely a caller wants an image looked at, in OpenAI's words"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """An image or a video of a request."""

    place: str
    """The parameter it is, for complaints"""
    url: str
    is_video: bool = False
    detail: Detail = "auto"
