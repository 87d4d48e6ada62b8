"""Compare words: print the same statistics of renderings and real words, a column for each source.

A source is an LMDB of words, or a YAML file of render settings, whose words are rendered at each difficulty. Only
the renderer knows how its words are warped.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python tools/NAME.py`

import cv2
import numpy as np

from evaluation.tables import markdown_table
from loading.lmdb_io import LmdbReader
from rendering.config import load_render_config
from rendering.engine import WordRenderer
from tools.support import decoded_words, make_parser, positive, progress, seed_number
from utils import UserError, run_command_line

EXAMPLE = """  python tools/compare_words.py configs/render.yaml data/training/words --difficulty 0.3 0.5 0.7
  python tools/compare_words.py configs/render.yaml saturated=0.6 data/training/words"""

_HEIGHT = 32  # pixels that words are scaled to before their detail is measured


def measure_word(image: np.ndarray, text: str) -> dict[str, float]:
    """Measure a word and its image, uint8 RGB (h, w, 3).

    Saturation (mean), contrast (between the 5th and 95th percentile of the grey values) and luminance (mean) are of
    255; `detail` is the variance of the Laplacian at 32 pixels of height.
    """
    height, width = image.shape[:2]
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    low, high = np.percentile(grey, (5, 95))
    small = cv2.resize(grey, (max(1, round(width * _HEIGHT / height)), _HEIGHT), interpolation=cv2.INTER_AREA)
    return {
        "1 to 3 characters": len(text) <= 3,
        "digits only": text.isdigit(),
        "higher than wide": height > width,
        "saturation": cv2.cvtColor(image, cv2.COLOR_RGB2HSV)[..., 1].mean(),
        "contrast": high - low,
        "luminance": grey.mean(),
        "height": height,
        "character's width / height": width / max(len(text), 1) / height,
        "detail": cv2.Laplacian(small, cv2.CV_64F).var(),
    }


def summarize(name: str, words: list[dict[str, float]]) -> dict[str, str]:
    """Return a cell for each measure: the share of words for which it is true, or its 10th, 50th, 90th percentile."""
    if not words:
        raise UserError(f"{name}: no word of it can be decoded")
    cells = {"words": f"{len(words):,}"}
    for measure in words[0]:
        values = [word[measure] for word in words]
        if isinstance(values[0], bool):
            cells[measure] = f"{100 * np.mean(values):.0f} %"
        else:
            numbers = (f"{value:.{0 if value >= 10 else 2}f}" for value in np.percentile(values, (10, 50, 90)))
            cells[f"{measure}, 10/50/90 %"] = " / ".join(numbers)
    return cells


def rendered(settings: str, overrides: list[str], count: int, seed: int) -> Iterator[dict[str, float]]:
    """Render and measure words of a YAML file of render settings."""
    cv2.setNumThreads(1)
    renderer = WordRenderer(load_render_config(settings, overrides))
    for index in range(count):
        word = renderer.render(seed, index)
        warp = {"rotation over 20 degrees": abs(word.rotation) > 20, "arc over 90 degrees": word.arc > 90}
        yield measure_word(word.image, word.text) | warp


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
    measured: dict[str, Iterator[dict[str, float]]] = {}
    for source in options.sources:
        if source.endswith((".yaml", ".yml")):
            for difficulty in options.difficulty or [None]:
                settings = overrides if difficulty is None else [*overrides, f"difficulty={difficulty}"]
                name = source if difficulty is None else f"{source} {difficulty:g}"
                measured[name] = rendered(source, settings, options.count, options.seed)
        elif source not in overrides:
            measured[source] = stored(source, options.count)
    if not measured:
        raise UserError("no source: name an LMDB or a .yaml file of render settings")
    columns = {
        name: summarize(name, list(progress(words, total=options.count, unit="word", description=name)))
        for name, words in measured.items()
    }
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = ([name, *(column.get(name, "") for column in columns.values())] for name in names)
    print(markdown_table([["", *columns], *rows]))
    return 0


if __name__ == "__main__":
    run_command_line(main)
