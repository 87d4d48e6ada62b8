"""SSN, the semantic segmentation network for text: TexRNet's refinement head on HRNet.

Xu et al., "Rethinking Text Segmentation" (CVPR 2021), section 4; BINet section 3.2.

Legend: N images, H x W pixels, h x w cells (a quarter of the pixels, rounded up), P = h * w, E channels of the
backbone, C = 2 classes (0 = background, 1 = text).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.functional import resize_aligned, without_autocast
from modules.hrnet import HRNet

NUM_CLASSES = 2
PUBLISHED_AREAS = (385, 513, 641, 769, 897, 1025, 1153, 1281)
# Cells of the smallest of four maps are 32 pixels apart, so a size of 32 k + 1 has cells on both borders.
_SIZE_STEP = 32


@dataclass
class SegmentationOutput:
    """Output of SSN for a batch of images.

    Attributes:
        semantic_logits: (N, 2, h, w), before the refinement head.
        refined_logits: (N, 2, h, w), after it: the result.
        attention_key: (N, 2, h, w), weight of each cell in the key of each class, not negative.
        attention: (N, 2, h, w), how well each cell matches the key of each class; sums to 1 over classes.
    """

    semantic_logits: Tensor
    refined_logits: Tensor
    attention_key: Tensor
    attention: Tensor


torch.export.register_dataclass(SegmentationOutput, serialized_type_name="binet.SegmentationOutput")


class RefinementHead(nn.Module):
    """Classifies cells, computes a key of each class from the cells that certainly belong to it, refines with both."""

    def __init__(self, *, inputs: int = 720, width: int = 64) -> None:
        super().__init__()
        self.conv_sem = nn.Conv2d(inputs, NUM_CLASSES, 1, bias=False)
        # Outside the convolution, as it is part of the logits but not of the keys.
        self.bias_sem = nn.Parameter(torch.zeros(NUM_CLASSES))
        self.conv_ref = nn.Sequential()
        self.conv_ref.add_module("conv0", nn.Conv2d(3 + inputs + NUM_CLASSES, width, 5, padding=2, bias=False))
        self.conv_ref.add_module("bn0", nn.BatchNorm2d(width))
        self.conv_ref.add_module("relu0", nn.ReLU(inplace=True))
        self.conv_ref.add_module("conv1", nn.Conv2d(width, width, 5, padding=2))
        self.conv_ref.add_module("bn1", nn.BatchNorm2d(width))
        self.conv_ref.add_module("relu1", nn.ReLU(inplace=True))
        self.conv_ref_last = nn.Conv2d(width, NUM_CLASSES, 1)

    def forward(self, features: Tensor, image: Tensor) -> SegmentationOutput:
        """features (N, E, h, w), image (N, 3, H, W) -> output of SSN (TexRNet, section 4)."""
        scores = self.conv_sem(features)  # (N, C, h, w)
        semantic_logits = scores + self.bias_sem[:, None, None]
        key_weights, attention = self._attend(features, scores, semantic_logits)
        small_image = resize_aligned(image, features.shape[-2:])  # (N, 3, h, w)
        hints = (small_image.to(features.dtype), features, attention.to(features.dtype))
        refined_logits = self.conv_ref_last(self.conv_ref(torch.cat(hints, dim=1)))  # (N, C, h, w)
        return SegmentationOutput(semantic_logits, refined_logits, key_weights, attention)

    @staticmethod
    def _attend(features: Tensor, scores: Tensor, semantic_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of the cells in the class keys and the attention to these keys, both (N, C, h, w).

        Always float32: sums over all cells and exponentials of inner products lose too much in 16 bits.
        """
        with without_autocast(features.device):
            cells = features.flatten(2).float()  # (N, E, P)
            scores = scores.flatten(2).float()  # (N, C, P)
            belief = F.normalize(semantic_logits.flatten(2).float().softmax(dim=1), dim=2)  # (N, C, P)
            overlap = belief @ belief.transpose(1, 2)  # (N, C, C)
            overlap = torch.exp(overlap * (1 - torch.eye(NUM_CLASSES, device=overlap.device)))
            shifted = scores - scores.detach().amax(dim=1, keepdim=True)  # (N, C, P); the shift cancels out
            weights = shifted.exp()
            total = overlap @ weights + 1e-12
            # weights / sum of weights, from logarithms, since all weights underflow where no cell is near the class.
            shares = (shifted - total.log()).softmax(dim=2)
            weights = weights / total
            keys = shares @ cells.transpose(1, 2)  # (N, C, E)
            attention = (keys @ cells).softmax(dim=1)  # (N, C, P)
        size = features.shape[-2:]
        return weights.unflatten(2, size), attention.unflatten(2, size)


class SSN(nn.Module):
    """Text segmentation: normalised image (N, 3, H, W) -> `SegmentationOutput` at a quarter of its size.

    `head_width` are the channels inside the refinement head. The defaults are HRNetV2-W48 as published.
    """

    def __init__(self, hrnet: HRNet | None = None, *, head_width: int = 64) -> None:
        super().__init__()
        self.hrnet = hrnet or HRNet()
        self.semrfnhead = RefinementHead(inputs=self.hrnet.outputs, width=head_width)

    def forward(self, image: Tensor) -> SegmentationOutput:
        features = self.hrnet(image)  # (N, E, h, w)
        return self.semrfnhead(features, image)

    def text_probability(self, image: Tensor, *, areas: Sequence[int] = PUBLISHED_AREAS) -> Tensor:
        """Return the probability of text at each pixel, (N, H, W) in [0, 1], float32: the mean over several scales.

        Args:
            image: (N, 3, H, W), normalised, at the images' own size.
            areas: the scales: the image is resized to about the area of a square with this side, in pixels.

        Raises:
            ValueError: `areas` is empty.
        """
        if not areas:
            raise ValueError("areas must name at least one side in pixels, such as 385")
        size = image.shape[-2:]
        total = image.new_zeros((len(image), *size), dtype=torch.float32)
        for area in areas:
            resized = resize_aligned(image, network_size(size, area))  # (N, 3, 32 k + 1, 32 l + 1)
            total = total + resize_aligned(self.probability(resized), size)[:, 0]  # (N, H, W)
        return total / len(areas)

    def probability(self, image: Tensor) -> Tensor:
        """Return the probability of text at each cell: (N, 3, H, W) -> (N, 1, h, w), float32."""
        logits = self(image.to(self.hrnet.conv1.weight.dtype)).refined_logits
        return logits.float().softmax(dim=1)[:, 1:]


def network_size(size: Sequence[int], area: int) -> tuple[int, int]:
    """Return the height and width at which an image of `size` (height, width) enters the network.

    It has about `area` squared pixels and keeps its aspect ratio, up to rounding down to 32 k + 1.
    """
    height, width = size
    ratio = math.sqrt(area**2 / (height * width))
    return (int(height * ratio) // _SIZE_STEP * _SIZE_STEP + 1, int(width * ratio) // _SIZE_STEP * _SIZE_STEP + 1)
