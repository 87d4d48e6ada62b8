"""Mask embedding: the refined mask modulates the features (BINet; spatial feature transform, Wang et al., CVPR 2018).

Legend: N pictures, H x W pixels, h x w cells, S channels of the modulated features, D channels of the condition.
"""

from torch import Tensor, nn
from torch.nn import functional as F

LEAK = 0.1
# The mask is repeated to this many channels before the first convolution, which fixes that weight's published shape.
MASK_COPIES = 8


class ConditionNetwork(nn.Sequential):
    """Refined mask (N, 1, H, W) -> condition (N, D, h, w): strided conv to cells, four 1x1 convs, LeakyReLU between."""

    def __init__(self, *, stride: tuple[int, int] = (4, 4), hidden_channels: int = 128, condition_channels: int = 32):
        layers: list[nn.Module] = [nn.Conv2d(MASK_COPIES, hidden_channels, kernel_size=stride, stride=stride)]
        for channels in (hidden_channels, hidden_channels, hidden_channels, condition_channels):
            layers += [nn.LeakyReLU(LEAK, inplace=True), nn.Conv2d(hidden_channels, channels, kernel_size=1)]
        super().__init__(*layers)

    def forward(self, mask: Tensor) -> Tensor:
        first, *rest = self
        # The copies are never made: all are the same, so their weights add up. A convolution whose windows do not
        # overlap is one product for each window; written so, the channels of a cell lie side by side for what follows.
        weight = first.weight.sum(dim=1)  # (hidden_channels, *stride)
        rows, columns = first.stride
        windows = mask.to(weight.dtype).unflatten(3, (-1, columns)).unflatten(2, (-1, rows))
        windows = windows.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (N, h, w, rows * columns)
        condition = F.linear(windows, weight.flatten(1), first.bias).permute(0, 3, 1, 2)
        for layer in rest:
            condition = layer(condition)
        return condition


class SpatialFeatureTransform(nn.Module):
    """x * (scale(c) + 1) + shift(c); scale and shift are each 1x1 conv, LeakyReLU, 1x1 conv of the condition."""

    def __init__(self, *, sft_channels: int = 64, condition_channels: int = 32):
        super().__init__()
        self.SFT_scale_conv0 = nn.Conv2d(condition_channels, condition_channels, kernel_size=1)
        self.SFT_scale_conv1 = nn.Conv2d(condition_channels, sft_channels, kernel_size=1)
        self.SFT_shift_conv0 = nn.Conv2d(condition_channels, condition_channels, kernel_size=1)
        self.SFT_shift_conv1 = nn.Conv2d(condition_channels, sft_channels, kernel_size=1)

    def forward(self, feature: Tensor, condition: Tensor) -> Tensor:
        """feature (N, S, h, w), condition (N, D, h, w) -> (N, S, h, w)."""
        scale = self.SFT_scale_conv1(F.leaky_relu(self.SFT_scale_conv0(condition), LEAK))
        shift = self.SFT_shift_conv1(F.leaky_relu(self.SFT_shift_conv0(condition), LEAK))
        return feature * (scale + 1) + shift


class ModulatedBlock(nn.Module):
    """Residual block: SFT, 3x3 conv, ReLU, SFT, 3x3 conv, plus the input."""

    def __init__(self, *, sft_channels: int = 64, condition_channels: int = 32):
        super().__init__()
        self.sft0 = SpatialFeatureTransform(sft_channels=sft_channels, condition_channels=condition_channels)
        self.conv0 = nn.Conv2d(sft_channels, sft_channels, kernel_size=3, padding=1)
        self.sft1 = SpatialFeatureTransform(sft_channels=sft_channels, condition_channels=condition_channels)
        self.conv1 = nn.Conv2d(sft_channels, sft_channels, kernel_size=3, padding=1)

    def forward(self, feature: Tensor, condition: Tensor) -> Tensor:
        hidden = F.relu(self.conv0(self.sft0(feature, condition)), inplace=True)
        return feature + self.conv1(self.sft1(hidden, condition))


class ModulatedStack(nn.ModuleList):
    """`sft_blocks` residual blocks, one more SFT and a 3x3 conv, all under one condition; the caller adds the input."""

    def __init__(self, *, sft_blocks: int = 16, sft_channels: int = 64, condition_channels: int = 32):
        channels = {"sft_channels": sft_channels, "condition_channels": condition_channels}
        super().__init__([ModulatedBlock(**channels) for _ in range(sft_blocks)])
        self.append(SpatialFeatureTransform(**channels))
        self.append(nn.Conv2d(sft_channels, sft_channels, kernel_size=3, padding=1))

    def forward(self, feature: Tensor, condition: Tensor) -> Tensor:
        """feature (N, S, h, w), condition (N, D, h, w) -> (N, S, h, w)."""
        *modulations, last_conv = self
        for modulate in modulations:
            feature = modulate(feature, condition)
        return last_conv(feature)
