"""SmoothQuant: the difficulty of rounding activations is moved into the weights that read them.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models" (2022).
"""

from torch import Tensor


def smoothing_scales(weight: Tensor, greatest: Tensor, *, strength: float = 0.5) -> Tensor:
    """Return the scales [K] by which to multiply the inputs of ``weight`` [N, K], and divide what produces them.

    greatest    [K] greatest magnitude of each calibration input
    strength    0 leaves activations as they are, 1 gives all of them the same range
    """
    weights = weight.abs().amax(0).clamp(min=1e-5)
    scales = greatest.clamp(min=1e-5) ** strength / weights ** (1 - strength)
    return scales.clamp(min=1e-5)
