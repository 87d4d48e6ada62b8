"""Images for people: masks over words, attention per character, grids of them.

Images are RGB, (H, W, 3) uint8; masks and maps are (H, W) float in [0, 1] and of any size: they are resized to the
image.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from modules.outputs import RecogniserOutput

TEXT_COLOUR = (255, 60, 60)  # of a mask laid over its word
MARGIN = 2  # pixels between two images of a grid
CAPTION_SIZE, CAPTION_HEIGHT = 12, 16  # of the letters, of the line; pixels
MAX_CHARACTERS = 200  # of a caption that are measured
BACKGROUND = 245
# Of 256 levels, RGB.
HEAT_COLOURS = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_JET)[:, 0, ::-1]


def to_images(images: Tensor) -> np.ndarray:
    """Convert images of a batch (N, 3, H, W) uint8 to (N, H, W, 3)."""
    return images.permute(0, 2, 3, 1).cpu().numpy()


def grey(mask: np.ndarray) -> np.ndarray:
    """Convert a map in [0, 1] (H, W) to a grey image; values outside are clipped."""
    return np.repeat((np.clip(mask, 0, 1) * 255).round().astype(np.uint8)[..., None], 3, axis=2)


def overlay(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the image with TEXT_COLOUR laid over it where the mask is 1."""
    height, width = image.shape[:2]
    weight = 0.65 * cv2.resize(np.clip(mask, 0, 1).astype(np.float32), (width, height))[..., None]
    return (image * (1 - weight) + np.array(TEXT_COLOUR, dtype=np.float32) * weight).round().astype(np.uint8)


def draw_attention(image: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """Return the image dimmed, with an attention map (h, w) of any scale shining through it."""
    height, width = image.shape[:2]
    weight = cv2.resize(attention.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    weight = np.clip(weight / max(float(weight.max()), 1e-9), 0, 1)
    return cv2.addWeighted(image, 0.5, HEAT_COLOURS[(weight * 255).astype(np.uint8)], 0.5, 0)


def captioned(image: np.ndarray, text: str) -> np.ndarray:
    """Return the image with a line of text under it, shortened to the image's width."""
    return np.concatenate([image, caption_line(" ".join(text[:MAX_CHARACTERS].split()), image.shape[1])])


@functools.lru_cache(maxsize=1024)  # characters and names of masks come again and again
def caption_line(text: str, width: int) -> np.ndarray:
    """Return a line of text, (CAPTION_HEIGHT, width, 3), shortened to that width; not to be edited."""
    font = caption_font()
    if font.getlength(text) > width:
        while text and font.getlength(text + "...") > width:
            text = text[:-1]
        text += "..."
    strip = Image.new("RGB", (width, CAPTION_HEIGHT), (BACKGROUND,) * 3)
    ImageDraw.Draw(strip).text((1, 0), text, fill=(20, 20, 20), font=font)
    return np.asarray(strip)


@functools.cache
def caption_font() -> ImageFont.FreeTypeFont:
    """Return Matplotlib's font, which has the letters of Europe's languages."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", CAPTION_SIZE)


def grid(images: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Arrange images row by row; each cell is as large as the largest image."""
    height = max(image.shape[0] for image in images) + MARGIN
    width = max(image.shape[1] for image in images) + MARGIN
    rows = -(-len(images) // columns)
    sheet = np.full((rows * height + MARGIN, columns * width + MARGIN, 3), BACKGROUND, np.uint8)
    for number, image in enumerate(images):
        top, left = number // columns * height + MARGIN, number % columns * width + MARGIN
        sheet[top : top + image.shape[0], left : left + image.shape[1]] = image
    return sheet


def on_image(values: np.ndarray, size: tuple[int, int], extent: Sequence[float]) -> np.ndarray:
    """Return the part of a map (h, w) over a network's input that lies on the image, at the image's size.

    Args:
        size: height and width of the image.
        extent: top, left, height and width of the image in the input, as `reader.Prediction` has it.
    """
    whole = tuple(max(round(side / part), side) for side, part in zip(size, extent[2:], strict=True))
    first = [min(round(start * full), full - side) for start, full, side in zip(extent[:2], whole, size, strict=True)]
    values = cv2.resize(values.astype(np.float32), whole[::-1])
    return values[first[0] : first[0] + size[0], first[1] : first[1] + size[1]]


def draw_prediction(
    image: np.ndarray,
    *,
    caption: str,
    characters: Sequence[str],
    attention: Sequence[np.ndarray],
    masks: Mapping[str, np.ndarray],
    over_image: bool = False,
) -> np.ndarray:
    """Draw one word with its masks and the attention of each predicted character.

    Args:
        characters: names of the steps to show; as many as `attention` has at most.
        attention: a map (h, w) for each step.
        masks: by name, of any size.
        over_image: draw the masks as colour over the image instead of grey.
    """
    cells = [captioned(image, caption)]
    for name, each in masks.items():
        cells.append(captioned(overlay(image, each) if over_image else grey(each), name))
    for character, weights in zip(characters, attention, strict=False):
        cells.append(captioned(draw_attention(image, weights), character))
    return grid(cells, columns=4)


def draw_words(batch: Any, output: RecogniserOutput, predictions: Sequence[Any]) -> Iterator[np.ndarray]:
    """Draw each word of a batch with its masks, attention and prediction; `predictions` are `ScoredWord`s."""
    masks, attention = word_maps(batch, output)
    for row, (prediction, image) in enumerate(zip(predictions, to_images(batch.images), strict=True)):
        yield draw_prediction(
            image,
            caption=f"{prediction.label} > {prediction.text}",
            characters=[*prediction.text, "end"],
            attention=attention[row],
            masks={name: each[row] for name, each in masks.items()},
        )


def word_maps(batch: Any, output: RecogniserOutput) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return mask and refined mask of each word (N, H, W), where there are any, and attention (N, T, h, w)."""
    masks = {"mask": batch.masks, "refined mask": output.vision.refined_mask}
    found = {name: each[:, 0].float().cpu().numpy() for name, each in masks.items() if each is not None}
    if "mask" in found:
        found["mask"] /= 255
    return found, output.vision.attention.float().cpu().numpy()
