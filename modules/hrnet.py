"""HRNetV2: branches at several resolutions, fused with each other again and again.

Sun et al., "High-Resolution Representations for Labeling Pixels and Regions" (2019).

Legend: N images, H x W pixels, E_i channels of branch i (`widths`), E = sum of the E_i, h_i x w_i cells of branch i
(H / 4, H / 8, H / 16, ... rounded up).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.functional import resize_aligned


def _conv3x3(inputs: int, outputs: int, *, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def _conv_norm_relu(inputs: int, outputs: int, *, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(_conv3x3(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the input added: (N, E, h, w) -> (N, E, h, w)."""

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(width, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, maps: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(maps)), inplace=True)
        residual = self.bn2(self.conv2(residual))
        return F.relu(residual.add_(maps), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and the input added: (N, inputs, h, w) -> (N, 4 * width, h, w)."""

    expansion = 4

    def __init__(self, *, inputs: int, width: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, maps: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(maps)), inplace=True)
        residual = F.relu(self.bn2(self.conv2(residual)), inplace=True)
        residual = self.bn3(self.conv3(residual))
        return F.relu(residual.add_(self.downsample(maps)), inplace=True)


class FusionModule(nn.Module):
    """Basic blocks on every branch; then each branch becomes the sum of all of them at its size, followed by ReLU.

    Takes and returns a list of maps (N, E_i, h_i, w_i). Smaller maps are enlarged by a 1x1 convolution and bilinear
    interpolation with aligned corners, larger ones reduced by 3x3 convolutions of stride 2.
    """

    def __init__(self, *, widths: Sequence[int], num_blocks: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(*(BasicBlock(width=width) for _ in range(num_blocks))) for width in widths
        )
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(_fusion_path(widths, source, target) for source in range(len(widths)))
            for target in range(len(widths))
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        maps = [branch(each) for branch, each in zip(self.branches, maps, strict=True)]
        return [self._fuse(maps, target) for target in range(len(maps))]

    def _fuse(self, maps: list[Tensor], target: int) -> Tensor:
        size = maps[target].shape[-2:]
        total = maps[target]
        for source, path in enumerate(self.fuse_layers[target]):
            if source != target:
                total = total + resize_aligned(path(maps[source]), size)  # (N, E_target, h_target, w_target)
        return F.relu(total, inplace=True)


def _fusion_path(widths: Sequence[int], source: int, target: int) -> nn.Module:
    """Return the layers between branch `source` and branch `target`, without the interpolation."""
    if source == target:
        return nn.Identity()
    if source > target:
        return nn.Sequential(nn.Conv2d(widths[source], widths[target], 1, bias=False), nn.BatchNorm2d(widths[target]))
    width = widths[source]
    halvings = [_conv_norm_relu(width, width, stride=2) for _ in range(target - source - 1)]
    last = nn.Sequential(_conv3x3(width, widths[target], stride=2), nn.BatchNorm2d(widths[target]))
    return nn.Sequential(*halvings, last)


class HRNet(nn.Module):
    """HRNetV2: (N, 3, H, W) -> (N, E, h_0, w_0), the maps of all branches at a quarter of the image's size, mixed.

    Args:
        widths: channels of the branches, from the highest resolution down; at least two.
        stem_width: channels of the stem, two convolutions of stride 2.
        num_modules: fusion modules of each stage; stage i has i + 2 branches, so there is one number less than widths.
        num_blocks: basic blocks of a branch in each module.
        bottlenecks: bottleneck blocks after the stem.
        bottleneck_width: inner channels of these; they return four times as many.
    """

    def __init__(
        self,
        *,
        widths: Sequence[int] = (48, 96, 192, 384),
        stem_width: int = 64,
        num_modules: Sequence[int] = (1, 4, 3),
        num_blocks: int = 4,
        bottlenecks: int = 4,
        bottleneck_width: int = 64,
    ) -> None:
        super().__init__()
        self.conv1 = _conv3x3(3, stem_width, stride=2)
        self.bn1 = nn.BatchNorm2d(stem_width)
        self.conv2 = _conv3x3(stem_width, stem_width, stride=2)
        self.bn2 = nn.BatchNorm2d(stem_width)
        outputs = bottleneck_width * Bottleneck.expansion
        self.layer1 = nn.Sequential(
            *(Bottleneck(inputs=outputs if i else stem_width, width=bottleneck_width) for i in range(bottlenecks))
        )
        previous = [outputs if bottlenecks else stem_width]
        self.num_stages = len(num_modules)
        for stage, modules in enumerate(num_modules):
            current = list(widths[: stage + 2])
            # Published names count the stem as stage 1.
            self.add_module(f"transition{stage + 1}", _transition(previous, current))
            self.add_module(
                f"stage{stage + 2}",
                nn.Sequential(*(FusionModule(widths=current, num_blocks=num_blocks) for _ in range(modules))),
            )
            previous = current
        self.outputs = sum(widths)
        self.last_layer = nn.Sequential(
            nn.Conv2d(self.outputs, self.outputs, 1), nn.BatchNorm2d(self.outputs), nn.ReLU(inplace=True)
        )
        for module in self.modules():  # variance 2 / (k * k * outputs); with less, a network this deep does not learn
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        maps = F.relu(self.bn1(self.conv1(image)), inplace=True)  # (N, stem, H / 2, W / 2)
        maps = F.relu(self.bn2(self.conv2(maps)), inplace=True)  # (N, stem, h_0, w_0)
        branches = [self.layer1(maps)]
        for stage in range(self.num_stages):
            # The new branch, half as large, starts from the smallest one so far.
            paths = enumerate(getattr(self, f"transition{stage + 1}"))
            branches = [path(branches[min(i, len(branches) - 1)]) for i, path in paths]
            branches = getattr(self, f"stage{stage + 2}")(branches)  # (N, E_i, h_i, w_i) for each i
        return self.mix(branches)

    def mix(self, branches: list[Tensor]) -> Tensor:
        """Bring all branches to the first one's size, concatenate and mix them by `last_layer`: (N, E, h_0, w_0)."""
        size = branches[0].shape[-2:]
        maps = torch.cat([resize_aligned(branch, size) for branch in branches], dim=1)
        return self.last_layer(maps)


def _transition(previous: Sequence[int], current: Sequence[int]) -> nn.ModuleList:
    """Return the layers between the branches of one stage and those of the next, which has one more."""
    paths: list[nn.Module] = []
    for i, width in enumerate(current):
        if i >= len(previous):
            paths.append(nn.Sequential(_conv_norm_relu(previous[-1], width, stride=2)))
        elif previous[i] != width:
            paths.append(_conv_norm_relu(previous[i], width))
        else:
            paths.append(nn.Identity())
    return nn.ModuleList(paths)
