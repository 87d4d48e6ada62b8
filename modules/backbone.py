"""ABINet's ResNet45 with BINet's two side outputs, and the transformer encoder on top of it.

Legend: N images, H x W pixels, h x w cells of the feature map (8 x 32 for 32 x 128 pixels), E features.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.transformer import PositionalEncoding, TransformerEncoder

Stride = int | Sequence[int]


def row_and_column(stride: Stride) -> tuple[int, int]:
    """Return a stride as (rows, columns); one number stands for both."""
    return (stride, stride) if isinstance(stride, int) else (stride[0], stride[1])


class BackboneFeatures(NamedTuple):
    """Output of a backbone.

    `feature` (N, E, h, w) is what the text is predicted from. The other two are for the mask branch, and None without
    it: mask refinement compares the pixels of `semantic` (N, E, h, w) with the text, and weights `side` (N,
    side_channels, h, w) by their similarity.
    """

    feature: Tensor
    semantic: Tensor | None = None
    side: Tensor | None = None


class ResidualBlock(nn.Module):
    """1x1 conv, BN, ReLU, 3x3 conv (the stride is here), BN, plus the input, ReLU."""

    def __init__(self, *, in_channels: int, out_channels: int, stride: Stride = 1):
        super().__init__()
        self.stride = row_and_column(stride)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, stride=self.stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = None
        if self.stride != (1, 1) or in_channels != out_channels:
            conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        # Not a strided 1x1 convolution, which gives the same numbers: its backward pass corrupts memory on a CPU
        # (oneDNN, channels-last, 8 channels; torch 2.14).
        rows, columns = self.stride
        shortcut = x if self.downsample is None else self.downsample(x[..., ::rows, ::columns])
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(x)).add_(shortcut), inplace=True)


class ResNet(nn.Module):
    """Residual network for word images: a 3x3 stem at full resolution and one stage for each entry of `widths`.

    `strides` are those of each stage's first block, one number or (rows, columns). With `mask_branch` the last two
    stages, `a` and `b`, also feed BINet's side outputs `cls(b)` and `side5_1(concat(side3_1(a), b))`, so the last
    stage must keep the size.
    """

    float32_layers = ("conv1", "layer1", "layer2")

    def __init__(
        self,
        *,
        stem_width: int = 32,
        widths: Sequence[int] = (32, 64, 128, 256, 512),
        depths: Sequence[int] = (3, 4, 6, 6, 3),
        strides: Sequence[Stride] = (2, 1, 2, 1, 1),
        mask_branch: bool = False,
        side_channels: int = 128,
    ):
        super().__init__()
        self.strides = tuple(row_and_column(stride) for stride in strides)
        self.out_channels = widths[-1]
        self.side_channels = side_channels
        self.mask_branch = mask_branch
        self.conv1 = nn.Conv2d(3, stem_width, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_width)
        channels = stem_width
        for number, (width, depth, stride) in enumerate(zip(widths, depths, self.strides, strict=True), start=1):
            blocks = [ResidualBlock(in_channels=channels, out_channels=width, stride=stride)]
            blocks += [ResidualBlock(in_channels=width, out_channels=width) for _ in range(depth - 1)]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            channels = width
        for module in self.modules():  # normal, variance 2 / (k * k * out); batch norms start as torch's
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if mask_branch:
            self.cls = _side_layer(widths[-1], widths[-1])
            self.side3_1 = _side_layer(widths[-2], side_channels, nn.ReLU(inplace=True))
            self.side5_1 = _side_layer(side_channels + widths[-1], side_channels)

    def output_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Return the size (h, w) of the feature map of an image of `image_size` (H, W)."""
        height, width = image_size
        for rows, columns in self.strides:
            height, width = math.ceil(height / rows), math.ceil(width / columns)
        return height, width

    def forward(self, image: Tensor) -> BackboneFeatures:
        """image (N, 3, H, W) -> features on h x w cells."""
        x = F.relu(self.bn1(self.conv1(image)), inplace=True)  # (N, stem_width, H, W)
        stages = []
        for number in range(1, len(self.strides) + 1):
            x = self.get_submodule(f"layer{number}")(x)
            stages.append(x)
        if not self.mask_branch:
            return BackboneFeatures(feature=x)
        a, b = stages[-2:]
        side = self.side5_1(torch.cat((self.side3_1(a), b), dim=1))
        return BackboneFeatures(feature=b, semantic=self.cls(b), side=side)


def _side_layer(in_channels: int, out_channels: int, *activation: nn.Module) -> nn.Sequential:
    """Return a 3x3 conv of the mask branch, Xavier uniform; published names contain its index in the Sequential."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, *activation)


class TransformerBackbone(nn.Module):
    """ResNet, then a transformer encoder over its cells row by row (ABINet, vision model).

    The ResNet's side outputs are passed on. With `positional_encoding`, sinusoidal positions and dropout come before
    the encoder, as in ABINet but not in BINet.
    """

    float32_layers = ("pos_encoder",)

    def __init__(
        self,
        *,
        resnet: ResNet,
        image_size: tuple[int, int] = (32, 128),
        num_layers: int = 3,
        nhead: int = 8,
        d_inner: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        positional_encoding: bool = False,
    ):
        super().__init__()
        self.resnet = resnet
        self.out_channels = resnet.out_channels
        self.side_channels = resnet.side_channels
        self.mask_branch = resnet.mask_branch
        self.pos_encoder = None
        if positional_encoding:
            cells = math.prod(resnet.output_size(image_size))
            self.pos_encoder = PositionalEncoding(length=cells, d_model=self.out_channels, dropout=dropout)
        layer = {"nhead": nhead, "d_inner": d_inner, "dropout": dropout, "activation": activation}
        self.transformer = TransformerEncoder(num_layers=num_layers, d_model=self.out_channels, **layer)

    def output_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Return the size (h, w) of the feature map of an image of `image_size` (H, W)."""
        return self.resnet.output_size(image_size)

    def forward(self, image: Tensor) -> BackboneFeatures:
        features = self.resnet(image)
        height, width = features.feature.shape[-2:]
        sequence = features.feature.flatten(2).transpose(1, 2)  # (N, h*w, E)
        if self.pos_encoder is not None:
            sequence = self.pos_encoder(sequence)
        sequence = self.transformer(sequence)
        return features._replace(feature=sequence.transpose(1, 2).unflatten(2, (height, width)))  # (N, E, h, w)
