"""torch's post-norm transformer layers and sinusoidal positions ("Attention Is All You Need", 2017), batch first.

Legend: N images or texts, L query steps, S memory steps, E features.

Inside, steps come first: torch's attention transposes a sequence whose batch comes first, and in inference its linear
layers then multiply the transposed view step by step, each with a copy of the weights.
"""

import math

import torch
from torch import Tensor, nn


def sinusoids(length: int, d_model: int) -> Tensor:
    """Return positions (length, d_model): sin(t / 10000^(2i / d_model)) at feature 2i, its cosine at 2i + 1."""
    position = torch.arange(length, dtype=torch.float32)[:, None]
    frequency = torch.exp(torch.arange(0, d_model, 2, dtype=torch.float32) * (-math.log(10000.0) / d_model))
    angle = position * frequency  # (length, d_model / 2)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)


def steps_first(sequence: Tensor) -> Tensor:
    """Return a sequence with its first two dimensions exchanged, (N, L, E) <-> (L, N, E), contiguous."""
    return sequence.transpose(0, 1).contiguous()


class PositionalEncoding(nn.Module):
    """Adds sinusoidal positions to a sequence (N, L, E), then dropout. `pe` is (length, 1, E), as published."""

    def __init__(self, *, length: int, d_model: int = 512, dropout: float = 0.1):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("pe", sinusoids(length, d_model)[:, None])

    def positions(self) -> Tensor:
        """Return the positions alone, (1, length, E)."""
        return self.pe.transpose(0, 1)

    def forward(self, sequence: Tensor) -> Tensor:
        return self.dropout(sequence + self.positions()[:, : sequence.shape[1]])


class TransformerEncoder(nn.TransformerEncoder):
    """A stack of torch's encoder layers, (N, L, E) -> (N, L, E)."""

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
        layers = [nn.TransformerEncoderLayer(d_model, nhead, d_inner, dropout, activation) for _ in range(num_layers)]
        super().__init__(layers[0], num_layers, enable_nested_tensor=False)
        self.layers = nn.ModuleList(layers)  # torch copies one layer, so all would start from the same values
        _keep_parameter_order(self.layers)

    def forward(self, sequence: Tensor) -> Tensor:
        return steps_first(super().forward(steps_first(sequence)))


class CrossAttentionLayer(nn.TransformerDecoderLayer):
    """torch's decoder layer without self-attention: x = norm2(x + attention(x, memory)); x = norm3(x + ffn(x))."""

    def __init__(self, *arguments: object, **options: object):
        super().__init__(*arguments, **options)
        del self.self_attn, self.norm1, self.dropout1

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        *,
        memory_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """tgt (L, N, E), memory (S, N, E) -> (L, N, E); masks as in torch's layer, that of `tgt` is not used."""
        tgt = self.norm2(tgt + self._mha_block(tgt, memory, memory_mask, memory_key_padding_mask))
        return self.norm3(tgt + self._ff_block(tgt))


class TransformerDecoder(nn.Module):
    """A stack of decoder layers over one memory, without self-attention unless `use_self_attn`."""

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
        layer = nn.TransformerDecoderLayer if use_self_attn else CrossAttentionLayer
        self.layers = nn.ModuleList(layer(d_model, nhead, d_inner, dropout, activation) for _ in range(num_layers))
        _keep_parameter_order(self.layers)

    def forward(self, query: Tensor, memory: Tensor, **masks: Tensor) -> Tensor:
        """query (N, L, E), memory (N, S, E) -> (N, L, E); `masks` are those of `nn.TransformerDecoderLayer`."""
        query, memory = steps_first(query), steps_first(memory)
        for layer in self.layers:
            query = layer(query, memory, **masks)
        return steps_first(query)


def _keep_parameter_order(layers: nn.ModuleList) -> None:
    """Order the parameters of the layers as in earlier checkpoints, whose optimiser states are matched by order."""
    for layer in layers:
        for name in ("self_attn", "norm1", "multihead_attn", "norm2", "norm3"):
            if name in layer._modules:
                layer._modules[name] = layer._modules.pop(name)
