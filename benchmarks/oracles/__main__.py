"""GPTQ and AWQ beside reference implementations, each in an environment of its own.

    python -m venv A; A/bin/pip install llmcompressor==0.14.0.1
    python -m venv B; B/bin/pip install gptqmodel==7.7.0
    python -m benchmarks.oracles --llm-compressor A/bin/python --gptqmodel B/bin/python

One decoder layer with loud channels is compressed by each with the same calibration tokens, as whole models are. What
each wrote is read by Penstock, and the layer's output compared with the original layer's, in float32, on the
calibration texts and on others: the norm of the difference over the norm of what the layer adds to its input. ``read``
is how far the logits of what it wrote are apart, as Penstock and as the implementation itself runs it (GPTQModel in
float16).
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from benchmarks.peers.model import Shape, make_model
from penstock.compress.calibration.stream import LayerStream
from penstock.compress.calibration.texts import CalibrationOptions
from penstock.compress.recipe import parse_recipe
from penstock.compress.run import Compression, CompressOptions
from penstock.kernels import ops_for
from penstock.models import read_config
from penstock.models.weights import Weights

_SHAPE = Shape(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=1024,
)
_NUM_TEXTS, _LENGTH = 32, 256
_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Case:
    """What is asked of each implementation."""

    method: str
    bits: int
    group: int
    symmetric: bool
    references: tuple[str, ...]

    @property
    def name(self) -> str:
        """In a few words; also of files."""
        return f"{self.method} {self.bits} bits g{self.group}{'' if self.symmetric else ' asymmetric'}"

    @property
    def recipe(self) -> str:
        """The same for Penstock."""
        return (
            f"steps: [{{match: decoder, method: {self.method}, bits: {self.bits}, group: {self.group}, "
            f"symmetric: {str(self.symmetric).lower()}}}]"
        )


CASES = (
    Case("gptq", 4, 128, True, ("llm_compressor", "gptqmodel")),
    Case("gptq", 4, 32, True, ("llm_compressor", "gptqmodel")),
    Case("gptq", 3, 128, True, ("gptqmodel",)),
    Case("awq", 4, 128, False, ("llm_compressor", "gptqmodel")),
    Case("awq", 4, 32, False, ("llm_compressor", "gptqmodel")),
)


def make_layer(path: Path) -> None:
    """Write the model, and ``texts.jsonl`` and ``others.jsonl`` beside it."""
    make_model(path, _SHAPE)
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    width = _SHAPE.hidden_size
    weights = load_file(path / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("embed_tokens.weight"):
            # Inputs whose covariance has a spectrum that falls off, as those of trained models have.
            drawn = normal(_SHAPE.vocab_size, width) @ (normal(width, width) * torch.logspace(0, -1.5, width)[:, None])
        elif name.endswith("layernorm.weight"):
            drawn = (normal(width) * 0.5).exp()
            drawn[::37] *= 6
        elif tensor.ndim == 2:
            drawn = normal(*tensor.shape) * (normal(len(tensor), 1) * 0.3).exp() * 1.5 * tensor.shape[1] ** -0.5
        else:
            continue
        weights[name] = drawn.bfloat16()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    end = _SHAPE.vocab_size - 1
    tokenizer = Tokenizer(models.WordLevel({**{str(i): i for i in range(end)}, "<|endoftext|>": end}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    frequency = 1 / torch.arange(1, end + 1)
    for name in ("texts", "others"):
        rows = torch.multinomial(frequency, _NUM_TEXTS * _LENGTH, replacement=True, generator=random)
        lines = [" ".join(map(str, row)) for row in rows.view(_NUM_TEXTS, _LENGTH).tolist()]
        content = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        path.with_name(f"{name}.jsonl").write_text(content, encoding="utf-8")


@torch.inference_mode()
def output_of(model: Path, sequences: list[list[int]], scratch: Path) -> tuple[Tensor, Tensor]:
    """Return what the layer reads and what it leaves, [T, E] float32."""
    with Weights(model) as weights:
        pass
    stream = LayerStream(read_config(model), weights, sequences, ops_for("float32"))
    stream.embed(scratch / "read")
    stream.run_layer(0, scratch / "read", scratch / "left")
    read, left = (torch.from_numpy(stream.read(scratch / name).copy()) for name in ("read", "left"))
    return read, left


def layer_errors(
    model: Path, sets: Sequence[list[list[int]]], exact: Sequence[tuple[Tensor, Tensor]], scratch: Path
) -> list[float]:
    """Return the error of ``model``'s layer on each of ``sets``, ``exact`` being what the original reads and leaves."""
    return [
        float((output_of(model, sequences, scratch)[1] - left).norm() / (left - read).norm())
        for sequences, (read, left) in zip(sets, exact, strict=True)
    ]


@torch.inference_mode()
def reading_difference(model: Path, sequence: list[int], scratch: Path) -> float:
    """Return the norm of the logits' difference over their norm, ours and the reference's own of the same files."""
    with Weights(model) as weights:
        pass
    stream = LayerStream(read_config(model), weights, [sequence], ops_for("float32"))
    (_, ours), *_ = stream.finished(stream.run_through(scratch / "reading"))
    theirs = torch.from_numpy(np.load(model.with_name(f"{model.name}.logits.npy")))
    return float((ours - theirs).norm() / theirs.norm())


def measure(pythons: dict[str, Path], work: Path) -> None:
    """Print a row for each case and reference."""
    original = work / "layer"
    make_layer(original)
    calibration = CalibrationOptions(path=work / "texts.jsonl", num_samples=_NUM_TEXTS, length=_LENGTH, force=True)
    for case in CASES:
        ours = work / "penstock" / case.name
        compression = Compression(
            CompressOptions(model=original, out=ours, recipe=parse_recipe(case.recipe), calibration=calibration)
        )
        ours.parent.mkdir(exist_ok=True)
        compression.run()
        (work / "tokens.json").write_text(json.dumps(compression.calibration.sequences), encoding="utf-8")
        others = [list(map(int, json.loads(line)["text"].split())) for line in (work / "others.jsonl").open()]
        sets = compression.calibration.sequences, others
        exact = [output_of(original, sequences, work) for sequences in sets]

        own = layer_errors(ours, sets, exact, work)
        for name in case.references:
            if name not in pythons:
                continue
            out = work / name / case.name
            words = [case.method, str(case.bits), str(case.group), str(case.symmetric).lower(), str(out)]
            given = [str(original), str(work / "tokens.json"), *words]
            command = [str(pythons[name]), str(_HERE / f"with_{name}.py"), *given]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
            theirs = layer_errors(out, sets, exact, work)
            cells = " | ".join(
                f"{mine:.3%} | {yours:.3%} | {mine / yours - 1:+.1%}" for mine, yours in zip(own, theirs, strict=True)
            )
            read = reading_difference(out, sets[0][0], work)
            print(f"| {case.name} | {name} | {cells} | {read:.2%} |", flush=True)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("llm-compressor", "gptqmodel"):
        parser.add_argument(f"--{name}", type=Path, help="Python of an environment that has it")
    options = parser.parse_args()
    pythons = {name: path for name, path in vars(options).items() if path is not None}
    print("| | beside | ours | theirs | | ours, other texts | theirs | | read |\n|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        measure(pythons, Path(scratch))


if __name__ == "__main__":
    main()
