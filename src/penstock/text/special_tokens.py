"""Which tokens play which role, from the files beside tokenizer.json."""

from pathlib import Path

from penstock.json_objects import read_json_object

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_special_tokens(path: Path) -> dict[str, str]:
    """Return the special tokens of the model in directory ``path`` by role; roles nobody plays are left out.

    tokenizer_config.json wins over special_tokens_map.json. Both may be missing; raises ``ModelUnreadable`` for
    one that is not JSON.
    """
    declared = read_json_object(path / "special_tokens_map.json") | read_json_object(path / "tokenizer_config.json")
    tokens = {role: _content(declared.get(role)) for role in _ROLES}
    return {role: token for role, token in tokens.items() if token}


def _content(token: object) -> str | None:
    """A token is written as a string or as an object with its ``content``."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
