"""Mask embedding: the refined mask modulates the features (BINet; spatial feature transform, Wang et al., CVPR 2018).

Legend: N images, H x W pixels, h x w cells, E features, S channels of the modulated features, D channels
of the condition.
"""

from torch import Tensor, nn
from torch.nn import functional as F

LEAK = 0.1
# Channels that the mask is repeated to before the first convolution; the published weight has this shape.
MASK_COPIES = 8


class ConditionNetwork(nn.Sequential):
    """Refined mask (N, 1, H, W) -> condition (N, D, h, w): strided conv to cells, four 1x1 convs, LeakyReLU between."""

    def __init__(self, *, stride: tuple[int, int] = (4, 4), hidden_channels: int = 128, condition_channels: int = 32):
        layers: list[nn.Module] = [nn.Conv2d(MASK_COPIES, hidden_channels, kernel_size=stride, stride=stride)]
        for channels in (hidden_channels, hidden_channels, hidden_channels, condition_channels):
            layers += [nn.LeakyReLU(LEAK, inplace=True), nn.Conv2d(hidden_channels, channels, kernel_size=1)]
        super().__init__(*layers)

    def forward(self, mask: Tensor) -> Tensor:
        return super().forward(mask.expand(-1, MASK_COPIES, -1, -1))


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
        channels = {"sft_channels": sft_channels, "condition_channels": condition_channels}
        self.sft0 = SpatialFeatureTransform(**channels)
        self.conv0 = nn.Conv2d(sft_channels, sft_channels, kernel_size=3, padding=1)
        self.sft1 = SpatialFeatureTransform(**channels)
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


class MaskEmbedding(nn.Module):
    """Modulates features with the refined mask: c = condnet(r); g = conv0(features); back(g + sft(g, c)).

    `channels` are those of the features; `stride` is how many pixels of the mask a cell of the features covers.
    """

    # Sums over many residual blocks start from the output of these.
    float32_outputs = ("conv0", "back")

    def __init__(
        self,
        *,
        channels: int = 512,
        stride: tuple[int, int] = (4, 4),
        sft_blocks: int = 16,
        sft_channels: int = 64,
        condition_channels: int = 32,
        hidden_channels: int = 128,
    ):
        super().__init__()
        condition = {"condition_channels": condition_channels}
        self.condnet = ConditionNetwork(stride=stride, hidden_channels=hidden_channels, **condition)
        self.conv0 = nn.Conv2d(channels, sft_channels, kernel_size=3, padding=1)
        self.sft = ModulatedStack(sft_blocks=sft_blocks, sft_channels=sft_channels, **condition)
        self.back = nn.Conv2d(sft_channels, channels, kernel_size=3, padding=1)

    def forward(self, feature: Tensor, refined_mask: Tensor) -> Tensor:
        """feature (N, E, h, w), refined_mask (N, 1, H, W) -> (N, E, h, w)."""
        condition = self.condnet(refined_mask)  # c (N, D, h, w)
        modulated = self.conv0(feature)  # g (N, S, h, w)
        return self.back(modulated + self.sft(modulated, condition))
