"""Mask refinement: sharpen the text mask by how similar each pixel's feature is to those under the mask (BINet).

Legend: N images, E features, S side channels, H x W pixels, h x w cells.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.functional import resize_maps, without_autocast

EPSILON = 1e-8
# A map whose range is less than this fraction of its largest value is constant up to rounding; scaled to [0, 1],
# it would be noise.
ROUNDING = 2e-6


class MaskRefinement(nn.Module):
    """Refines a text mask with the backbone's own features (BINet, refinement of the text mask).

    s = cosine(F, p) at every pixel, with p the sum of F over the mask; e = exit_layer(classifier_6(S * s)); e' and M'
    are e and the mask brought to [0, 1]; r = rf2(rf(concat(e' + M', M')) + M').

    Args:
        channels: those of the side features S.
        cells: (h, w) of both feature maps.
        image_size: (H, W) of the mask.
        normalize: whether the extremes in e' and M' are those of each image ("sample") or of the batch ("batch", as
            published).
    """

    float32_layers = ("similarity", "rf", "rf2")

    def __init__(
        self,
        *,
        channels: int = 128,
        cells: tuple[int, int] = (8, 32),
        image_size: tuple[int, int] = (32, 128),
        normalize: str = "sample",
    ):
        super().__init__()
        if normalize not in ("sample", "batch"):
            raise ValueError(f"normalize={normalize!r} is unknown; choose sample or batch")
        self.image_size = tuple(image_size)
        self.normalize = normalize
        self.similarity = PrototypeSimilarity(cells=cells, image_size=image_size)
        self.classifier_6 = nn.Sequential(
            nn.Conv2d(channels, channels, kernel_size=3, padding=1), nn.ReLU(inplace=True)
        )
        self.exit_layer = nn.Conv2d(channels, 1, kernel_size=1)
        self.rf = nn.Conv2d(2, 1, kernel_size=1)
        self.rf2 = nn.Conv2d(1, 1, kernel_size=1)
        self._start_from_mask()

    def forward(self, semantic: Tensor, side: Tensor, mask: Tensor) -> Tensor:
        """semantic (N, E, h, w), side (N, S, h, w), mask (N, 1, H, W) in [0, 1] -> refined mask (N, 1, H, W)."""
        similarity = self.similarity(semantic, mask)  # s (N, 1, H, W)
        side = resize_maps(side, self.image_size)  # S (N, S, H, W)
        evidence = self.exit_layer(self.classifier_6(side * similarity.to(side.dtype)))  # e (N, 1, H, W)
        evidence = min_max_normalize(evidence.float(), self.normalize)
        mask = scale_to_one(mask.float(), self.normalize)
        with without_autocast(mask.device):  # the refined mask is float32
            return self.rf2(self.rf(torch.cat((evidence + mask, mask), dim=1)) + mask)

    def _start_from_mask(self) -> None:
        """Initialise the last two convolutions so that the refined mask starts close to the mask itself.

        With random values it starts below the loss's threshold nearly everywhere; the loss then drives it to 0, and the
        features are modulated by a black mask from then on.
        """
        nn.init.constant_(self.rf.weight, 0.1)
        nn.init.ones_(self.rf2.weight)
        nn.init.zeros_(self.rf.bias)
        nn.init.zeros_(self.rf2.bias)


class PrototypeSimilarity(nn.Module):
    """Cosine similarity of each pixel's feature to the prototype of the text.

    In the paper, with M the mask and F the features X (h x w cells) resized to H x W pixels:

        p = sum_yx M F;   s = F . p / (|F| |p|)

    This computes the same numbers without F, which saves three quarters of the memory. Resizing is linear and
    separable, F = A X B^T for each channel with A (H, h) and B (W, w), hence

        p     = sum_ij (A^T M B)_ij X_ij     the mask is brought to the cells
        F . p = A (X . p) B^T                one channel is resized instead of E
        |F|^2                                from inner products of neighbouring cells: a pixel mixes at most 2 x 2
    """

    def __init__(self, *, cells: tuple[int, int] = (8, 32), image_size: tuple[int, int] = (32, 128)):
        super().__init__()
        for axis, (size_in, size_out) in zip(("rows", "columns"), zip(cells, image_size, strict=True), strict=True):
            matrix = bilinear_matrix(size_in, size_out)
            self.register_buffer(axis, matrix, persistent=False)
            self.register_buffer(f"{axis}_squared", squared_matrix(matrix), persistent=False)

    def forward(self, feature: Tensor, mask: Tensor) -> Tensor:
        """feature (N, E, h, w) and mask (N, 1, H, W) -> similarity (N, 1, H, W) in [-1, 1].

        It is 0 where the mask is black or the feature is 0, and always float32: squares of features lose too much in 16
        bits.
        """
        with without_autocast(feature.device):
            feature = feature.float()
            rows, columns = self.rows.float(), self.columns.float()  # A (H, h), B (W, w)
            cell_mask = rows.T @ mask.float() @ columns  # (N, 1, h, w)
            # Not einsum: on a GPU its backward pass is a Triton kernel in torch 2.14, which needs a C compiler.
            prototype = (feature * cell_mask).sum(dim=(2, 3), keepdim=True)  # p (N, E, 1, 1)
            product = rows @ (feature * prototype).sum(dim=1) @ columns.T  # F . p (N, H, W)
            squared_norm = self.rows_squared.float() @ neighbour_products(feature) @ self.columns_squared.float().T
            # Clamped before the root, whose slope at 0 is infinite; rounding may also make a squared norm negative.
            norm = squared_norm.clamp(min=EPSILON**2).sqrt()  # (N, H, W)
            prototype_norm = prototype.square().sum(dim=(1, 2, 3)).clamp(min=EPSILON**2).sqrt()  # (N,)
            return (product / (norm * prototype_norm[:, None, None]))[:, None]  # (N, 1, H, W)


def bilinear_matrix(size_in: int, size_out: int) -> Tensor:
    """Return the matrix (size_out, size_in) of bilinear resizing along one axis, corners not aligned."""
    cells = torch.eye(size_in)[None]
    return F.interpolate(cells, size=size_out, mode="linear", align_corners=False)[0].T.contiguous()


def squared_matrix(resize: Tensor) -> Tensor:
    """Return the matrix (size_out, 2 size_in - 1) from squares and neighbour products of cells to squares of pixels.

    (u x_i + v x_i+1)^2 = u^2 x_i^2 + v^2 x_i+1^2 + 2 u v x_i x_i+1, with u and v from the matrix `resize`.
    """
    return torch.cat((resize.square(), 2 * resize[:, :-1] * resize[:, 1:]), dim=1)


def neighbour_products(feature: Tensor) -> Tensor:
    """Return inner products of cells with themselves and their neighbours, as `squared_matrix` expects them.

    feature (N, E, h, w) -> (N, 2h - 1, 2w - 1) in four blocks: with itself (h, w), with the right neighbour (h, w - 1),
    with the lower one (h - 1, w), and the mean over both diagonals (h - 1, w - 1). A mean, because each of the two axes
    brings a factor of 2, but the product occurs only twice.
    """
    upper, lower = feature[:, :, :-1], feature[:, :, 1:]
    itself = feature.square().sum(dim=1)
    right = (feature[..., :-1] * feature[..., 1:]).sum(dim=1)
    below = (upper * lower).sum(dim=1)
    diagonals = (upper[..., :-1] * lower[..., 1:] + upper[..., 1:] * lower[..., :-1]).sum(dim=1) / 2
    return torch.cat((torch.cat((itself, right), dim=2), torch.cat((below, diagonals), dim=2)), dim=1)


def min_max_normalize(maps: Tensor, normalize: str = "sample") -> Tensor:
    """Return (x - min x) / (max x - min x), 0 where that is undefined. maps (N, 1, H, W); see `extremes`."""
    low, high = extremes(maps, normalize)
    defined = high - low > ROUNDING * torch.maximum(high.abs(), low.abs())
    # The divisor is replaced first: an undefined quotient that is not used would still give NaN gradients.
    return torch.where(defined, (maps - low) / torch.where(defined, high - low, 1), 0)


def scale_to_one(maps: Tensor, normalize: str = "sample") -> Tensor:
    """Return x / max x, 0 where that is undefined. maps (N, 1, H, W), not negative; see `extremes`."""
    _, high = extremes(maps, normalize)
    defined = high > 0
    return torch.where(defined, maps / torch.where(defined, high, 1), 0)


def extremes(maps: Tensor, normalize: str) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest value, (N, 1, 1, 1) of each image for "sample", (1, 1, 1, 1) for "batch".

    Not amin and amax: their gradient compares the values with the extreme, and is 0 / 0 if a compiler rounded only one
    of them to 16 bits, as torch's does on a GPU. That of min and max goes to an index.
    """
    values = maps.flatten(1) if normalize == "sample" else maps.reshape(1, -1)
    return tuple(found.values[:, None, None, None] for found in (values.min(dim=1), values.max(dim=1)))
