"""Contact sheets hold every cell, at its place, whatever its shape."""

import numpy as np

from evaluation.contact_sheet import GAP, Cell, make_contact_sheet
from evaluation.drawing import CAPTION_HEIGHT, MARGIN


def _image(value: int, height: int = 20, width: int = 60) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def test_every_cell_is_drawn_in_row_order():
    cells = [Cell(_image(value), caption=str(value)) for value in (10, 60, 110, 160, 210)]
    sheet = np.asarray(make_contact_sheet(cells, columns=3, cell_width=60, cell_height=20))
    centres = [MARGIN + 30 + (60 + MARGIN) * column for column in range(3)]
    assert [sheet[MARGIN + 10, x, 0] for x in centres] == [10, 60, 110]
    second_row = MARGIN + 20 + GAP + CAPTION_HEIGHT + MARGIN + 10
    assert [sheet[second_row, x, 0] for x in centres[:2]] == [160, 210]


def test_masks_triple_the_height_of_the_images():
    plain = make_contact_sheet([Cell(_image(100))])
    masked = make_contact_sheet([Cell(_image(100), mask=np.zeros((20, 60), np.uint8))])
    assert masked.height - plain.height == 2 * 50


def test_odd_shapes_and_captions_are_no_error():
    cells = [
        Cell(_image(0, 1, 900), "x" * 500),
        Cell(_image(0, 300, 1), "Grüße 漢字\t\n"),
        Cell(_image(0), mask=np.zeros((3, 3), np.uint8)),
    ]
    assert make_contact_sheet(cells, columns=2).size[0] > 0


def test_letters_with_accents_are_drawn():
    """A letter that the font lacks is drawn as the same box whatever it is."""
    drawn = {np.asarray(make_contact_sheet([Cell(_image(0), letter * 3)])).tobytes() for letter in "éüßñŁЖλ\uffff"}
    assert len(drawn) == 8
