"""Operations that several networks share.

Legend: N images, C channels, h x w cells or pixels.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Context in which tensors keep the precision that they have.

    Where autocast is off nothing is entered, so that exported graphs stay flat.
    """
    enabled = torch.is_autocast_enabled(device.type)
    return torch.autocast(device_type=device.type, enabled=False) if enabled else nullcontext()


def resize(maps: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    """Resize (N, C, h, w) to (N, C, *size) bilinearly, in the precision of `maps`.

    With `align_corners` the centres of the corner cells fall onto each other. Autocast would have a GPU resize 16-bit
    maps in float32, at twice the memory.
    """
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    with without_autocast(maps.device):
        return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=align_corners)
