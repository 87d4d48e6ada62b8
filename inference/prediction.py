"""Predictions from several versions of a word's image: the most confident one is kept.

Tall images come in several views (`loading.transforms.views`). Test-time augmentation: a word of low confidence is
predicted again from variants of the network's input (narrow, slanted, shifted) until one is predicted with high
confidence.

Legend: M images, N words, U words of low confidence, T steps, H x W pixels, h x w cells.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree

from modules.outputs import RecogniserOutput, VisionOutput, chosen_logits, decode_greedily

# Affine maps (2, 3) from coordinates in the variant to those in the image, both from -1 to 1 along either axis, as in
# `torch.nn.functional.affine_grid`. Chosen on held-back training words and renderings (docs/model_card.md).
VARIANTS = (
    ((2.0, 0.0, 0.0), (0.0, 1.2, 0.0)),  # narrow: single letters in their own shape
    ((1.0, 0.07, 0.0), (0.0, 1.1, 0.0)),  # letters slanted, either way
    ((1.0, -0.07, 0.0), (0.0, 1.1, 0.0)),
    ((1.05, 0.0, 0.0), (0.4, 1.2, 0.0)),  # words rising or falling
    ((1.05, 0.0, 0.0), (-0.4, 1.2, 0.0)),
    ((1.0, 0.0, 0.0), (0.0, 1.0, 0.15)),  # shifted up and down
    ((1.0, 0.0, 0.0), (0.0, 1.0, -0.15)),
)


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
    best = _confidences(output, model_eval)  # M numbers, then N
    if owners is not None:
        rows = most_confident(best, owners)
        output, best = _rows(output, rows), [best[row] for row in rows]
    for variant in VARIANTS:
        unsure = [word for word, confidence in enumerate(best) if confidence < tta_below]
        if not unsure:
            break
        image, mask = (None if each is None else each[[rows[word] for word in unsure]] for each in inputs)
        matrix = torch.tensor(variant, device=image.device)
        new = model(transformed(image, matrix, "border"), None if mask is None else transformed(mask, matrix))
        found = _confidences(new, model_eval)  # U numbers
        better = {word: place for place, word in enumerate(unsure) if found[place] > best[word]}
        if better:
            new = _rows(new, [*better.values()])
            _map_back(new.vision, matrix)
            for word, place in better.items():
                best[word] = found[place]
            words = torch.tensor([*better], device=image.device)
            output = _pytree.tree_map(lambda old, leaf, words=words: _replaced(old, words, leaf), output, new)
    return output, rows


def most_confident(confidences: Sequence[float], owners: Sequence[int]) -> list[int]:
    """Return the row of the most confident view of each word; the first of equal ones.

    Args:
        confidences: of M views.
        owners: the word that each view shows, in ascending order from 0.
    """
    views = itertools.groupby(range(len(owners)), key=owners.__getitem__)
    return [max(rows, key=confidences.__getitem__) for _, rows in views]


def transformed(images: Tensor, matrix: Tensor, padding: str = "zeros") -> Tensor:
    """Return images (N, C, H, W) seen through an affine map (2, 3) like `VARIANTS`; `padding` as in `grid_sample`."""
    grid = F.affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode=padding, align_corners=False)


def _map_back(vision: VisionOutput | None, matrix: Tensor) -> None:
    """Replace attention and refined masks of a variant by those over the image that it is made of."""
    if vision is None:
        return
    back = torch.linalg.inv(matrix[:, :2])
    inverse = torch.cat((back, -back @ matrix[:, 2:]), dim=1)  # (2, 3)
    # Spread evenly where it lies beside the image; the sum of a step stays 1.
    attention = transformed(vision.attention.float(), inverse) + torch.finfo(torch.float32).tiny
    vision.attention = attention / attention.sum((2, 3), keepdim=True)
    if vision.refined_mask is not None:
        vision.refined_mask = transformed(vision.refined_mask.float(), inverse)


def _confidences(output: RecogniserOutput, model_eval: str) -> list[float]:
    return decode_greedily(chosen_logits(output, model_eval))[1].tolist()


def _rows(output: RecogniserOutput, rows: Sequence[int] | Tensor) -> RecogniserOutput:
    return _pytree.tree_map(lambda leaf: None if leaf is None else leaf[rows], output)


def _replaced(leaf: Tensor | None, rows: Tensor, new: Tensor | None) -> Tensor | None:
    return None if leaf is None else leaf.index_copy(0, rows, new.to(leaf.dtype))
