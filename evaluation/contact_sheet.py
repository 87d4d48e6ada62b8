"""Contact sheets: many words, with their masks if they have any, on one image."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from evaluation.drawing import BACKGROUND, captioned, grid, overlay
from loading.decoding import decode_image, decode_mask
from loading.lmdb_io import LmdbReader, image_key, label_key, mask_key
from utils import UserError

GAP = 2  # pixels below each image of a cell


@dataclass(frozen=True)
class Cell:
    """One word of a sheet."""

    image: np.ndarray  # (H, W, 3) uint8, RGB
    caption: str = ""  # written below it
    mask: np.ndarray | None = None  # (H, W) uint8, 255 = text


def make_contact_sheet(
    cells: Sequence[Cell], *, columns: int = 8, cell_width: int = 160, cell_height: int = 48
) -> Image.Image:
    """Draw at least one cell, row by row; each image keeps its aspect and fits into cell_width x cell_height pixels.

    If any cell has a mask, each cell is three images high: the word, the mask, and the word with the mask in colour.
    """
    height = (3 if any(cell.mask is not None for cell in cells) else 1) * (cell_height + GAP)
    drawn = []
    for cell in cells:
        sheet = np.full((height, cell_width, 3), BACKGROUND, np.uint8)
        layers = [cell.image] if cell.mask is None else [cell.image, cell.mask, overlay(cell.image, cell.mask / 255)]
        for place, layer in enumerate(layers):
            image, top = Image.fromarray(layer).convert("RGB"), place * (cell_height + GAP)
            sheet[top : top + cell_height] = ImageOps.pad(image, (cell_width, cell_height), color=(BACKGROUND,) * 3)
        drawn.append(captioned(sheet, cell.caption))
    return Image.fromarray(grid(drawn, min(columns, len(cells))))


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


def save_sheet_of_lmdb(words: Path, masks: Path | None, numbers: Sequence[int], path: Path) -> None:
    """Write the sheet of some words of an LMDB, with masks from `masks`, or else from the same LMDB if it has any.

    Raises:
        UserError: see `save_contact_sheet`.
    """
    reader = LmdbReader(words)
    mask_reader = None if masks is None else LmdbReader(masks)
    cells = []
    for number in numbers:
        image = decode_image(reader.get(image_key(number)))
        label = (reader.get(label_key(number)) or b"").decode()
        mask = reader.get(mask_key(number)) if mask_reader is None else mask_reader.get(image_key(number))
        cells.append(Cell(image, f"{number} {label}", None if mask is None else decode_mask(mask)))
    save_contact_sheet(cells, path)
