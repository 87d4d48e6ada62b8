"""Contact sheets: many words, with their masks if they have any, on one image."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from evaluation.drawing import overlay
from utils import UserError

_PAPER = (255, 255, 255)
_INK = (40, 40, 40)
_GAP = 6
_CAPTION_SIZE = 12
MAX_CHARACTERS = 200  # of a caption that are measured; no cell is wide enough for more


@dataclass(frozen=True)
class Cell:
    """One word of a sheet.

    `image` is RGB, uint8, (H, W, 3); `mask` is grey, uint8, (H, W), 255 = text, or None; `caption` is written below.
    """

    image: np.ndarray
    caption: str = ""
    mask: np.ndarray | None = None


def make_contact_sheet(
    cells: Sequence[Cell], *, columns: int = 8, cell_width: int = 160, cell_height: int = 48
) -> Image.Image:
    """Draw `cells` row by row; each image keeps its aspect and fits into cell_width x cell_height pixels.

    If any cell has a mask, each cell is three images high: the word, the mask, and the word with the mask in colour.
    """
    if not cells:
        raise ValueError("a contact sheet needs at least one cell")
    layers = 3 if any(cell.mask is not None for cell in cells) else 1
    step_x = cell_width + _GAP
    step_y = layers * (cell_height + 2) + _CAPTION_SIZE + 4 + _GAP
    columns = min(columns, len(cells))
    sheet = Image.new("RGB", (columns * step_x + _GAP, math.ceil(len(cells) / columns) * step_y + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = caption_font()
    for number, cell in enumerate(cells):
        left = _GAP + number % columns * step_x
        top = _GAP + number // columns * step_y
        for layer, image in enumerate(_layers(cell)):
            _paste(sheet, image, left, top + layer * (cell_height + 2), cell_width, cell_height)
        caption_top = top + layers * (cell_height + 2)
        draw.text((left, caption_top), _fitting(cell.caption, font, cell_width), fill=_INK, font=font)
    return sheet


def save_contact_sheet(cells: Sequence[Cell], path: Path, **layout: int) -> None:
    """Write the sheet that `make_contact_sheet` draws; `layout` holds its columns and cell sizes.

    Raises:
        UserError: the file cannot be written, or its name has no image suffix.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        make_contact_sheet(cells, **layout).save(path)
    except (OSError, ValueError) as error:  # ValueError: Pillow knows no format of that name
        raise UserError(f"contact sheet {path}: cannot be written ({error}); name a .png file") from error


@functools.cache
def caption_font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Matplotlib's font, which has the letters of Europe's languages, or else Pillow's own."""
    try:
        import matplotlib

        return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", _CAPTION_SIZE)
    except (ImportError, OSError):
        return ImageFont.load_default(_CAPTION_SIZE)


def _layers(cell: Cell) -> list[np.ndarray]:
    if cell.mask is None:
        return [cell.image]
    if cell.mask.shape != cell.image.shape[:2]:  # shown anyway: the caller decides whether that is an error
        return [cell.image, cell.mask]
    return [cell.image, cell.mask, overlay(cell.image, cell.mask / 255)]


def _paste(sheet: Image.Image, image: np.ndarray, left: int, top: int, width: int, height: int) -> None:
    scale = min(width / image.shape[1], height / image.shape[0])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    resized = Image.fromarray(image).convert("RGB").resize(size, Image.Resampling.BILINEAR)
    sheet.paste(resized, (left + (width - size[0]) // 2, top + (height - size[1]) // 2))


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Return `text` on one line, shortened to `width` pixels."""
    text = " ".join(text[:MAX_CHARACTERS].split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
