"""LoRA adapters that an engine holds."""

from dataclasses import dataclass
from pathlib import Path

from penstock.engine.runner.base import Runner
from penstock.errors import InvalidRequest, ModelNotFound, ModelUnreadable


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """What the runner loaded, and a number that no other adapter ever has."""

    weights: object
    number: int


class LoadedAdapters:
    """Adapters by the names that requests ask for them by."""

    def __init__(self, runner: Runner, *, most: int) -> None:
        self._runner = runner
        self._most = most
        self._by_name: dict[str, LoadedAdapter] = {}
        self._num_ever = 0

    def load(self, name: str, path: Path) -> None:
        """Load the LoRA adapter in directory ``path`` as ``name``. Raises ``RequestError``."""
        if not self._most:
            raise InvalidRequest("this server takes no adapters; start it with --max-loras", param="lora_name")
        if name in self._by_name:
            raise InvalidRequest(f"an adapter named {name!r} is loaded; unload it first", param="lora_name")
        if len(self._by_name) == self._most:
            raise InvalidRequest(
                f"{self._most} adapters are loaded, as many as --max-loras allows; unload one", param="lora_name"
            )
        try:
            weights = self._runner.load_adapter(path)
        except ModelUnreadable as error:
            raise InvalidRequest(error.message, param="lora_path") from error
        self._num_ever += 1
        self._by_name[name] = LoadedAdapter(weights, self._num_ever)

    def unload(self, name: str) -> None:
        """Forget an adapter; sequences that run with it go on. Raises ``ModelNotFound``."""
        self.get(name)
        del self._by_name[name]

    def get(self, name: str) -> LoadedAdapter:
        """Return an adapter. Raises ``ModelNotFound``."""
        if name not in self._by_name:
            raise ModelNotFound(f"no adapter named {name!r} is loaded", param="model")
        return self._by_name[name]
