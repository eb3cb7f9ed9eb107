"""What compressing will do, before it does it: which matrices, how many bytes, how long, how much memory."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from penstock.compress.checkpoint import Checkpoint
from penstock.compress.recipe import Treatment
from penstock.compress.units import Unit
from penstock.kernels.dtypes import ELEMENT_BYTES
from penstock.quant import Scheme

_AWQ_TRIALS = 20
_PROBE_SIZE = 768
MOST_LOGITS = 1 << 24
"""Of each of the models that are compared in the end"""
_PROCESS_BYTES = 360 << 20
"""Of a process that holds no model: the interpreter, libraries and the tokenizer"""
_SEARCH = 10_000
"""Operations of a product that take as long as finding one weight's grid does: its passes wait for memory"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CoverageRow:
    """Matrices of one kind that are treated alike."""

    component: str
    treatment: str
    layers: str
    num_matrices: int
    num_weights: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a run will take, from the number of operations and a product timed just now."""

    seconds: float
    memory_bytes: int
    """Resident at a time, mapped files and the process itself included"""
    disk_bytes: int


def describe(treatment: Treatment) -> str:
    """Return a treatment in a few words."""
    if treatment.method == "keep":
        return "kept"
    if treatment.makes_zeros:
        return f"{treatment.method} {treatment.pattern or format(treatment.sparsity, '.0%') + ' zeros'}"
    if treatment.size is not None:
        return f"{treatment.method}, {treatment.size:.0%} of the weights"
    words = [f"{treatment.method} {treatment.bits} bits", "a row" if treatment.group is None else f"g{treatment.group}"]
    if not treatment.symmetric:
        words.append("asymmetric")
    if treatment.smooth is not None:
        words.append(f"smoothed {treatment.smooth:g}")
    if treatment.activations is not None:
        words.append(f"int8 activations{_ranges_in_words(treatment)}")
    return ", ".join(words)


def _ranges_in_words(treatment: Treatment) -> str:
    if treatment.activations != "static":
        return ""
    percentile = f" {treatment.percentile:g}" if treatment.observer == "percentile" else ""
    return f" by {treatment.observer}{percentile}{', with zeros' if treatment.activation_zeros else ''}"


def code_bytes(shape: tuple[int, int], scheme: Scheme) -> int:
    """Return the bytes of a matrix [N, K] in codes, scales and zeros included."""
    num_outputs, num_inputs = shape
    num_groups = scheme.num_groups(num_inputs)
    row_words = -(-num_inputs * scheme.bits // 32)
    zeros = 0 if scheme.symmetric else -(-num_outputs * scheme.bits // 32) * 4 * num_groups
    return num_outputs * (row_words * 4 + num_groups * 2) + zeros


def _bytes_after(unit: Unit, treatment: Treatment, itemsize: int) -> int:
    if treatment.makes_codes:
        return sum(code_bytes(shape, treatment.scheme) for shape in unit.shapes)
    if treatment.size is not None:
        num_outputs = sum(outputs for outputs, _ in unit.shapes)
        return treatment.rank(unit) * (num_outputs + unit.num_inputs) * itemsize
    return unit.num_weights * itemsize


def coverage(checkpoint: Checkpoint, treatments: Mapping[Unit, Treatment]) -> list[CoverageRow]:
    """Return a row for each component and treatment, and one for all that no recipe reaches."""
    groups: dict[tuple[str, str], list[tuple[Unit, Treatment]]] = {}
    for unit, treatment in treatments.items():
        name = "embeddings and head" if unit.role == "tied" else unit.component
        groups.setdefault((name, describe(treatment)), []).append((unit, treatment))
    itemsize = ELEMENT_BYTES[checkpoint.config.dtype]
    rows = []
    for (component, treatment_text), members in groups.items():
        before = sum(unit.num_weights for unit, _ in members) * itemsize
        after = sum(_bytes_after(unit, treatment, itemsize) for unit, treatment in members)
        rows.append(
            CoverageRow(
                component=component,
                treatment=treatment_text,
                layers=_ranges(sorted({unit.layer for unit, _ in members if unit.layer is not None})),
                num_matrices=sum(len(unit.modules) for unit, _ in members),
                num_weights=sum(unit.num_weights for unit, _ in members),
                bytes_before=before,
                bytes_after=after,
            )
        )
    rest = max(checkpoint.num_bytes - sum(row.bytes_before for row in rows), 0)
    rows.append(
        CoverageRow(
            component="norms and biases" if any(unit.layer is None for unit in treatments) else "all else",
            treatment="kept",
            layers="",
            num_matrices=0,
            num_weights=rest // itemsize,
            bytes_before=rest,
            bytes_after=rest,
        )
    )
    return rows


def cache_row(num_layers: int) -> CoverageRow:
    """Return the row of scales for keys and values, of which a layer has one each."""
    return CoverageRow(
        component="keys and values",
        treatment="fp8 scales",
        layers=_ranges(list(range(num_layers))),
        num_matrices=0,
        num_weights=0,
        bytes_before=0,
        bytes_after=8 * num_layers,
    )


def estimate(
    checkpoint: Checkpoint,
    treatments: Mapping[Unit, Treatment],
    lengths: Sequence[int],
    num_probe_tokens: int,
    batch_tokens: int,
    after_bytes: int,
) -> Estimate:
    """Return what a run with calibration sequences of these ``lengths`` takes, some of them being probes as well."""
    config, num_tokens = checkpoint.config, sum(lengths)
    itemsize: int = ELEMENT_BYTES[config.dtype]
    layers: dict[int | None, list[tuple[Unit, Treatment]]] = {}
    for unit, treatment in treatments.items():
        layers.setdefault(unit.layer, []).append((unit, treatment))
    # Every matrix runs twice, as it was and as it became; second moments are a product of inputs with themselves.
    operations = sum(4 * num_tokens * unit.num_weights for unit in treatments)
    # So does attention, in which a token meets half of its sequence.
    width = config.num_heads * config.head_dim * config.num_layers
    operations += 4 * width * sum(length**2 for length in lengths)
    # Probes run through the whole model before and after, and have logits four times.
    num_weights = sum(unit.num_weights for unit in treatments)
    operations += num_probe_tokens * (4 * num_weights + 8 * config.vocab_size * config.hidden_size)
    memory = 0
    for members in layers.values():
        weights = sum(unit.num_weights for unit, _ in members)
        watched = [unit for unit, treatment in members if treatment.needs_statistics]
        operations += sum(2 * num_tokens * unit.num_inputs**2 for unit in watched)
        for unit, treatment in members:
            K = unit.num_inputs
            if treatment.method in ("gptq", "awq"):
                operations += _SEARCH * unit.num_weights
            if treatment.method in ("gptq", "sparsegpt"):
                operations += 2 * K**3 + 2 * unit.num_weights * K
            elif treatment.method == "svd":
                operations += 20 * K**3 + 10 * unit.num_weights * K
            elif treatment.method == "awq":
                operations += 2 * (_AWQ_TRIALS + 2) * unit.num_weights * K
        widest = max(unit.num_inputs for unit, _ in members)
        # In float32: the layer's weights, their kernels' form and what they became; moments of all units, and the
        # copies that inverting the largest takes; activations of one batch. Mapped: the weights, and all inputs.
        memory = max(
            memory,
            (12 + itemsize) * weights
            + 4 * num_tokens * config.hidden_size
            + 4 * sum(unit.num_inputs**2 for unit in watched)
            + 16 * widest**2
            + 4 * batch_tokens * (4 * config.hidden_size + 3 * config.mlp_width),
        )
    # In float32: the table, the head and its kernels' form; logits of three models.
    tables = 4 * config.vocab_size * config.hidden_size * (2 if config.tie_word_embeddings else 3)
    logits = 12 * min(MOST_LOGITS, num_probe_tokens * config.vocab_size)
    memory = _PROCESS_BYTES + max(memory, tables + logits)
    return Estimate(
        seconds=operations / _rate(),
        memory_bytes=memory,
        # Inputs of two layers, and every weight a byte until all are written.
        disk_bytes=8 * num_tokens * config.hidden_size + sum(unit.num_weights for unit in treatments) + after_bytes,
    )


def _rate() -> float:
    """Return the operations a second of a product of middling size."""
    left, right = torch.randn(_PROBE_SIZE, _PROBE_SIZE), torch.randn(_PROBE_SIZE, _PROBE_SIZE)
    left @ right
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return 2 * _PROBE_SIZE**3 / best


def _ranges(numbers: list[int]) -> str:
    """Return sorted ``numbers`` as ``0-3, 7``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)
