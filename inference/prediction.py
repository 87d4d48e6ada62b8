"""Predictions from several versions of a word's image: the most confident one is kept.

Tall images come in several views (`loading.transforms.views`). Test-time augmentation: a word of low confidence is
predicted again from four variants of the network's input, rotated or squeezed along one axis.

Legend: M images, N words, U words of low confidence, T steps, H x W pixels, h x w cells.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree

from modules.outputs import RecogniserOutput, VisionOutput, chosen_logits, decode_greedily

# Rotation in degrees, counterclockwise, and the factors by which the word is squeezed horizontally and vertically.
# Chosen on held-back training words (docs/model_card.md): two of them correct fewer words, further ones hardly more.
VARIANTS = ((5.0, 1.0, 1.0), (-5.0, 1.0, 1.0), (0.0, 1.3, 1.0), (0.0, 1.0, 1.25))


def predict_words(
    model: nn.Module,
    *inputs: Tensor | None,
    model_eval: str,
    owners: Sequence[int] | None = None,
    tta_below: float = 0.0,
) -> tuple[RecogniserOutput, Sequence[int]]:
    """Return a network's output with one row for each word, and the row of the inputs that each comes from.

    All outputs of a word come from the variant that is kept; attention and refined mask are mapped back to the image.

    Args:
        inputs: image (M, 3, H, W) and mask (M, 1, H, W) or None; with neither owners nor `tta_below`, any inputs.
        model_eval: the sub-model whose confidence counts.
        owners: the word that each image shows, in ascending order from 0; None: each image shows one of its own.
        tta_below: confidence below which a word is predicted again from its variants; 0: none is.
    """
    output = model(*inputs)
    rows: Sequence[int] = range(len(inputs[0]))
    if owners is None and not tta_below:
        return output, rows
    confidences = _confidences(output, model_eval)  # (M,)
    if owners is not None:
        rows = most_confident(confidences.tolist(), owners)
        output, confidences = _rows(output, rows), confidences[rows]
    unsure = [word for word, confidence in enumerate(confidences.tolist()) if confidence < tta_below]
    if not unsure:
        return output, rows
    image, mask = (None if each is None else each[[rows[word] for word in unsure]] for each in inputs)
    best = confidences[unsure]  # (U,)
    for matrix in variant_matrices(image.shape[-2:], image.device):
        variant = model(transformed(image, matrix, "border"), None if mask is None else transformed(mask, matrix))
        found = _confidences(variant, model_eval)  # (U,)
        better = [place for place, more in enumerate((found > best).tolist()) if more]
        if better:
            best = torch.maximum(best, found)
            variant = _rows(variant, better)
            _map_back(variant.vision, matrix)
            words = torch.tensor([unsure[place] for place in better], device=best.device)
            output = _pytree.tree_map(lambda old, new, words=words: _replaced(old, words, new), output, variant)
    return output, rows


def most_confident(confidences: Sequence[float], owners: Sequence[int]) -> list[int]:
    """Return the row of the most confident view of each word; the first of equal ones.

    Args:
        confidences: of M views.
        owners: the word that each view shows, in ascending order from 0.
    """
    views = itertools.groupby(range(len(owners)), key=owners.__getitem__)
    return [max(rows, key=confidences.__getitem__) for _, rows in views]


def variant_matrices(size: tuple[int, int], device: torch.device) -> Iterator[Tensor]:
    """Yield the matrix (2, 2) of each variant of images of `size` (H, W): variant's coordinates -> image's.

    Coordinates run from -1 to 1 along both sides, as in `torch.nn.functional.affine_grid`.
    """
    aspect = size[1] / size[0]
    for degrees, squeeze_x, squeeze_y in VARIANTS:
        cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        rotation = torch.tensor([[cosine, -sine / aspect], [sine * aspect, cosine]], device=device)
        yield rotation * torch.tensor([squeeze_x, squeeze_y], device=device)


def transformed(images: Tensor, matrix: Tensor, padding: str = "zeros") -> Tensor:
    """Return images (N, C, H, W) seen through a matrix of `variant_matrices`; `padding` as in `grid_sample`."""
    maps = F.pad(matrix, (0, 1)).expand(len(images), 2, 3)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode=padding, align_corners=False)


def _map_back(vision: VisionOutput | None, matrix: Tensor) -> None:
    """Replace attention and refined masks of a variant by those over the image that it is made of."""
    if vision is None:
        return
    inverse = torch.linalg.inv(matrix)
    # Spread evenly where it lies beside the image; the sum of a step stays 1.
    attention = transformed(vision.attention.float(), inverse) + torch.finfo(torch.float32).tiny
    vision.attention = attention / attention.sum((2, 3), keepdim=True)
    if vision.refined_mask is not None:
        vision.refined_mask = transformed(vision.refined_mask.float(), inverse)


def _confidences(output: RecogniserOutput, model_eval: str) -> Tensor:
    return decode_greedily(chosen_logits(output, model_eval))[1]


def _rows(output: RecogniserOutput, rows: Sequence[int] | Tensor) -> RecogniserOutput:
    return _pytree.tree_map(lambda leaf: None if leaf is None else leaf[rows], output)


def _replaced(leaf: Tensor | None, rows: Tensor, new: Tensor | None) -> Tensor | None:
    return None if leaf is None else leaf.index_copy(0, rows, new.to(leaf.dtype))
