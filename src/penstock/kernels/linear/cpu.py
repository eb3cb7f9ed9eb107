"""T tokens, K inputs, N outputs, F feed-forward width; activations float32, weights float32 or bfloat16."""

import torch
from torch import Tensor

from penstock.errors import KernelUnsupported
from penstock.kernels.native import NATIVE, checked


class PackedLinear:
    """A weight laid out once for the vector unit. See ``cpu.cpp`` for the layout."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        up: Tensor | None = None,
        up_bias: Tensor | None = None,
        *,
        to_int8: bool = False,
    ) -> None:
        """Pack a copy of ``weight`` [N, K] and, if it is gated, of ``up`` [N, K]; biases [N] likewise.

        ``to_int8`` keeps codes of 8 bits and a float32 scale for each output: its greatest magnitude by 127.
        """
        assert NATIVE is not None
        if weight.dtype not in (torch.float32, torch.bfloat16) or weight.ndim != 2 or 0 in weight.shape:
            raise KernelUnsupported(f"no native product with a {weight.dtype} weight of {list(weight.shape)}")
        self.num_outputs, self.num_inputs = weight.shape
        # Kept until they are packed: their addresses are all the packer gets.
        weight, up = weight.contiguous(), None if up is None else up.contiguous()
        bias, up_bias = _floats(bias), _floats(up_bias)
        if bias is None and up_bias is not None:
            bias = torch.zeros(self.num_outputs)
        if up is not None and bias is not None and up_bias is None:
            up_bias = torch.zeros(self.num_outputs)
        self._packed = NATIVE.PackedLinear(
            weight.dtype is torch.bfloat16,
            to_int8,
            self.num_outputs,
            self.num_inputs,
            weight.data_ptr(),
            0 if up is None else checked(up, weight.dtype, self.num_outputs, self.num_inputs),
            0 if bias is None else checked(bias, torch.float32, self.num_outputs),
            0 if up_bias is None else checked(up_bias, torch.float32, self.num_outputs),
        )

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Return [T, N] float32 from ``x`` [T, K] float32, plus ``added`` [T, N], which it overwrites."""
        address, num_tokens, N = checked(x, torch.float32, -1, self.num_inputs), x.shape[0], self.num_outputs
        out = torch.empty(num_tokens, N) if added is None else added
        out_address = checked(out, torch.float32, num_tokens, N)
        self._packed.run(address, self.num_inputs, num_tokens, out_address, N, 0 if added is None else out_address)
        return out


def _floats(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()
