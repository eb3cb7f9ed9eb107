"""The backend of compiled kernels: float32 activations, weights in float32 or bfloat16, the cache in either or int8."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from penstock.errors import InvalidSetting, KernelUnsupported
from penstock.kernels.embedding.cpu import embed
from penstock.kernels.layout import BatchLayout, KVBlocks
from penstock.kernels.linear.ahead import FLOAT_KINDS, PackedAhead
from penstock.kernels.linear.cpu import PackedLinear, form_that_holds
from penstock.kernels.linear.quantization import QUANTIZATIONS, Quantization, Stacked, WeightCodes
from penstock.kernels.native import NATIVE, checked, checked_rows, describe
from penstock.kernels.native.array import Array
from penstock.kernels.native.cache import cache_addresses
from penstock.kernels.native.replay import First, Head, NativeReplay, Rest, empty
from penstock.kernels.ops import CacheShapes, Embedding, HeadNorms, Linear, Ops
from penstock.kernels.paged_attention.cpu import CPUAttention
from penstock.kernels.tensor import Tensor


@dataclass(frozen=True, slots=True)
class CPUOps:
    """See ``ops.Ops``. A token's result does not depend on what else is in the batch, to the last bit."""

    quantization: Quantization | None = None
    """What projections are kept in; None leaves them as they come. Codes are kept if they have no more bits, and what
    is said of activations goes for them too."""
    ahead: PackedAhead | None = None
    """What has been packed, or is being, before anybody asked"""

    plan_attention = staticmethod(CPUAttention)

    @property
    def name(self) -> str:
        """Return the instruction set in use."""
        return describe()

    @staticmethod
    def activation_dtype(weights_dtype: str) -> str:
        """Return float32: it holds every product of the weights' dtypes, and is what the vector unit computes in."""
        return "float32"

    @staticmethod
    def own(array: Array) -> Tensor:
        """Return it: arrays and tensors do alike."""
        return array.as_tensor()

    @staticmethod
    def cache_shapes(num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> CacheShapes:
        """Return keys [N, G, D, P], values [N, G, P, D] and scales [N, G, P]: see ``native/kernels.h``."""
        heads = (num_blocks, num_kv_heads)
        return CacheShapes((*heads, head_dim, block_size), (*heads, block_size, head_dim), (*heads, block_size))

    def form_of_codes(self, bits: int, group: int | None, *, int8_activations: bool) -> Quantization | None:
        """See ``ops.Ops``; codes of more bits than asked for are wanted as floats, to be rounded again."""
        asked = self.quantization
        form = form_that_holds(bits, group, int8_activations=asked.int8_activations if asked else int8_activations)
        return None if asked is not None and form is not None and form.bits > asked.bits else form

    def prepare_linear(
        self,
        weight: Tensor | Stacked | WeightCodes,
        bias: Tensor | None,
        *,
        exact: bool = False,
        activation: str | None = None,
    ) -> Linear:
        """Pack."""
        quantization = None if exact else self.quantization
        return PackedLinear(weight, bias, activation=activation, quantization=quantization, ahead=self.ahead)

    def prepare_gated_linear(
        self,
        gate: Tensor | WeightCodes,
        up: Tensor | WeightCodes,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        *,
        activation: str = "silu",
    ) -> Linear:
        """Pack both into one."""
        return PackedLinear(
            gate, gate_bias, up, up_bias, activation=activation, quantization=self.quantization, ahead=self.ahead
        )

    @staticmethod
    def prepare_embedding(
        table: Callable[[], Tensor], dtype: str, *, scale: float = 1.0, tied: Linear | None = None
    ) -> Embedding:
        """See ``ops.Ops``; ``dtype`` is float32."""
        assert dtype == "float32"
        if isinstance(tied, PackedLinear) and tied.holds_rows:
            return partial(tied.embed, scale=scale)
        return partial(embed, table=table(), scale=scale)

    @staticmethod
    def record(first: First, rest: Rest, head: Head, block_size: int) -> NativeReplay:
        """Return what repeats all three."""
        return NativeReplay(first, rest, head, block_size)

    @staticmethod
    def add(x: Tensor, y: Tensor, *, scale: float = 1.0) -> Tensor:
        """See ``add/reference.py``; overwrites ``x``."""
        assert NATIVE is not None
        num_tokens, width = x.shape
        addresses = checked(x, "float32", num_tokens, width), checked(y, "float32", num_tokens, width)
        NATIVE.add(*addresses, num_tokens, width, scale)
        return x

    @staticmethod
    def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        """See ``rms_norm/reference.py``; ``x`` is [T, E] float32."""
        assert NATIVE is not None
        num_rows, width = x.shape
        out = empty(num_rows, width) if out is None else out
        NATIVE.rms_norm(
            *checked_rows(x, num_rows, width),
            checked(weight, "float32", width),
            *checked_rows(out, num_rows, width),
            num_rows,
            width,
            eps,
        )
        return out

    @staticmethod
    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """See ``layer_norm/reference.py``; ``x`` is [T, E] float32."""
        assert NATIVE is not None
        num_rows, width = x.shape
        out = empty(num_rows, width)
        NATIVE.layer_norm(
            checked(x, "float32", num_rows, width),
            checked(weight, "float32", width),
            checked(bias, "float32", width),
            out.data_ptr(),
            num_rows,
            width,
            eps,
        )
        return out

    @staticmethod
    def rope_angles(
        positions: Tensor, inverse: Tensor, head_dim: int, *, factor: float = 1.0, axes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See ``rope_angles/reference.py``."""
        assert NATIVE is not None
        if inverse.ndim == 2:  # as dynamic scaling has it
            from penstock.kernels.rope_angles.reference import rope_angles as reference_angles

            return reference_angles(positions, inverse, head_dim, factor=factor, axes=axes)
        num_tokens, (num_pairs,) = positions.shape[-1], inverse.shape
        if head_dim % 2 or 2 * num_pairs > head_dim:
            raise KernelUnsupported(f"{num_pairs} pairs do not fit in a head of {head_dim}")
        cos, sin = empty(num_tokens, head_dim), empty(num_tokens, head_dim)
        NATIVE.rope_angles(
            checked(positions, "int64", *(() if axes is None else (len(positions),)), num_tokens),
            num_tokens,
            0 if axes is None else checked(axes, "int64", num_pairs),
            checked(inverse, "float32", num_pairs),
            num_pairs,
            head_dim,
            factor,
            cos.data_ptr(),
            sin.data_ptr(),
        )
        return cos.unsqueeze(1), sin.unsqueeze(1)

    @staticmethod
    def rope_write_kv(
        qkv: Tensor,
        kv: KVBlocks,
        layout: BatchLayout,
        cos: Tensor,
        sin: Tensor,
        *,
        num_heads: int,
        num_kv_heads: int,
        norms: HeadNorms | None,
    ) -> Tensor:
        """See ``rope_write_kv/reference.py``; rotates the queries where they lie."""
        assert NATIVE is not None
        H, G, D, P = num_heads, num_kv_heads, cos.shape[-1], layout.block_size
        T = qkv.shape[0]
        NATIVE.rope_write_kv(
            checked(qkv, "float32", T, (H + 2 * G) * D),
            T,
            H,
            G,
            D,
            checked(cos, "float32", T, 1, D),
            checked(sin, "float32", T, 1, D),
            checked(layout.slots, "int64", T),
            0 if norms is None else checked(norms.q, "float32", D),
            0 if norms is None else checked(norms.k, "float32", D),
            0.0 if norms is None else norms.eps,
            P,
            *cache_addresses(kv, G, D, P),
        )
        return qkv.view(T, H + 2 * G, D)[:, :H]


def ops_for(weights_dtype: str, quantize: str | None = None) -> Ops:
    """Return the fastest backend there is for weights of ``weights_dtype``, to be kept as ``quantize`` says.

    Raises ``InvalidSetting`` for a precision nobody knows and ``KernelUnsupported`` where native kernels are missing.
    """
    if quantize not in (None, *QUANTIZATIONS):
        raise InvalidSetting(f"quantize is {quantize!r}; it can be {', '.join(QUANTIZATIONS)}", param="runner.quantize")
    if NATIVE is not None and weights_dtype in FLOAT_KINDS:
        return CPUOps(QUANTIZATIONS[quantize] if quantize else None)
    if quantize is not None:
        raise KernelUnsupported(
            f"weights of {weights_dtype} cannot be kept in {quantize} here: that takes native kernels, which read "
            "bfloat16 and float32; install a C++ compiler and penstock again, or choose --dtype bfloat16"
        )
    from penstock.kernels.reference import ReferenceOps

    return ReferenceOps()
