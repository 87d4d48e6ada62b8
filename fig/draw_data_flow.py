"""Draw fig/data_flow.png: how a word is recognised.

    python fig/draw_data_flow.py

The word and its mask come from the renderer; sizes are those of configs/train.yaml.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from rendering import RenderedWord, WordRenderer, load_render_config  # noqa: E402

WORD = "Harbour"
SEED, INDEX = 7, 42  # has a piece of another word below it, which is not in the mask

INK = "#25303b"
MUTED = "#5d6b78"
LOSS = "#b5302a"
# Fill and edge of the boxes of each part.
SSN = ("#fdebd3", "#d08a2e")
VISION = ("#dcebf7", "#3d7db3")
MASK = ("#fbdcd6", "#c9604c")
LANGUAGE = ("#e0f1df", "#4c9a57")

BOX_TEXT = 11.3
SMALL_TEXT = 9.5

Point = tuple[float, float]


def main() -> None:
    """Draw the figure and write it beside this script."""
    word = render_word()
    figure, axes = plt.subplots(figsize=(12.4, 4.5))
    axes.set(xlim=(0, 27), ylim=(0, 9.8))
    axes.axis("off")
    draw_panels(axes)
    draw_masks(axes, word)
    draw_vision(axes, word)
    draw_rounds(axes)
    figure.subplots_adjust(0.004, 0.004, 0.996, 0.996)
    figure.savefig(FOLDER / "data_flow.png", dpi=170, facecolor="white")


def render_word() -> RenderedWord:
    """Return the word that the figure shows."""
    settings = ["difficulty=0.4", "letters.height=40", "letters.height_spread=0.05"]
    return WordRenderer(load_render_config(None, settings)).render(SEED, INDEX, text=WORD, background="clutter")


def draw_panels(axes: Axes) -> None:
    """Draw the shaded areas of the three networks and their names."""
    panel(axes, (4.1, 6.75), (8.05, 2.85), "Text segmentation network (SSN)", SSN)
    panel(axes, (4.1, 0.2), (14.75, 6.2), "Vision model", VISION, at_bottom=True)
    panel(axes, (19.2, 0.2), (5.35, 6.2), "Language and\nalignment: 3 rounds", LANGUAGE)


def draw_masks(axes: Axes, word: RenderedWord) -> None:
    """Draw the way from the image to its text mask."""
    thumbnail(axes, word.image, (0.15, 3.05), 3.3)
    label(axes, (1.8, 2.75), "word image\n(vision: 32 × 128)")
    box(axes, (4.4, 7.15), (3.45, 1.25), "HRNet-W48 +\nrefinement head", SSN)
    label(axes, (6.12, 7.08), "pre-trained; 8 scales")
    thumbnail(axes, word.mask, (8.55, 7.37), 3.3)
    label(axes, (10.2, 7.27), "text mask")
    arrow(axes, (1.8, 4.05), (4.35, 7.78), corner="up")
    arrow(axes, (7.9, 7.78), (8.5, 7.78))


def draw_vision(axes: Axes, word: RenderedWord) -> None:
    """Draw backbone, mask refinement, mask embedding, attention and the vision model's prediction."""
    box(axes, (4.4, 2.75), (3.45, 1.4), "ResNet45 +\ntransformer", VISION)
    box(axes, (8.6, 4.5), (3.2, 1.25), "mask\nrefinement", MASK)
    thumbnail(axes, word.mask, (12.35, 4.72), 3.3)
    label(axes, (14.0, 5.62), "refined mask", above=True)
    box(axes, (12.4, 2.83), (3.2, 1.25), "mask\nembedding", MASK)
    box(axes, (16.3, 2.83), (2.25, 1.25), "attention", VISION)
    prediction(axes, (16.3, 0.95), "vision prediction", "harbour", VISION)

    arrow(axes, (3.5, 3.45), (4.35, 3.45))
    arrow(axes, (7.9, 3.45), (12.35, 3.45))
    label(axes, (10.05, 3.4), "features 512 × 8 × 32")
    arrow(axes, (6.12, 4.2), (8.55, 5.12), corner="up")
    label(axes, (6.15, 5.2), "side outputs", above=True, left=True)
    arrow(axes, (10.2, 6.72), (10.2, 5.8))
    arrow(axes, (11.85, 5.12), (12.3, 5.12))
    arrow(axes, (14.0, 4.68), (14.0, 4.13))
    arrow(axes, (15.65, 3.45), (16.25, 3.45))
    arrow(axes, (17.42, 2.78), (17.42, 2.02))
    loss(axes, (11.8, 5.75))
    loss(axes, (18.55, 1.95))


