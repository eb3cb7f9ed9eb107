"""T tokens, K inputs, N outputs, B groups of inputs; activations float32, weights float32, bfloat16 or codes."""

from penstock.errors import KernelUnsupported
from penstock.kernels.dtypes import ELEMENT_BYTES, dtype_name
from penstock.kernels.linear.ahead import CODE_KINDS, FLOAT_KINDS, MatrixSource, PackedAhead
from penstock.kernels.linear.quantization import InputCodes, Quantization, Stacked, WeightCodes
from penstock.kernels.native import NATIVE, checked
from penstock.kernels.native.array import zeros
from penstock.kernels.native.replay import empty
from penstock.kernels.tensor import Tensor

_ACTIVATIONS = {None: 0, "silu": 1, "gelu_tanh": 2, "gelu": 3, "quick_gelu": 4}
"""``Activation`` of ``native/kernels.h``"""
_CODE_INPUTS, _MAX_GROUP = 32, 512
"""What groups are multiples of, and the largest: ``native/kernels.h``."""


def form_that_holds(bits: int, group: int | None, *, int8_activations: bool) -> Quantization | None:
    """Return the smallest form that holds codes of ``bits`` in groups of ``group`` inputs to the last bit.

    None as a group is all inputs. A group that is too large is kept as several with the same scale; one that is no
    multiple of 32 has no form, and the result is None.
    """
    if bits > 8 or (group is not None and group % _CODE_INPUTS):
        return None
    parts = range(1, 1 if group is None else group // _CODE_INPUTS + 1)
    sizes = (group // n for n in parts if group is not None and group % (n * _CODE_INPUTS) == 0)
    kept = next((size for size in sizes if size <= _MAX_GROUP), _MAX_GROUP)
    return Quantization(bits=4 if bits <= 4 else 8, group=kept, int8_activations=int8_activations)


class PackedLinear:
    """A weight laid out once for the vector unit. See ``native/kernels.h`` for the layout."""

    def __init__(
        self,
        weight: Tensor | Stacked | WeightCodes,
        bias: Tensor | None,
        up: Tensor | WeightCodes | None = None,
        up_bias: Tensor | None = None,
        *,
        activation: str | None = None,
        quantization: Quantization | None = None,
        ahead: PackedAhead | None = None,
    ) -> None:
        """Pack a copy of ``weight`` [N, K] and, if it is gated, of ``up`` [N, K]; biases [N] likewise.

        ``activation`` is the gate's, by default ``silu``, or that of all outputs, by default none.
        ``quantization`` is the form that floats are rounded to: 8 bits by the greatest magnitude of each group, 4 bits
        by the bfloat16 nearest to the scale that leaves the least squared error. Codes stay what they are. What is in
        ``ahead`` is taken from there.
        """
        assert NATIVE is not None
        form = weight.form if isinstance(weight, WeightCodes) else quantization
        source = _Source(weight, form)
        up_source = None if up is None else _Source(up, form)
        self.num_outputs, self.num_inputs = source.shape
        self.holds_rows = up is None and (form is None or isinstance(weight, WeightCodes))
        """Whether one weight is kept as it came, floats or codes, for ``embed``"""
        if up_source is not None and (up_source.shape, up_source.kind) != (source.shape, source.kind):
            raise KernelUnsupported(f"a gate of {list(source.shape)} and an up projection of {list(up_source.shape)}")
        inputs = source.inputs
        if up_source is not None and up_source.inputs != inputs:
            raise KernelUnsupported(f"a gate and an up projection that round the same inputs to {inputs} and otherwise")
        bias, up_bias = _shifted(weight, inputs, _floats(bias)), _shifted(up, inputs, _floats(up_bias))
        if bias is None and up_bias is not None:
            bias = zeros(self.num_outputs).as_tensor()
        if up is not None and bias is not None and up_bias is None:
            up_bias = zeros(self.num_outputs).as_tensor()
        matrix_source = source.matrix(form, up_source)
        matrix = None if ahead is None else ahead.take(matrix_source)
        self._packed = NATIVE.PackedLinear(
            matrix or NATIVE.PackedMatrix(*matrix_source, False),
            0 if bias is None else checked(bias, "float32", self.num_outputs),
            0 if up_bias is None else checked(up_bias, "float32", self.num_outputs),
            _ACTIVATIONS["silu" if activation is None and up is not None else activation],
        )

    @property
    def num_bytes(self) -> int:
        """What it takes in memory, and a product reads."""
        num_bytes: int = self._packed.num_bytes
        return num_bytes

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Return [T, N] float32 from ``x`` [T, K] float32, plus ``added`` [T, N], which it overwrites."""
        num_tokens, N = x.shape[0], self.num_outputs
        address = checked(x, "float32", num_tokens, self.num_inputs)
        out = empty(num_tokens, N) if added is None else added
        out_address = checked(out, "float32", num_tokens, N)
        if num_tokens:
            self._packed.run(address, self.num_inputs, num_tokens, out_address, N, 0 if added is None else out_address)
        return out

    def embed(self, token_ids: Tensor, *, scale: float = 1.0) -> Tensor:
        """Return rows [T, K] of the weight, float32; see ``embedding/reference.py``. It ``holds_rows``."""
        (num_tokens,) = token_ids.shape
        out = empty(num_tokens, self.num_inputs)
        self._packed.embed(checked(token_ids, "int64", num_tokens), num_tokens, scale, out.data_ptr())
        return out


class _Source:
    """A matrix to pack: its kind and addresses, and what has to stay alive until it is packed."""

    def __init__(self, weight: Tensor | Stacked | WeightCodes, form: Quantization | None) -> None:
        self.scales = self.zeros = 0
        self.inputs: InputCodes | None = None
        if form is not None and (
            form.bits not in CODE_KINDS or form.group % _CODE_INPUTS or not 0 < form.group <= _MAX_GROUP
        ):
            raise KernelUnsupported(f"no native product with codes of {form.bits} bits in groups of {form.group}")
        if isinstance(weight, WeightCodes):
            assert form == weight.form, "a gate and what it multiplies have one form"
            self._parts = [weight.codes]
            if 0 in weight.shape:
                raise KernelUnsupported(f"no native product with codes of {list(weight.shape)}")
            self.inputs = weight.inputs if form.int8_activations else None
            num_outputs, num_inputs = weight.shape
            num_groups = -(-num_inputs // form.group)
            self.kind = CODE_KINDS[form.bits]
            self.scales = checked(weight.scales, "float32", num_outputs, num_groups)
            if weight.zeros is not None:
                self.zeros = checked(weight.zeros, "uint8", num_outputs, num_groups)
            checked(weight.codes, "uint8", num_outputs, num_inputs)
        else:
            parts = weight.parts if isinstance(weight, Stacked) else (weight,)
            self._parts = [part if part.is_contiguous() else part.contiguous() for part in parts]
            dtype = dtype_name(parts[0].dtype)
            if any(
                dtype not in FLOAT_KINDS or part.dtype != weight.dtype or part.ndim != 2 or 0 in part.shape
                for part in self._parts
            ):
                raise KernelUnsupported(f"no native product with a {dtype} weight of {list(weight.shape)}")
            self.kind = FLOAT_KINDS[dtype]
        self.shape = (weight.shape[0], weight.shape[1])
        self.parts = tuple((part.data_ptr(), len(part)) for part in self._parts)

    def matrix(self, form: Quantization | None, up: "_Source | None") -> MatrixSource:
        """Return what is packed: this alone, or with what it is the gate of."""
        floats = MatrixSource.of_floats(
            self.parts, self.shape[1], self.kind, form, up=0 if up is None else up.parts[0][0]
        )
        return floats._replace(
            scales=self.scales,
            up_scales=0 if up is None else up.scales,
            zeros=self.zeros,
            up_zeros=0 if up is None else up.zeros,
            input_scale=0.0 if self.inputs is None else self.inputs.scale,
            input_zero=0.0 if self.inputs is None else float(self.inputs.zero),
        )


def _shifted(
    weight: Tensor | Stacked | WeightCodes | None, inputs: InputCodes | None, bias: Tensor | None
) -> Tensor | None:
    """Return the bias less what the zero of ``inputs`` adds to each product."""
    if inputs is None or not inputs.zero or not isinstance(weight, WeightCodes):
        return bias
    from penstock.kernels.linear.reference import dequantize

    shift = dequantize(weight).sum(1) * (inputs.scale * inputs.zero)
    return -shift if bias is None else bias - shift


def _floats(bias: Tensor | None) -> Tensor | None:
    if bias is not None and dtype_name(bias.dtype) not in ELEMENT_BYTES.keys() - {"int8"}:
        raise KernelUnsupported(f"no native product with a {bias.dtype} bias")
    bias = None if bias is None else bias.float()
    return bias if bias is None or bias.is_contiguous() else bias.contiguous()
