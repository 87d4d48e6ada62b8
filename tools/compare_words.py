"""Compare words: print the same statistics of renderings and real words, a column for each source.

A source is an LMDB of words, or a YAML file of render settings, whose words are rendered at each difficulty.
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python tools/NAME.py`

import cv2
import numpy as np

from evaluation.tables import markdown_table
from loading.lmdb_io import LmdbReader
from rendering import WordRenderer, load_render_config
from tools.support import decoded_words, make_parser, positive, progress, seed_number
from utils import UserError, run_command_line

EXAMPLE = """  python tools/compare_words.py configs/render.yaml data/training/words --difficulty 0.3 0.5 0.7
  python tools/compare_words.py configs/render.yaml saturated=0.6 data/training/words"""

_HEIGHT = 32  # pixels that words are scaled to before their detail is measured


def measure_word(image: np.ndarray, text: str) -> dict[str, float]:
    """Measure a word and its image, uint8 RGB (h, w, 3).

    Saturation (mean), contrast (between the 5th and 95th percentile of the grey values) and luminance (mean) are of
    255; `character`: width of a character over the height; `detail`: variance of the Laplacian at 32 pixels of height.
    """
    height, width = image.shape[:2]
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    low, high = np.percentile(grey, (5, 95))
    small = cv2.resize(grey, (max(1, round(width * _HEIGHT / height)), _HEIGHT), interpolation=cv2.INTER_AREA)
    return {
        "short": len(text) <= 3,
        "digits": text.isdigit(),
        "saturation": cv2.cvtColor(image, cv2.COLOR_RGB2HSV)[..., 1].mean(),
        "contrast": high - low,
        "luminance": grey.mean(),
        "height": height,
        "character": width / max(len(text), 1) / height,
        "detail": cv2.Laplacian(small, cv2.CV_64F).var(),
        "tall": height > width,
    }


def summarize(words: list[dict[str, float]]) -> dict[str, str]:
    """Return the value of each row of the table for some words, as text."""

    def share(values: Iterable[bool]) -> str:
        return f"{100 * np.mean(list(values)):.0f} %"

    def spread(name: str, digits: int = 0) -> str:
        values = np.percentile([word[name] for word in words], (10, 50, 90))
        return " / ".join(f"{value:.{digits}f}" for value in values)

    warped = [word for word in words if "rotation" in word]  # only the renderer knows
    return {
        "words": f"{len(words):,}",
        "1 to 3 characters": share(word["short"] for word in words),
        "digits only": share(word["digits"] for word in words),
        "saturation, median": f"{np.median([word['saturation'] for word in words]):.0f}",
        "contrast, 10/50/90 %": spread("contrast"),
        "luminance, 10/50/90 %": spread("luminance"),
        "height, 10/50/90 %": spread("height"),
        "character's width / height": spread("character", 2),
        "detail, 10/50/90 %": spread("detail"),
        "higher than wide": share(word["tall"] for word in words),
        "rotation over 20 degrees": share(abs(word["rotation"]) > 20 for word in warped) if warped else "",
        "arc over 90 degrees": share(word["arc"] > 90 for word in warped) if warped else "",
    }


def rendered(settings: str, overrides: list[str], count: int, seed: int) -> Iterator[dict[str, float]]:
    """Render and measure words of a YAML file of render settings."""
    cv2.setNumThreads(1)
    renderer = WordRenderer(load_render_config(settings, overrides))
    for index in range(count):
        word = renderer.render(seed, index)
        yield measure_word(word.image, word.text) | {"rotation": word.rotation, "arc": word.arc}


def stored(source: str, count: int) -> Iterator[dict[str, float]]:
    """Measure words of an LMDB, evenly spread; those without a label or a valid image are left out."""
    words = len(LmdbReader(source))
    numbers = np.unique(np.linspace(1, words, min(count, words)).astype(int)).tolist()
    return (measure_word(image, text) for _, image, text in decoded_words(source, numbers) if text)


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__, EXAMPLE)
    parser.add_argument("sources", nargs="+", metavar="SOURCE|key=value", help="sources, and settings for renderings")
    parser.add_argument("--difficulty", nargs="+", type=float, metavar="0..1", help="of renderings (default: the file)")
    parser.add_argument("--count", type=positive, default=1000, help="words of each source at most (default: 1000)")
    parser.add_argument("--seed", type=seed_number, default=0, help="seed of renderings (default: 0)")
    options = parser.parse_args(arguments)
    overrides = [source for source in options.sources if "=" in source]
    columns: dict[str, dict[str, str]] = {}

    def add_column(name: str, words: Iterator[dict[str, float]]) -> None:
        measured = list(progress(words, total=options.count, unit="word", description=name))
        if not measured:
            raise UserError(f"{name}: no word of it can be decoded")
        columns[name] = summarize(measured)

    for source in options.sources:
        if source.endswith((".yaml", ".yml")):
            for difficulty in options.difficulty or [None]:
                settings = overrides if difficulty is None else [*overrides, f"difficulty={difficulty}"]
                name = source if difficulty is None else f"{source} {difficulty:g}"
                add_column(name, rendered(source, settings, options.count, options.seed))
        elif source not in overrides:
            add_column(source, stored(source, options.count))
    if not columns:
        raise UserError("no source: name an LMDB or a .yaml file of render settings")
    names = next(iter(columns.values()))
    print(markdown_table([["", *columns], *([name, *(column[name] for column in columns.values())] for name in names)]))
    return 0


if __name__ == "__main__":
    run_command_line(main)
