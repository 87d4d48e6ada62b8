"""Vision models: ABINet's, which takes the image alone, and BINet's, which also takes a text mask.

Legend: N images, T steps (end token counted), E features, C classes, H x W pixels, h x w cells.
"""

from torch import Tensor, nn

from modules.attention import PositionAttention, ReadingOrderAttention
from modules.backbone import ResNet, TransformerBackbone
from modules.mask_embedding import MaskEmbedding
from modules.mask_refinement import MaskRefinement
from modules.names import leave_out_of_names
from modules.outputs import VisionOutput


class VisionModel(nn.Module):
    """ABINet's vision model: backbone -> attention -> classifier.

    `image_size` (H, W) is the only size that the network takes; `attention.cells` must be the backbone's output size
    for it.
    """

    float32_layers = ("cls",)

    def __init__(
        self,
        *,
        backbone: ResNet | TransformerBackbone,
        attention: PositionAttention | ReadingOrderAttention,
        num_classes: int = 37,
        image_size: tuple[int, int] = (32, 128),
    ):
        super().__init__()
        self.image_size = tuple(image_size)
        self.cells = backbone.output_size(self.image_size)
        self.backbone = backbone
        self.attention = attention
        self.cls = nn.Linear(backbone.out_channels, num_classes)

    def forward(self, image: Tensor, mask: Tensor | None = None) -> VisionOutput:
        """image (N, 3, H, W), normalised; the mask is not used."""
        self._check_size("image", image)
        return self.read(self.backbone(image).feature)

    def read(self, feature: Tensor, refined_mask: Tensor | None = None) -> VisionOutput:
        """Attend to features (N, E, h, w) and classify each step."""
        steps, weights = self.attention(feature)  # (N, T, E), (N, T, h, w)
        return VisionOutput(logits=self.cls(steps), feature=steps, attention=weights, refined_mask=refined_mask)

    def _check_size(self, name: str, value: Tensor) -> None:
        if tuple(value.shape[-2:]) != self.image_size:
            height, width = value.shape[-2:]
            raise ValueError(
                f"{name} is {height} x {width} pixels but the network is built for {self.image_size[0]} x "
                f"{self.image_size[1]}: resize it, or build the network with that image_size"
            )


class MaskedVisionModel(VisionModel):
    """BINet's vision model: refines the text mask, modulates the features with it, then attends and classifies.

    The backbone has a mask branch, and `image_size` is a multiple of its output size. `normalize` is
    explained at `MaskRefinement`, the other sizes at `MaskEmbedding`.
    """

    def __init__(
        self,
        *,
        backbone: ResNet | TransformerBackbone,
        attention: PositionAttention | ReadingOrderAttention,
        num_classes: int = 37,
        image_size: tuple[int, int] = (32, 128),
        normalize: str = "sample",
        sft_blocks: int = 16,
        sft_channels: int = 64,
        condition_channels: int = 32,
        hidden_channels: int = 128,
    ):
        super().__init__(backbone=backbone, attention=attention, num_classes=num_classes, image_size=image_size)
        self.mask_refinement = MaskRefinement(
            channels=backbone.side_channels, cells=self.cells, image_size=self.image_size, normalize=normalize
        )
        self.mask_embedding = MaskEmbedding(
            channels=backbone.out_channels,
            stride=tuple(pixels // cells for pixels, cells in zip(self.image_size, self.cells, strict=True)),
            sft_blocks=sft_blocks,
            sft_channels=sft_channels,
            condition_channels=condition_channels,
            hidden_channels=hidden_channels,
        )
        leave_out_of_names(self, "mask_refinement", "mask_embedding")

    def forward(self, image: Tensor, mask: Tensor | None = None) -> VisionOutput:
        """image (N, 3, H, W), normalised, and mask (N, 1, H, W) in [0, 1], 1 = text."""
        if mask is None:
            raise ValueError("this network needs a text mask: give one, or build it without segmentation")
        self._check_size("image", image)
        self._check_size("mask", mask)
        features = self.backbone(image)
        refined_mask = self.mask_refinement(features.semantic, features.side, mask)  # (N, 1, H, W)
        feature = self.mask_embedding(features.feature, refined_mask)  # (N, E, h, w)
        return self.read(feature, refined_mask)
