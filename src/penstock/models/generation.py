"""What a model's makers suggest for sampling: generation_config.json."""

from pathlib import Path

import msgspec

from penstock.errors import ModelUnreadable
from penstock.gguf import is_gguf
from penstock.json_objects import read_json_object
from penstock.protocol import SamplingDefaults

_GGUF_NAMES = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
"""What stands under ``general.sampling``"""


def read_sampling_defaults(path: Path) -> SamplingDefaults:
    """Return what generation_config.json in directory ``path`` says, or the GGUF file ``path``; else neutral values.

    ``do_sample`` counts for nothing, as in vLLM: a request that wants the likeliest token says ``temperature`` 0.
    Raises ``ModelUnreadable``.
    """
    if is_gguf(path):
        # Brings numpy.
        from penstock.gguf.reader import read_gguf

        file, metadata = path, read_gguf(path).metadata
        given = {ours: metadata.get(f"general.sampling.{theirs}") for ours, theirs in _GGUF_NAMES.items()}
    else:
        file = path / "generation_config.json"
        given = read_json_object(file)
    given = {name: value for name, value in given.items() if value is not None}
    try:
        return msgspec.convert(given, SamplingDefaults)
    except msgspec.ValidationError as error:
        raise ModelUnreadable(f"{file} suggests what cannot be: {error}; correct it, or leave it out") from error
