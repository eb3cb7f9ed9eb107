"""penstock-mini in plain torch: a Llama decoder whose parameter names are the Hugging Face ones.

Dimension letters: B sequences, T tokens, E hidden width, H query heads, G KV heads, D head width, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The shape of the model; the defaults are penstock-mini's."""

    vocab_size: int = 6144
    hidden_size: int = 256
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 768
    max_positions: int = 2048
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5


@dataclass(frozen=True, slots=True)
class Layout:
    """Rows that are not one text from left to right: where each token counts as standing, and what it can see."""

    positions: Tensor
    """[B, T]"""
    mask: Tensor
    """Whether the token of the third dimension sees that of the fourth [B, 1, T, T]"""


class RMSNorm(nn.Module):
    """Scale by the reciprocal root mean square of the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """The scaled x, its shape unchanged."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        q_width = config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, config.hidden_size, bias=False)

    def forward(self, x_BTE: Tensor, cos_TD: Tensor, sin_TD: Tensor, mask_B1TT: Tensor | None = None) -> Tensor:
        """What each token gathers from itself and the tokens before it, or from those its mask names [B, T, E]."""
        config = self.config
        B, T, _ = x_BTE.shape
        q_BHTD = self.q_proj(x_BTE).view(B, T, config.num_heads, config.head_dim).transpose(1, 2)
        k_BGTD = self.k_proj(x_BTE).view(B, T, config.num_kv_heads, config.head_dim).transpose(1, 2)
        v_BGTD = self.v_proj(x_BTE).view(B, T, config.num_kv_heads, config.head_dim).transpose(1, 2)
        q_BHTD = rotate(q_BHTD, cos_TD, sin_TD)
        repeats = config.num_heads // config.num_kv_heads
        k_BHTD = rotate(k_BGTD, cos_TD, sin_TD).repeat_interleave(repeats, dim=1)
        v_BHTD = v_BGTD.repeat_interleave(repeats, dim=1)
        mixed_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, mask_B1TT, is_causal=mask_B1TT is None)
        out_BTE: Tensor = self.o_proj(mixed_BHTD.transpose(1, 2).reshape(B, T, -1))
        return out_BTE


class MLP(nn.Module):
    """The gated SiLU feed-forward block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Each token transformed by itself, its shape unchanged."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """Attention, then the feed-forward block, each behind a norm and added back."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BTE: Tensor, cos_TD: Tensor, sin_TD: Tensor, mask_B1TT: Tensor | None = None) -> Tensor:
        """The residual stream after this layer [B, T, E]."""
        x_BTE = x_BTE + self.self_attn(self.input_layernorm(x_BTE), cos_TD, sin_TD, mask_B1TT)
        out_BTE: Tensor = x_BTE + self.mlp(self.post_attention_layernorm(x_BTE))
        return out_BTE


class Decoder(nn.Module):
    """Embedding, layers and final norm: what Hugging Face keeps under `model.`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class MiniModel(nn.Module):
    """The language model; its input embedding is also its output projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        cos_TD, sin_TD = rope_tables(config)
        self.cos_TD: Tensor
        self.sin_TD: Tensor
        self.register_buffer("cos_TD", cos_TD, persistent=False)
        self.register_buffer("sin_TD", sin_TD, persistent=False)
        self.initialize()

    def initialize(self) -> None:
        """Draw the weights anew; projections back into the residual stream start smaller, by depth."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = (2 * self.config.num_layers) ** -0.5 if writes_residual else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)

    def hidden(self, ids_BT: Tensor) -> Tensor:
        """The final normed hidden states [B, T, E]."""
        out_BTE: Tensor = self.model.norm(self.streams(self.model.embed_tokens(ids_BT))[-1])
        return out_BTE

    def streams(self, x_BTE: Tensor, layout: Layout | None = None) -> list[Tensor]:
        """The residual stream of embeddings before each layer and after the last, [B, T, E] each, not yet normed."""
        cos_TD, sin_TD = self.turns(x_BTE.shape[1], layout)
        streams = [x_BTE]
        for layer in self.model.layers:
            streams.append(layer(streams[-1], cos_TD, sin_TD, layout and layout.mask))
        return streams

    def turns(self, num_tokens: int, layout: Layout | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the tokens' places: [T, D], or [B, 1, T, D] in a layout."""
        if layout is None:
            return self.cos_TD[:num_tokens], self.sin_TD[:num_tokens]
        return self.cos_TD[layout.positions].unsqueeze(1), self.sin_TD[layout.positions].unsqueeze(1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary for hidden states of any leading shape."""
        return F.linear(hidden, self.model.embed_tokens.weight)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits [B, T, V]."""
        return self.logits(self.hidden(ids_BT))


def rope_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables [positions, D], each half-width repeated twice as Llama has it."""
    inverse = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    angles = torch.outer(torch.arange(config.max_positions, dtype=torch.float32), inverse)
    both = torch.cat((angles, angles), dim=-1)
    return both.cos(), both.sin()


def rotate(x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Turn each (i, i + D/2) pair by its position's angle."""
    low, high = x_BHTD.chunk(2, dim=-1)
    return x_BHTD * cos_TD + torch.cat((-high, low), dim=-1) * sin_TD
