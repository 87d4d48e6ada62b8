"""Vision models: ABINet's, which reads from the picture alone, and BINet's, which also uses a text mask.

Legend: N pictures, T steps (end token counted), E features, C classes, H x W pixels, h x w cells.
"""

from torch import Tensor, nn

from modules.attention import PositionAttention, ReadingOrderAttention
from modules.backbone import BackboneFeatures, ResNet, TransformerBackbone
from modules.mask_embedding import ConditionNetwork, ModulatedStack
from modules.mask_refinement import NORMALIZATIONS, PrototypeSimilarity, scale_to_one, stretch
from modules.outputs import RecogniserOutput, VisionOutput


class VisionModel(nn.Module):
    """backbone -> attention -> classifier (ABINet, vision model).

    `attention.cells` must be the backbone's for `image_size` (H, W), the one size of picture that the network takes.
    """

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
        if attention.cells != self.cells:
            raise ValueError(
                f"the backbone makes {self.cells} cells of {self.image_size} pixels but attention is built for "
                f"{attention.cells}"
            )
        if attention.d_model != backbone.out_channels:
            raise ValueError(
                f"the backbone's last width is {backbone.out_channels} but attention is built for "
                f"d_model={attention.d_model}"
            )
        self.backbone = backbone
        self.attention = attention
        self.cls = nn.Linear(backbone.out_channels, num_classes)

    def forward(self, image: Tensor, mask: Tensor | None = None) -> RecogniserOutput:
        """image (N, 3, H, W), normalised; the mask is not used. Logits (N, T, C) are in `.vision`."""
        self._check_size("image", image)
        return RecogniserOutput(vision=self.read(self.backbone(image).feature))

    def read(self, feature: Tensor, refined_mask: Tensor | None = None) -> VisionOutput:
        """Attend to features (N, E, h, w) and classify every step."""
        steps, weights = self.attention(feature)  # (N, T, E), (N, T, h, w)
        return VisionOutput(logits=self.cls(steps), feature=steps, attention=weights, refined_mask=refined_mask)

    def _check_size(self, name: str, picture: Tensor) -> None:
        if tuple(picture.shape[-2:]) != self.image_size:
            height, width = picture.shape[-2:]
            raise ValueError(
                f"{name} is {height} x {width} pixels but the network is built for {self.image_size[0]} x "
                f"{self.image_size[1]}: resize it, or build the network with that image_size"
            )


def affine(conv: nn.Conv2d, *maps: Tensor) -> Tensor:
    """A 1x1 convolution of maps (N, 1, H, W) to one (N, 1, H, W), as sums: a convolution's gradients cost more."""
    weights = conv.weight.flatten().unbind()
    return sum((weight * each for weight, each in zip(weights, maps, strict=True)), start=conv.bias)


class MaskedVisionModel(VisionModel):
    """BINet's vision model: refine the text mask, modulate the features with it, then read.

    The layers of both blocks sit directly in this class because the published names have no prefix for them.
    `normalize` says over what refinement takes its extremes: "sample" (one picture) or "batch" (as published).
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
        if not backbone.mask_branch:
            raise ValueError("BINet's vision model needs a ResNet that was built with mask_branch=True")
        if normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize={normalize!r} is unknown; choose one of {', '.join(NORMALIZATIONS)}")
        if any(pixels % cells for pixels, cells in zip(self.image_size, self.cells, strict=True)):
            raise ValueError(
                f"mask embedding needs an image size that is a multiple of the feature map's, got {self.image_size} "
                f"pixels and {self.cells} cells"
            )
        self.normalize = normalize
        side, width = backbone.side_channels, backbone.out_channels
        stride = tuple(pixels // cells for pixels, cells in zip(self.image_size, self.cells, strict=True))
        self.similarity = PrototypeSimilarity(cells=self.cells, image_size=self.image_size)
        self.classifier_6 = nn.Sequential(nn.Conv2d(side, side, kernel_size=3, padding=1), nn.ReLU(inplace=True))
        self.exit_layer = nn.Conv2d(side, 1, kernel_size=1)
        self.rf = nn.Conv2d(2, 1, kernel_size=1)
        self.rf2 = nn.Conv2d(1, 1, kernel_size=1)
        self._start_from_mask()
        self.condnet = ConditionNetwork(
            stride=stride, hidden_channels=hidden_channels, condition_channels=condition_channels
        )
        self.conv0 = nn.Conv2d(width, sft_channels, kernel_size=3, padding=1)
        self.sft = ModulatedStack(
            sft_blocks=sft_blocks, sft_channels=sft_channels, condition_channels=condition_channels
        )
        self.back = nn.Conv2d(sft_channels, width, kernel_size=3, padding=1)

    def _start_from_mask(self) -> None:
        """Let the refined mask be about the mask itself at first.

        A random start lies below the loss's threshold nearly everywhere, and the loss then drives all of it to 0: the
        features would be modulated by a black picture for good.
        """
        nn.init.constant_(self.rf.weight, 0.1)
        nn.init.ones_(self.rf2.weight)
        nn.init.zeros_(self.rf.bias)
        nn.init.zeros_(self.rf2.bias)

    def forward(self, image: Tensor, mask: Tensor | None = None) -> RecogniserOutput:
        """image (N, 3, H, W), normalised, and mask (N, 1, H, W) in [0, 1], 1 = text. Outputs are in `.vision`."""
        if mask is None:
            raise ValueError("this network reads with a text mask: give one, or build it without segmentation")
        self._check_size("image", image)
        self._check_size("mask", mask)
        features = self.backbone(image)
        refined_mask = self.refine(features, mask)  # (N, 1, H, W)
        return RecogniserOutput(vision=self.read(self.embed(features.feature, refined_mask), refined_mask))

    def refine(self, features: BackboneFeatures, mask: Tensor) -> Tensor:
        """Refined mask (N, 1, H, W) (BINet, refinement of the text mask).

        s = cosine(F, p) and e = exit_layer(classifier_6(S * s)) at every pixel; e' and M' are e and the mask, brought
        to [0, 1]; r = rf2(rf(concat(e' + M', M')) + M').
        """
        similarity = self.similarity(features.semantic, mask)  # (N, 1, H, W)
        side = self.similarity.resize(features.side)  # (N, side_channels, H, W)
        evidence = self.exit_layer(self.classifier_6(side * similarity.to(side.dtype)))  # (N, 1, H, W)
        evidence = stretch(evidence.float(), self.normalize)
        mask = scale_to_one(mask.float(), self.normalize)
        return affine(self.rf2, affine(self.rf, evidence + mask, mask) + mask)

    def embed(self, feature: Tensor, refined_mask: Tensor) -> Tensor:
        """Features (N, E, h, w) modulated by the refined mask (BINet, mask embedding)."""
        condition = self.condnet(refined_mask)  # (N, condition_channels, h, w)
        hidden = self.conv0(feature)  # (N, sft_channels, h, w)
        return self.back(hidden + self.sft(hidden, condition))
