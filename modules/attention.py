"""The vision model's two kinds of attention: for each step, weights over the cells of a feature map.

Legend: N images, T steps, E features, h x w cells, K = h*w.
"""

import math

from torch import Tensor, nn

from modules.transformer import PositionalEncoding

# Strides of the key encoder's convolutions; the first halves the width only, because word images are wide.
KEY_STRIDES = ((1, 2), (2, 2), (2, 2), (2, 2))


class PositionAttention(nn.Module):
    """Attends with positions as queries and a small U-net on the features as keys (ABINet, position attention).

    weights = softmax(q k^T / sqrt(E)) over the cells; values are the features themselves. The U-net resizes each map to
    the size of the encoder map that it adds, so any feature map works. Training with one image needs at least two cells
    in the deepest map (batch norm), that is h > 8 or w > 16.
    """

    float32_layers = ("project", "pos_encoder")
    float32_outputs = ("k_decoder",)

    def __init__(
        self,
        *,
        num_steps: int = 26,
        cells: tuple[int, int] = (8, 32),
        d_model: int = 512,
        attention_channels: int = 64,
        attention_mode: str = "nearest",
    ):
        super().__init__()
        self.cells = tuple(cells)
        sizes = [self.cells]
        for stride in KEY_STRIDES:
            sizes.append(tuple(math.ceil(n / s) for n, s in zip(sizes[-1], stride, strict=True)))
        in_channels = (d_model, *[attention_channels] * (len(KEY_STRIDES) - 1))
        self.k_encoder = nn.ModuleList(
            _encoder_step(channels, attention_channels, s) for channels, s in zip(in_channels, KEY_STRIDES, strict=True)
        )
        out_channels = (*in_channels[:0:-1], d_model)
        self.k_decoder = nn.ModuleList(
            _decoder_step(attention_channels, channels, size, attention_mode)
            for channels, size in zip(out_channels, sizes[-2::-1], strict=True)
        )
        self.pos_encoder = PositionalEncoding(length=num_steps, d_model=d_model, dropout=0.0)
        self.project = nn.Linear(d_model, d_model)

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """feature (N, E, h, w) -> one vector per step (N, T, E), weights (N, T, h, w)."""
        query = self.project(self.pos_encoder.positions())  # (1, T, E)
        keys = self._keys(feature).flatten(2)  # (N, E, K)
        weights = (query @ keys / math.sqrt(query.shape[-1])).softmax(dim=-1)  # (N, T, K)
        return weights @ feature.flatten(2).transpose(1, 2), weights.unflatten(-1, self.cells)

    def _keys(self, feature: Tensor) -> Tensor:
        encoded = []
        keys = feature
        for encode in self.k_encoder:
            keys = encode(keys)
            encoded.append(keys)
        *decoders, last_decoder = self.k_decoder
        for decode, skipped in zip(decoders, encoded[-2::-1], strict=True):
            keys = decode(keys) + skipped
        return last_decoder(keys)  # (N, E, h, w)


class ReadingOrderAttention(nn.Module):
    """Attends with scores of a reading-order embedding and the features (BINet's `attention: attention`).

    weights = softmax over cells of we(tanh(w0(f0_embedding) + wv(feature))); values are the features themselves.
    `w0` mixes the T embedded positions into one vector per cell, which fixes the number of cells.
    """

    float32_layers = ("we",)

    def __init__(self, *, num_steps: int = 26, cells: tuple[int, int] = (8, 32), d_model: int = 512):
        super().__init__()
        self.cells = tuple(cells)
        self.f0_embedding = nn.Embedding(num_steps, d_model)
        self.w0 = nn.Linear(num_steps, math.prod(cells))
        self.wv = nn.Linear(d_model, d_model)
        self.we = nn.Linear(d_model, num_steps)

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """feature (N, E, h, w) -> one vector per step (N, T, E), weights (N, T, h, w)."""
        values = feature.flatten(2).transpose(1, 2)  # (N, K, E)
        order = self.w0(self.f0_embedding.weight.T).T  # (K, E)
        scores = self.we((order + self.wv(values)).tanh())  # (N, K, T)
        weights = scores.transpose(1, 2).softmax(dim=-1)  # (N, T, K)
        return weights @ values, weights.unflatten(-1, self.cells)


def _encoder_step(in_channels: int, out_channels: int, stride: tuple[int, int]) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def _decoder_step(in_channels: int, out_channels: int, size: tuple[int, int], mode: str) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
    return nn.Sequential(nn.Upsample(size=size, mode=mode), conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))