def draw_rounds(axes: Axes) -> None:
    """Draw language and alignment, which correct the prediction in rounds, and the final prediction."""
    box(axes, (19.75, 0.85), (4.2, 1.25), "language\nmodel (BCN)", LANGUAGE)
    box(axes, (19.75, 3.3), (4.2, 1.25), "alignment\n(gate)", LANGUAGE)
    prediction(axes, (24.95, 3.42), "prediction", "harbour", LANGUAGE, width=1.95)
    arrow(axes, (18.6, 1.47), (19.7, 1.47))
    arrow(axes, (20.6, 2.15), (20.6, 3.25))
    label(axes, (21.85, 2.42), "next round", above=True)
    arrow(axes, (23.1, 3.25), (23.1, 2.15))
    arrow(axes, (18.6, 3.92), (19.7, 3.92))
    arrow(axes, (24.0, 3.92), (24.9, 3.92))
    loss(axes, (23.95, 4.55))
    loss(axes, (23.95, 2.1))
    loss(axes, (19.75, 9.1))
    axes.text(20.2, 9.1, "has its own loss", color=MUTED, fontsize=SMALL_TEXT, va="center")


# --- pieces -----------------------------------------------------------------------------------------------------------


def panel(
    axes: Axes, corner: Point, size: Point, title: str, colours: tuple[str, str], *, at_bottom: bool = False
) -> None:
    """Draw a shaded area with a title along its upper or lower edge."""
    fill, edge = colours
    _patch(axes, corner, size, facecolor=fill, edgecolor="none", alpha=0.38, radius=0.25)
    height = corner[1] + (0.2 if at_bottom else size[1] - 0.2)
    vertical = "bottom" if at_bottom else "top"
    axes.text(
        corner[0] + 0.3, height, title, color=edge, fontsize=BOX_TEXT, fontweight="bold", va=vertical, linespacing=1.25
    )


def box(axes: Axes, corner: Point, size: Point, text: str, colours: tuple[str, str]) -> None:
    """Draw a block of a network."""
    fill, edge = colours
    _patch(axes, corner, size, facecolor=fill, edgecolor=edge, linewidth=1.4, radius=0.16)
    middle = corner[0] + size[0] / 2, corner[1] + size[1] / 2
    axes.text(*middle, text, color=INK, fontsize=BOX_TEXT, ha="center", va="center", linespacing=1.15)


def prediction(
    axes: Axes, corner: Point, title: str, text: str, colours: tuple[str, str], *, width: float = 2.25
) -> None:
    """Draw a predicted text on white, with its name below."""
    _patch(axes, corner, (width, 1.0), facecolor="white", edgecolor=colours[1], linewidth=1.4, radius=0.1)
    middle = corner[0] + width / 2
    axes.text(middle, corner[1] + 0.5, text, color=INK, fontsize=BOX_TEXT, family="monospace", ha="center", va="center")
    label(axes, (middle, corner[1] - 0.1), title)


def thumbnail(axes: Axes, image: np.ndarray, corner: Point, width: float) -> None:
    """Draw an image with a thin frame, `width` wide, in the shape of a word of 32 x 128 pixels."""
    height = width / 4
    extent = (corner[0], corner[0] + width, corner[1], corner[1] + height)
    limits = axes.get_xlim(), axes.get_ylim()
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, extent=extent, aspect="auto", interpolation="bilinear", zorder=3)
    axes.set(xlim=limits[0], ylim=limits[1])
    _patch(axes, corner, (width, height), facecolor="none", edgecolor=INK, linewidth=0.8, radius=0.01)


def label(axes: Axes, place: Point, text: str, *, above: bool = False, left: bool = False) -> None:
    """Draw small grey text below `place`, or above it."""
    vertical, horizontal = "bottom" if above else "top", "left" if left else "center"
    axes.text(*place, text, color=MUTED, fontsize=SMALL_TEXT, ha=horizontal, va=vertical, linespacing=1.25, zorder=5)


def loss(axes: Axes, place: Point) -> None:
    """Draw the mark of an output that has its own loss."""
    axes.plot(*place, "o", color="white", markersize=14, markeredgecolor=LOSS, markeredgewidth=1.2, zorder=6)
    axes.text(*place, "L", color=LOSS, fontsize=8.5, fontweight="bold", ha="center", va="center", zorder=7)


def arrow(axes: Axes, start: Point, end: Point, *, corner: str | None = None) -> None:
    """Draw an arrow: straight, or up first and then to the right."""
    style = "arc3,rad=0" if corner is None else "angle,angleA=90,angleB=0,rad=6"
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>,head_length=5,head_width=2.6",
            connectionstyle=style,
            color=INK,
            linewidth=1.3,
            shrinkA=0,
            shrinkB=0,
            zorder=4,
        )
    )


def _patch(axes: Axes, corner: Point, size: Point, *, radius: float, **style: object) -> None:
    shape = f"round,pad=0,rounding_size={radius}"
    layer = 4 if style["facecolor"] == "none" else 2
    axes.add_patch(FancyBboxPatch(corner, *size, boxstyle=shape, zorder=layer, **style))


if __name__ == "__main__":
    main()
