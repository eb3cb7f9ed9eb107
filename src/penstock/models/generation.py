"""What a model's makers suggest for sampling: generation_config.json."""

from pathlib import Path

import msgspec

from penstock.errors import ModelUnreadable
from penstock.protocol import SamplingDefaults
from penstock.text.special_tokens import read_json_object


def read_sampling_defaults(path: Path) -> SamplingDefaults:
    """Return what generation_config.json in directory ``path`` says; neutral values for what it does not.

    ``do_sample`` counts for nothing, as in vLLM: a request that wants the likeliest token says ``temperature`` 0.
    Raises ``ModelUnreadable``.
    """
    file = path / "generation_config.json"
    given = {name: value for name, value in read_json_object(file).items() if value is not None}
    try:
        return msgspec.convert(given, SamplingDefaults)
    except msgspec.ValidationError as error:
        raise ModelUnreadable(f"{file} suggests what cannot be: {error}; correct it, or leave it out") from error
