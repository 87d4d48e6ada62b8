"""Operations that several networks share.

Legend: N images, C channels, h x w cells or pixels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def without_autocast(device: torch.device) -> torch.autocast:
    """Return a context in which tensors keep the precision that they have."""
    return torch.autocast(device.type, enabled=False)


def resize_maps(maps: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    """Resize (N, C, h, w) to (N, C, *size) bilinearly, in the precision of `maps`.

    With `align_corners` the centres of the corner cells coincide. Under autocast a GPU would resize 16-bit maps in
    float32, which takes twice the memory.
    """
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    with without_autocast(maps.device):
        return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=align_corners)


def resize_aligned(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize (N, C, h, w) to (N, C, *size) bilinearly with aligned corners."""
    return resize_maps(maps, size, align_corners=True)
