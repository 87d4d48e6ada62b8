"""Mask refinement: how much each pixel resembles the text under the mask (BINet, refinement of the text mask).

The published way resizes a feature map X (h x w cells) to F (H x W pixels) and works on F. Bilinear resizing is linear
and separable, F = A X B^T for each channel with A (H, h) and B (W, w), so nothing of F's size is needed:

    p = sum_yx M F = sum_ij (A^T M B)_ij X_ij    pooling with the mask brought to the cells by the adjoint
    F . p = A (X . p) B^T                        one channel to resize instead of E
    |F|^2                                        from inner products of neighbouring cells: a pixel mixes at most 2 x 2

Legend: N pictures, E features, H x W pixels, h x w cells.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-8
# A map whose range is below this share of its largest value varies by rounding only; stretching it would show noise.
ROUNDING = 2e-6
NORMALIZATIONS = ("sample", "batch")


class PrototypeSimilarity(nn.Module):
    """Cosine between each pixel's feature and the sum of the features under the mask, without resized features."""

    def __init__(self, *, cells: tuple[int, int] = (8, 32), image_size: tuple[int, int] = (32, 128)):
        super().__init__()
        if cells[0] > image_size[0] or cells[1] > image_size[1]:
            raise ValueError(
                f"the feature map of {cells} cells must not be larger than the image of {image_size} pixels"
            )
        for axis, (size_in, size_out) in zip(("rows", "columns"), zip(cells, image_size, strict=True), strict=True):
            resize = bilinear_matrix(size_in, size_out)
            self.register_buffer(axis, resize, persistent=False)
            self.register_buffer(f"{axis}_squared", squared_matrix(resize), persistent=False)

    def resize(self, maps: Tensor) -> Tensor:
        """maps (N, S, h, w) -> (N, S, H, W), bilinear.

        As products where the channels lie apart: a CPU's backward pass is ten times as fast as the interpolation's. And
        where a compiler builds one: it would add up the interpolation's gradients number by number.
        """
        if not maps.is_contiguous() and not (torch.compiler.is_compiling() and torch.is_grad_enabled()):
            size = (len(self.rows), len(self.columns))
            return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
        return self.rows.to(maps.dtype) @ (maps @ self.columns.to(maps.dtype).T)

    def forward(self, feature: Tensor, mask: Tensor) -> Tensor:
        """feature (N, E, h, w) and mask (N, 1, H, W) -> similarity (N, 1, H, W) in [-1, 1].

        0 where the mask is black or the feature is 0. Always float32, under autocast too.
        """
        with _without_autocast(feature.device):
            feature = feature.float()
            rows, columns = self.rows.float(), self.columns.float()  # (H, h), (W, w)
            cell_mask = rows.T @ mask[:, 0].float() @ columns  # (N, h, w)
            prototype = torch.einsum("nehw,nhw->ne", feature, cell_mask)  # (N, E)
            product = rows @ torch.einsum("nehw,ne->nhw", feature, prototype) @ columns.T  # (N, H, W)
            squared_norm = self.rows_squared.float() @ neighbour_products(feature) @ self.columns_squared.float().T
            # Clamped before the root: its slope at 0 is infinite, and rounding may leave a norm of 0 slightly negative.
            norm = squared_norm.clamp(min=EPSILON**2).sqrt()  # (N, H, W)
            prototype_norm = prototype.square().sum(dim=1).clamp(min=EPSILON**2).sqrt()  # (N,)
            return (product / (norm * prototype_norm[:, None, None]))[:, None]  # (N, 1, H, W)


def bilinear_matrix(size_in: int, size_out: int) -> Tensor:
    """Matrix (size_out, size_in) of bilinear resizing along one axis, corners not aligned."""
    cells = torch.eye(size_in)[None]
    return F.interpolate(cells, size=size_out, mode="linear", align_corners=False)[0].T.contiguous()


def squared_matrix(resize: Tensor) -> Tensor:
    """(size_out, 2 size_in - 1): takes squares of cells and products of neighbours to squares of what `resize` mixes.

    (u x_i + v x_i+1)^2 = u^2 x_i^2 + v^2 x_i+1^2 + 2 u v x_i x_i+1.
    """
    return torch.cat((resize.square(), 2 * resize[:, :-1] * resize[:, 1:]), dim=1)


def neighbour_products(feature: Tensor) -> Tensor:
    """Inner products of cells with themselves and their neighbours, laid out as `squared_matrix` expects.

    feature (N, E, h, w) -> (N, 2h - 1, 2w - 1) in four blocks: with itself (h, w), with the right neighbour (h, w - 1),
    with the lower one (h - 1, w), and the mean over the two diagonals (h - 1, w - 1); a mean because the two axes'
    factors of 2 make 4 where 2 is due.
    """
    upper, lower = feature[:, :, :-1], feature[:, :, 1:]
    itself = feature.square().sum(dim=1)
    right = (feature[..., :-1] * feature[..., 1:]).sum(dim=1)
    below = (upper * lower).sum(dim=1)
    diagonals = (upper[..., :-1] * lower[..., 1:] + upper[..., 1:] * lower[..., :-1]).sum(dim=1) / 2
    return torch.cat((torch.cat((itself, right), dim=2), torch.cat((below, diagonals), dim=2)), dim=1)


def stretch(maps: Tensor, normalize: str = "sample") -> Tensor:
    """(x - min x) / (max x - min x), 0 where that is undefined. maps (N, 1, H, W); extremes as in `extent`."""
    low, high = extent(maps.amin(dim=(1, 2, 3), keepdim=True), maps.amax(dim=(1, 2, 3), keepdim=True), normalize)
    defined = high - low > ROUNDING * torch.maximum(high.abs(), low.abs())
    # The divisor is made safe first: a quotient that is thrown away would still send NaN back.
    return torch.where(defined, (maps - low) / torch.where(defined, high - low, 1), 0)


def scale_to_one(maps: Tensor, normalize: str = "sample") -> Tensor:
    """x / max x, 0 where that is undefined. maps (N, 1, H, W), not negative; the maximum as in `extent`."""
    high = maps.amax(dim=(1, 2, 3), keepdim=True)
    _, high = extent(high, high, normalize)
    defined = high > 0
    return torch.where(defined, maps / torch.where(defined, high, 1), 0)


def extent(low: Tensor, high: Tensor, normalize: str) -> tuple[Tensor, Tensor]:
    """Each picture's own extremes for "sample", those of the whole batch (the published behaviour) for "batch"."""
    return (low, high) if normalize == "sample" else (low.amin(), high.amax())


def _without_autocast(device: torch.device) -> AbstractContextManager:
    """Squares of features lose too much in 16 bits. Without autocast nothing is entered: exported graphs stay flat."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.autocast(device_type=device.type, enabled=False) if enabled else nullcontext()
