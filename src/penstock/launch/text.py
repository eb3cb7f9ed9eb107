"""A model's text side, which the server's process needs beside the engine's."""

from pathlib import Path
from typing import TYPE_CHECKING

from penstock.launch.settings import ModelSettings
from penstock.models import DEMO_MODEL, find_shape, resolve_model
from penstock.text import Tokenizer

if TYPE_CHECKING:
    from penstock.text.chat_template import ChatTemplate


def load_tokenizer(model: ModelSettings, *, is_late: bool = False) -> Tokenizer:
    """Return the tokenizer of ``model``, ``is_late`` one that is read when it is used. Raises ``ModelUnreadable``.

    A shape has none: it reads text by penstock-mini's, and ids beyond that vocabulary are written ``<6200>``.
    """
    shape = find_shape(model.name)
    load = Tokenizer.load_late if is_late else Tokenizer.load
    return load(directory_of(model), num_ids=shape.vocab_size if shape else 0)


def load_template(model: ModelSettings) -> "ChatTemplate | None":
    """Return the chat template of ``model``, if it has one; a shape has penstock-mini's. Raises ``ModelUnreadable``."""
    # Only the server's side has a use for it.
    from penstock.text.chat_template import ChatTemplate

    return ChatTemplate.load(directory_of(model))


def directory_of(model: ModelSettings) -> Path:
    """Return where the files of ``model`` are; a shape's are penstock-mini's."""
    return resolve_model(DEMO_MODEL) if find_shape(model.name) else resolve_model(model.name, model.revision)
