"""Post-norm transformer layers and sinusoidal positions ("Attention Is All You Need", 2017), batch first.

torch's own layers are not used: `nn.TransformerEncoderLayer` and `nn.MultiheadAttention` switch to another kernel in
eval mode, which neither autocast nor a compiled or exported graph takes, and the language model's decoder layer has no
counterpart there: no self-attention, and queries that all texts share. Parameter names and initial values are torch's.

Legend: N pictures, L query steps, S memory steps, E features, D features of one head.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.dropout import Dropout, dropout, relu_dropout

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


def sinusoids(length: int, d_model: int) -> Tensor:
    """Positions (length, d_model): sin(t / 10000^(2i / d_model)) at feature 2i, the cosine of that angle at 2i + 1."""
    if d_model % 2:
        raise ValueError(f"sinusoidal positions need an even number of features, got d_model={d_model}")
    position = torch.arange(length, dtype=torch.float32)[:, None]
    frequency = torch.exp(torch.arange(0, d_model, 2, dtype=torch.float32) * (-math.log(10000.0) / d_model))
    angle = position * frequency  # (length, d_model / 2)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)


class PositionalEncoding(nn.Module):
    """Adds sinusoidal positions to a sequence (N, L, E), then dropout. `pe` is (length, 1, E), as published."""

    def __init__(self, *, length: int, d_model: int = 512, dropout: float = 0.1):
        super().__init__()
        self.dropout = Dropout(dropout)
        self.register_buffer("pe", sinusoids(length, d_model)[:, None])

    def positions(self) -> Tensor:
        """The positions alone, (1, length, E)."""
        return self.pe.transpose(0, 1)

    def forward(self, sequence: Tensor) -> Tensor:
        return self.dropout(sequence + self.positions()[:, : sequence.shape[1]])


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, p: float = 0.0) -> Tensor:
    """dropout(softmax(q k^T / sqrt(D) + mask)) v: q (N, nhead, L, D), k and v (N, nhead, S, D) -> (N, nhead, L, D)."""
    lowered = q.dtype != torch.float32 and torch.is_grad_enabled()
    if q.device.type == "cpu" and (lowered or p > 0):
        # Written out: the fused kernel of a CPU takes nearly twice the time to go back in 16 bits, and has no dropout.
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)  # (N, nhead, L, S)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        return dropout(scores.softmax(dim=-1).to(v.dtype), p) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)


class MultiheadAttention(nn.Module):
    """softmax(q k^T / sqrt(D) + mask) v in `nhead` heads; the weights are not returned."""

    def __init__(self, *, d_model: int = 512, nhead: int = 8, dropout: float = 0.1):
        super().__init__()
        if d_model % nhead:
            raise ValueError(f"d_model={d_model} must be a multiple of nhead={nhead}")
        self.nhead = nhead
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * d_model, d_model))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * d_model))
        self.out_proj = nn.Linear(d_model, d_model)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """query (N or 1, L, E), memory (N, S, E) -> (N, L, E).

        `mask` broadcasts to (N, nhead, L, S); True = may attend.
        """
        if query is memory:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            d_model = query.shape[-1]
            query_weight, memory_weight = self.in_proj_weight.split((d_model, 2 * d_model))
            query_bias, memory_bias = self.in_proj_bias.split((d_model, 2 * d_model))
            # A query that is the same for every picture (N = 1) is projected once and then shared.
            q = F.linear(query, query_weight, query_bias).expand(memory.shape[0], -1, -1)
            k, v = F.linear(memory, memory_weight, memory_bias).chunk(2, dim=-1)
        q, k, v = (self._split_heads(x) for x in (q, k, v))
        attended = attend(q, k, v, mask, self.dropout if self.training else 0.0)  # (N, nhead, L, D)
        return self.out_proj(attended.transpose(1, 2).flatten(2))  # (N, L, E)

    def _split_heads(self, sequence: Tensor) -> Tensor:
        return sequence.unflatten(-1, (self.nhead, -1)).transpose(1, 2)  # (N, nhead, L, D)


class _FeedForwardLayer(nn.Module):
    """What encoder and decoder layers share: linear, activation, dropout, linear."""

    def __init__(self, *, d_model: int, d_inner: int, dropout: float, activation: str):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
        self.activation = ACTIVATIONS[activation]
        self.linear1 = nn.Linear(d_model, d_inner)
        self.linear2 = nn.Linear(d_inner, d_model)
        self.dropout = Dropout(dropout)

    def feed_forward(self, sequence: Tensor) -> Tensor:
        hidden = self.linear1(sequence)  # (N, L, d_inner)
        if self.training and self.activation is F.relu:
            return self.linear2(relu_dropout(hidden, self.dropout.p))
        return self.linear2(self.dropout(self.activation(hidden)))


class TransformerEncoderLayer(_FeedForwardLayer):
    """Post-norm: x = norm1(x + attention(x)); x = norm2(x + feed_forward(x))."""

    def __init__(
        self,
        *,
        d_model: int = 512,
        nhead: int = 8,
        d_inner: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
    ):
        super().__init__(d_model=d_model, d_inner=d_inner, dropout=dropout, activation=activation)
        self.self_attn = MultiheadAttention(d_model=d_model, nhead=nhead, dropout=dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)

    def forward(self, sequence: Tensor) -> Tensor:
        sequence = self.norm1(sequence + self.dropout(self.self_attn(sequence, sequence)))
        return self.norm2(sequence + self.dropout(self.feed_forward(sequence)))  # (N, L, E)


class TransformerEncoder(nn.Module):
    """`num_layers` encoder layers in a row, (N, L, E) -> (N, L, E)."""

    def __init__(
        self,
        *,
        num_layers: int = 3,
        d_model: int = 512,
        nhead: int = 8,
        d_inner: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
    ):
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerEncoderLayer(
                d_model=d_model, nhead=nhead, d_inner=d_inner, dropout=dropout, activation=activation
            )
            for _ in range(num_layers)
        )

    def forward(self, sequence: Tensor) -> Tensor:
        for layer in self.layers:
            sequence = layer(sequence)
        return sequence


class TransformerDecoderLayer(_FeedForwardLayer):
    """Post-norm layer that reads a memory; self-attention among the queries only where asked for.

    x = norm1(x + self_attention(x)) if `use_self_attn`; x = norm2(x + attention(x, memory));
    x = norm3(x + feed_forward(x)).
    """

    def __init__(
        self,
        *,
        d_model: int = 512,
        nhead: int = 8,
        d_inner: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        use_self_attn: bool = False,
    ):
        super().__init__(d_model=d_model, d_inner=d_inner, dropout=dropout, activation=activation)
        self.use_self_attn = use_self_attn
        if use_self_attn:
            self.self_attn = MultiheadAttention(d_model=d_model, nhead=nhead, dropout=dropout)
            self.norm1 = nn.LayerNorm(d_model)
        self.multihead_attn = MultiheadAttention(d_model=d_model, nhead=nhead, dropout=dropout)
        self.norm2 = nn.LayerNorm(d_model)
        self.norm3 = nn.LayerNorm(d_model)

    def forward(
        self, query: Tensor, memory: Tensor, memory_mask: Tensor | None = None, query_mask: Tensor | None = None
    ) -> Tensor:
        """query (N or 1, L, E), memory (N, S, E) -> (N, L, E).

        Masks are as in `MultiheadAttention`, `query_mask` that of self-attention.
        """
        if self.use_self_attn:
            # Queries that all texts share part here: each text masks them at its own length.
            query = query.expand(memory.shape[0], -1, -1)
            query = self.norm1(query + self.dropout(self.self_attn(query, query, query_mask)))
        query = self.norm2(query + self.dropout(self.multihead_attn(query, memory, memory_mask)))
        return self.norm3(query + self.dropout(self.feed_forward(query)))


class TransformerDecoder(nn.Module):
    """`num_layers` decoder layers in a row over one memory."""

    def __init__(
        self,
        *,
        num_layers: int = 4,
        d_model: int = 512,
        nhead: int = 8,
        d_inner: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        use_self_attn: bool = False,
    ):
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerDecoderLayer(
                d_model=d_model,
                nhead=nhead,
                d_inner=d_inner,
                dropout=dropout,
                activation=activation,
                use_self_attn=use_self_attn,
            )
            for _ in range(num_layers)
        )

    def forward(
        self, query: Tensor, memory: Tensor, memory_mask: Tensor | None = None, query_mask: Tensor | None = None
    ) -> Tensor:
        for layer in self.layers:
            query = layer(query, memory, memory_mask, query_mask)
        return query
