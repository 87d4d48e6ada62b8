"""A second look: words that a network is unsure of are read again in changed views of its input.

The most confident of all readings is kept. A view is an affine map of image and mask: the word turned a little, or made
smaller in one direction, as if its crop had been drawn otherwise.

Legend: N images, V views, T steps, C classes, H x W pixels, h x w cells.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree

from modules.outputs import RecogniserOutput, VisionOutput, chosen_logits, decode_greedily

# Degrees counterclockwise, and how many times narrower and lower the word becomes. Chosen on held-back training words
# (docs/model_card.md): these four correct more words than any two of them, and further ones add little.
VIEWS = ((5.0, 1.0, 1.0), (-5.0, 1.0, 1.0), (0.0, 1.3, 1.0), (0.0, 1.0, 1.25))


def look_twice(model: nn.Module, *inputs: Tensor | None, below: float, model_eval: str) -> RecogniserOutput:
    """Call a network on its inputs, then on the views of the words of which it is less confident than `below`.

    The confidence is that of the sub-model `model_eval`. A word's outputs are all of the view that is kept, with its
    attention and refined mask brought back to where they lie in the image as given.

    Args:
        inputs: image (N, 3, H, W) and mask (N, 1, H, W) or None; with `below` 0 whatever the network takes.

    Returns:
        The network's output, of N rows.
    """
    first = model(*inputs)
    if not below:
        return first
    confidences = decode_greedily(chosen_logits(first, model_eval))[1]  # (N,)
    unsure = (confidences < below).nonzero()[:, 0]  # (U,)
    if not len(unsure):
        return first
    image, mask = (None if each is None else each[unsure] for each in inputs)
    maps = view_maps(image.shape[-2:], image.device)
    views = maps.repeat_interleave(len(unsure), 0)  # (V * U, 2, 3)
    image = transformed(image.repeat(len(maps), 1, 1, 1), views, "border")
    mask = None if mask is None else transformed(mask.repeat(len(maps), 1, 1, 1), views, "zeros")
    second = model(image, mask)
    found = decode_greedily(chosen_logits(second, model_eval))[1].view(len(maps), -1)  # (V, U)
    best, view = found.max(0)
    better = (best > confidences[unsure]).nonzero()[:, 0]
    if not len(better):
        return first
    rows = view[better] * len(unsure) + better
    second = _pytree.tree_map(lambda leaf: None if leaf is None else leaf[rows], second)
    if second.vision is not None:
        _bring_back(second.vision, views[rows])
    return _pytree.tree_map(lambda leaf, new: _replaced(leaf, unsure[better], new), first, second)


def view_maps(size: tuple[int, int], device: torch.device) -> Tensor:
    """Return the maps of the views (V, 2, 3) for images of `size` (H, W), from a view's coordinates to the image's.

    Coordinates run from -1 to 1 along both sides, as in `torch.nn.functional.affine_grid`.
    """
    aspect = size[1] / size[0]
    maps = []
    for degrees, narrower, lower in VIEWS:
        cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        maps.append([[narrower * cosine, -lower * sine / aspect, 0.0], [narrower * sine * aspect, lower * cosine, 0.0]])
    return torch.tensor(maps, device=device)


def transformed(images: Tensor, maps: Tensor, padding: str) -> Tensor:
    """Return the views (N, C, H, W) that maps (N, 2, 3) give of images; `padding` as in `grid_sample`."""
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode=padding, align_corners=False)


def _bring_back(vision: VisionOutput, maps: Tensor) -> None:
    """Replace attention and refined masks of views by those over the images that the views are of."""
    linear = torch.linalg.inv(maps[:, :, :2])
    back = torch.cat((linear, -linear @ maps[:, :, 2:]), dim=2)  # (N, 2, 3)
    attention = transformed(vision.attention.float(), back, "zeros")
    vision.attention = attention / attention.sum((2, 3), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    if vision.refined_mask is not None:
        vision.refined_mask = transformed(vision.refined_mask.float(), back, "zeros")


def _replaced(leaf: Tensor | None, rows: Tensor, new: Tensor | None) -> Tensor | None:
    return None if leaf is None else leaf.index_copy(0, rows, new.to(leaf.dtype))
