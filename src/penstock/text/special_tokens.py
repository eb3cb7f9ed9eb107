"""Which tokens play which role, from the files beside tokenizer.json."""

import json
from pathlib import Path
from typing import Any

from penstock.errors import ModelUnreadable

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_special_tokens(path: Path) -> dict[str, str]:
    """Return the special tokens of the model in directory ``path`` by role; roles nobody plays are left out.

    tokenizer_config.json wins over special_tokens_map.json. Both may be missing; raises ``ModelUnreadable`` for
    one that is not JSON.
    """
    declared = read_json_object(path / "special_tokens_map.json") | read_json_object(path / "tokenizer_config.json")
    tokens = {role: _content(declared.get(role)) for role in _ROLES}
    return {role: token for role, token in tokens.items() if token}


def read_json_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in ``file``, empty if there is no such file. Raises ``ModelUnreadable``."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelUnreadable(f"{file} cannot be read as JSON ({error}): copy or download it again.") from error
    if not isinstance(content, dict):
        raise ModelUnreadable(f"{file} holds a {type(content).__name__}, not an object: copy or download it again.")
    return content


def _content(token: object) -> str | None:
    """A token is written as a string or as an object with its ``content``."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
