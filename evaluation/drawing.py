"""Pictures for people: masks over words, attention per character, grids of them.

Pictures are RGB, (H, W, 3) uint8; masks and maps are (H, W) float in [0, 1] and of any size: they are resized to the
picture.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
from torch import Tensor

from modules.outputs import RecogniserOutput

TEXT_COLOUR = (255, 60, 60)  # of a mask laid over its word
MARGIN = 2  # pixels between two pictures of a grid
CAPTION_HEIGHT = 14
BACKGROUND = 245


def to_pictures(images: Tensor) -> np.ndarray:
    """Images of a batch (N, 3, H, W) uint8 -> pictures (N, H, W, 3)."""
    return images.permute(0, 2, 3, 1).cpu().numpy()


def grey(mask: np.ndarray) -> np.ndarray:
    """A map in [0, 1] (H, W) as a grey picture; values outside are cut off."""
    return np.repeat((np.clip(mask, 0, 1) * 255).round().astype(np.uint8)[..., None], 3, axis=2)


def overlay(picture: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int] = TEXT_COLOUR) -> np.ndarray:
    """The picture with `colour` laid over it where the mask is 1."""
    height, width = picture.shape[:2]
    weight = 0.65 * cv2.resize(np.clip(mask, 0, 1).astype(np.float32), (width, height))[..., None]
    return (picture * (1 - weight) + np.array(colour, dtype=np.float32) * weight).round().astype(np.uint8)


def heat(picture: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """The picture dimmed, with an attention map (h, w) of any scale shining through it."""
    height, width = picture.shape[:2]
    weight = cv2.resize(attention.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    weight = np.clip(weight / max(float(weight.max()), 1e-9), 0, 1)
    colours = cv2.applyColorMap((weight * 255).astype(np.uint8), cv2.COLORMAP_JET)[..., ::-1]
    return (picture * 0.5 + colours * 0.5).astype(np.uint8)


def captioned(picture: np.ndarray, text: str) -> np.ndarray:
    """The picture with a line of text under it; characters that OpenCV's font lacks show as question marks."""
    strip = np.full((CAPTION_HEIGHT, picture.shape[1], 3), BACKGROUND, np.uint8)
    shown = text.encode("ascii", "replace").decode()
    cv2.putText(strip, shown, (1, CAPTION_HEIGHT - 4), cv2.FONT_HERSHEY_SIMPLEX, 0.38, (20, 20, 20), 1, cv2.LINE_AA)
    return np.concatenate([picture, strip])


def grid(pictures: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Pictures row by row; each cell is as large as the largest picture."""
    height = max(picture.shape[0] for picture in pictures) + MARGIN
    width = max(picture.shape[1] for picture in pictures) + MARGIN
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * height + MARGIN, columns * width + MARGIN, 3), BACKGROUND, np.uint8)
    for number, picture in enumerate(pictures):
        top, left = number // columns * height + MARGIN, number % columns * width + MARGIN
        sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return sheet


def on_picture(values: np.ndarray, size: tuple[int, int], extent: Sequence[float]) -> np.ndarray:
    """The part of a map (h, w) over a network's input that lies on the picture, at the picture's size.

    Args:
        size: height and width of the picture.
        extent: top, left, height and width of the picture in the input, as of `reader.Reading`.
    """
    whole = tuple(max(round(side / part), side) for side, part in zip(size, extent[2:], strict=True))
    first = [min(round(start * full), full - side) for start, full, side in zip(extent[:2], whole, size, strict=True)]
    values = cv2.resize(values.astype(np.float32), whole[::-1])
    return values[first[0] : first[0] + size[0], first[1] : first[1] + size[1]]


def reading_picture(
    picture: np.ndarray,
    *,
    caption: str,
    characters: Sequence[str],
    attention: Sequence[np.ndarray],
    mask: np.ndarray | None = None,
    refined_mask: np.ndarray | None = None,
    over_picture: bool = False,
) -> np.ndarray:
    """One word with its mask, refined mask and the attention of each character that was read.

    Args:
        picture: (H, W, 3) uint8.
        caption: written below the picture.
        characters: names of the steps to show; as many as `attention` has at most.
        attention: a map (h, w) for each step.
        mask, refined_mask: of any size.
        over_picture: draw the masks as colour over the picture instead of grey.
    """
    cells = [captioned(picture, caption)]
    for name, each in (("mask", mask), ("refined", refined_mask)):
        if each is not None:
            cells.append(captioned(overlay(picture, each) if over_picture else grey(each), name))
    for character, weights in zip(characters, attention, strict=False):
        cells.append(captioned(heat(picture, weights), character))
    return grid(cells, columns=4)


def evaluation_pictures(batch: Any, output: RecogniserOutput, readings: Sequence[Any]) -> Iterator[np.ndarray]:
    """One picture for each word of a batch: word, masks, attention and reading; `readings` are `ScoredWord`s."""
    attention = output.vision.attention.float().cpu().numpy()
    refined = output.vision.refined_mask
    masks = None if batch.masks is None else (batch.masks[:, 0] / 255.0).cpu().numpy()
    refined = None if refined is None else refined[:, 0].float().cpu().numpy()
    for row, (reading, picture) in enumerate(zip(readings, to_pictures(batch.images), strict=True)):
        yield reading_picture(
            picture,
            caption=f"{reading.label} > {reading.text}",
            characters=[*reading.text, "end"],
            attention=attention[row],
            mask=None if masks is None else masks[row],
            refined_mask=None if refined is None else refined[row],
        )
