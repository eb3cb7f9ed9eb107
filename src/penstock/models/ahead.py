"""Packing a decoder's weights from its configuration and its files' headers alone, without torch.

What is begun here is a guess at what ``DecoderModel`` will ask for. Where it is wrong, for a checkpoint that is kept in
another way or a family that does something else with a weight, that is packed when it is asked for, as if nothing had
been begun; what is wrong with a checkpoint is said then as well.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from penstock.errors import PenstockError
from penstock.json_objects import read_json_object
from penstock.kernels.linear.ahead import FLOAT_KINDS, MatrixSource, PackedAhead
from penstock.kernels.linear.quantization import QUANTIZATIONS
from penstock.kernels.native import NATIVE
from penstock.models.arrays import ArrayWeights
from penstock.models.config import ModelConfig
from penstock.models.families import FAMILIES, read_config
from penstock.models.files import ELEMENT_BYTES, MappedFile, StoredTensor, plain_name, weight_files

_DTYPES = {"F32": "float32", "BF16": "bfloat16"}


class Ahead:
    """What has been begun of a model in the directory ``path``."""

    def __init__(
        self, path: Path, *, dtype: str, quantize: str | None, adaptable: bool, num_threads: int, most_bytes: int
    ) -> None:
        """``dtype``, ``quantize`` and ``adaptable`` are what the model will be loaded with.

        Nothing is begun of what the native kernels do not pack from the files as they are, nor of files of more than
        ``most_bytes``.
        """
        self.weights: ArrayWeights | None = None
        """All tensors, where packing has begun"""
        self.needs_torch = True
        """Whether something besides compiled kernels will run. Where that is told wrongly, torch comes later"""
        sources: list[MatrixSource] = []
        try:
            if NATIVE is not None and quantize in (None, *QUANTIZATIONS) and _is_plain(path):
                config = read_config(path)
                files = _map(path, most_bytes)
                tensors = _Tensors(files, config.dtype if dtype == "auto" else dtype, quantize)
                sources = list(tensors.sources(config, adaptable=adaptable)) if files else []
                self.weights = ArrayWeights(path, files) if files else None
                self.needs_torch = adaptable or not files or not _is_all_compiled(config)
        except (PenstockError, OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # Whoever loads the model finds it too, and knows what to say.
        self.packed = PackedAhead(sources, num_threads) if sources else None

    def close(self) -> None:
        """End what nobody waits for any more."""
        if self.packed is not None:
            self.packed.close()


def _is_plain(path: Path) -> bool:
    """Return whether a native family's weights are floats, each product's one matrix."""
    config = read_json_object(path / "config.json")
    is_native = any(name in FAMILIES for name in config["architectures"])
    return is_native and not config.get("quantization_config") and not config.get("low_rank")


def _is_all_compiled(config: ModelConfig) -> bool:
    """Return whether a decoder is made of compiled kernels alone, its loading included."""
    ropes = [rope for rope in config.ropes if rope is not None]
    return (
        config.vision is None
        and all(layer.experts is None for layer in config.layers)
        and all(rope.rotary_dim == config.head_dim and rope.kind != "dynamic" for rope in ropes)
        and config.logit_scale == 1.0
        and config.logit_cap is None
    )


def _map(path: Path, most_bytes: int) -> dict[Path, MappedFile]:
    files = weight_files(path)
    if sum(file.stat().st_size for file in files) > most_bytes:
        return {}
    return {file: MappedFile(file) for file in files}


class _Tensors:
    """Tensors by the names models ask for, and where they are in memory. Raises ``KeyError`` and ``ValueError``."""

    def __init__(self, files: Mapping[Path, MappedFile], dtype: str, quantize: str | None) -> None:
        self._stored: dict[str, tuple[int, StoredTensor]] = {
            plain_name(name): (file.address + tensor.begin, tensor)
            for file in files.values()
            for name, tensor in file.tensors.items()
        }
        self._dtype = dtype
        self._form = QUANTIZATIONS[quantize] if quantize else None

    def sources(self, config: ModelConfig, *, adaptable: bool) -> Iterator[MatrixSource]:
        """Yield what a decoder's products are made of, in the order in which they are loaded."""
        yield self._linear("model.embed_tokens" if config.tie_word_embeddings else "lm_head")
        for index, layer in enumerate(config.layers):
            attention, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
            # Rows that are brought into another order are copied first.
            if layer.rope is None or layer.rope.rotary_dim == config.head_dim:
                names = ["qkv_proj"] if config.fused_projections else ["q_proj", "k_proj", "v_proj"]
                yield self._linear(*(f"{attention}.{name}" for name in names))
            yield self._linear(f"{attention}.o_proj")
            if layer.experts is not None:
                gate, up, down = layer.experts.gate_up_down
                for expert in range(layer.experts.num_experts):
                    prefix = f"model.layers.{index}.{layer.experts.name}.experts.{expert}"
                    yield self._gated(f"{prefix}.{gate}", f"{prefix}.{up}")
                    yield self._linear(f"{prefix}.{down}")
                continue
            names = ["gate_up_proj"] if config.fused_projections else ["gate_proj", "up_proj"]
            modules = [f"{mlp}.{name}" for name in names]
            yield self._linear(*modules) if adaptable else self._gated(*modules)
            yield self._linear(f"{mlp}.down_proj")

    def _linear(self, *modules: str) -> MatrixSource:
        parts = [self._matrix(module) for module in modules]
        return self._source([(address, num_rows) for address, num_rows, _ in parts], parts[0][2])

    def _gated(self, gate: str, up: str | None = None) -> MatrixSource:
        """Return the source of two matrices, or of the halves of one."""
        address, num_rows, num_inputs = self._matrix(gate)
        if up is not None:
            return self._source([(address, num_rows)], num_inputs, up=self._matrix(up)[0])
        num_rows //= 2
        num_bytes = num_rows * num_inputs * ELEMENT_BYTES[self._stored[f"{gate}.weight"][1].dtype]
        return self._source([(address, num_rows)], num_inputs, up=address + num_bytes)

    def _source(self, parts: list[tuple[int, int]], num_inputs: int, *, up: int = 0) -> MatrixSource:
        return MatrixSource.of_floats(parts, num_inputs, FLOAT_KINDS[self._dtype], self._form, up=up)

    def _matrix(self, module: str) -> tuple[int, int, int]:
        """Return address, outputs and inputs."""
        address, stored = self._stored[f"{module}.weight"]
        num_outputs, num_inputs = stored.shape
        if _DTYPES.get(stored.dtype) != self._dtype or not stored.num_elements:
            raise ValueError(f"{module} is {stored.dtype}")
        return address, num_outputs, num_inputs
