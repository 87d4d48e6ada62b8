"""Compare words: print the same statistics of renderings and real words, a column for each source.

A source is an LMDB of words, a folder with `gt.txt` (IMAGE<TAB>LABEL, images relative to the folder), or a YAML file of
render settings, whose words are rendered at each difficulty.
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python tools/NAME.py`

import cv2
import numpy as np

from loading.decoding import BrokenImageError, decode_image
from loading.lmdb_io import LmdbReader, image_key, is_lmdb, label_key
from rendering import WordRenderer, load_render_config
from tools.support import make_parser, positive, progress, seed_number
from utils import UserError, run_command_line

EXAMPLE = """  python tools/compare_words.py configs/render.yaml data/training/words --difficulty 0.3 0.5 0.7
  python tools/compare_words.py configs/render.yaml saturated=0.6 data/iiit5k_folder"""

_HEIGHT = 32  # pixels that words are scaled to before their detail is measured


class Measured(NamedTuple):
    """One word: its text and what was measured of its image. `rotation` and `arc` in degrees, None where unknown."""

    text: str
    saturation: float
    contrast: float
    luminance: float
    height: int
    character: float
    detail: float
    rotation: float | None
    arc: float | None


def measure(image: np.ndarray, text: str, rotation: float | None = None, arc: float | None = None) -> Measured:
    """Measure a word image, uint8 RGB (h, w, 3).

    Saturation (mean), contrast (between the 5th and 95th percentile of the grey values) and luminance (mean) are of
    255; `character`: width of a character over the height; `detail`: variance of the Laplacian at 32 pixels of height.
    """
    height, width = image.shape[:2]
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    low, high = np.percentile(grey, (5, 95))
    small = cv2.resize(grey, (max(1, round(width * _HEIGHT / height)), _HEIGHT), interpolation=cv2.INTER_AREA)
    return Measured(
        text=text,
        saturation=float(cv2.cvtColor(image, cv2.COLOR_RGB2HSV)[..., 1].mean()),
        contrast=float(high - low),
        luminance=float(grey.mean()),
        height=height,
        character=width / max(len(text), 1) / height,
        detail=float(cv2.Laplacian(small, cv2.CV_64F).var()),
        rotation=rotation,
        arc=arc,
    )


def summarize(words: list[Measured]) -> dict[str, str]:
    """Return the value of each row of the table for some words, as text."""

    def share(values: Iterable[bool]) -> str:
        return f"{100 * np.mean(list(values)):.0f} %"

    def spread(name: str, digits: int = 0) -> str:
        values = np.percentile([getattr(word, name) for word in words], (10, 50, 90))
        return " / ".join(f"{value:.{digits}f}" for value in values)

    known = [word for word in words if word.rotation is not None]
    return {
        "words": f"{len(words):,}",
        "1 to 3 characters": share(len(word.text) <= 3 for word in words),
        "digits only": share(word.text.isdigit() for word in words),
        "saturation, median": f"{np.median([word.saturation for word in words]):.0f}",
        "contrast, 10/50/90 %": spread("contrast"),
        "luminance, 10/50/90 %": spread("luminance"),
        "height, 10/50/90 %": spread("height"),
        "character's width / height": spread("character", 2),
        "detail, 10/50/90 %": spread("detail"),
        "higher than wide": share(word.character * len(word.text) < 1 for word in words),
        "rotation over 20 degrees": share(abs(word.rotation) > 20 for word in known) if known else "",
        "arc over 90 degrees": share(word.arc > 90 for word in known) if known else "",
    }


def format_table(columns: dict[str, dict[str, str]]) -> str:
    """Return a table with a column for each source."""
    names = list(next(iter(columns.values())))
    lines = [["", *columns], *([name, *(column[name] for column in columns.values())] for name in names)]
    first, *others = (max(map(len, cells)) for cells in zip(*lines, strict=True))
    return "\n".join(
        name.ljust(first) + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, others, strict=True))
        for name, *cells in lines
    )


def rendered(settings: str, overrides: list[str], count: int, seed: int) -> Iterator[Measured]:
    """Render and measure words of a YAML file of render settings."""
    cv2.setNumThreads(1)
    renderer = WordRenderer(load_render_config(settings, overrides))
    for index in range(count):
        word = renderer.render(seed, index)
        yield measure(word.image, word.text, word.rotation, word.arc)


def stored(source: Path, count: int) -> Iterator[Measured]:
    """Measure words of an LMDB or of a folder with gt.txt, evenly spread; images that cannot be decoded are left out.

    Raises:
        UserError: the source is neither of both, or empty.
    """
    found = _lmdb_words(source) if is_lmdb(source) else _folder_words(source)
    total = next(found)
    wanted = set(np.linspace(0, total - 1, min(count, total)).astype(int).tolist())
    for number, (data, text) in enumerate(found):
        if number in wanted and text:
            try:
                image = decode_image(data())
            except BrokenImageError:
                continue
            yield measure(image, text)


def _lmdb_words(source: Path) -> Iterator:
    """Yield the number of words, then (function that reads the encoded image, label) of each."""
    reader = LmdbReader(source)
    yield len(reader)
    for index in range(1, len(reader) + 1):
        label = reader.get(label_key(index)) or b""
        yield lambda index=index: reader.get(image_key(index)) or b"", label.decode("utf-8", "replace").strip()


def _folder_words(source: Path) -> Iterator:
    """Yield the same for a folder with gt.txt."""
    try:
        lines = (source / "gt.txt").read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: neither an LMDB, nor a folder with a UTF-8 gt.txt, nor a .yaml file") from error
    pairs = [line.partition("\t") for line in lines if line.strip()]
    yield len(pairs)
    for name, _, label in pairs:
        yield lambda name=name: _read(source / name), label.strip()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return b""


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__, EXAMPLE)
    parser.add_argument("sources", nargs="+", metavar="SOURCE|key=value", help="sources, and settings for renderings")
    parser.add_argument(
        "--difficulty",
        nargs="+",
        type=float,
        metavar="0..1",
        help="difficulties of renderings (default: as in the file)",
    )
    parser.add_argument("--count", type=positive, default=1000, help="words of each source at most (default: 1000)")
    parser.add_argument("--seed", type=seed_number, default=0, help="seed of renderings (default: 0)")
    options = parser.parse_args(arguments)
    overrides = [source for source in options.sources if "=" in source]
    columns = {}
    for source in options.sources:
        if source in overrides:
            continue
        if not source.endswith((".yaml", ".yml")):
            words = stored(Path(source), options.count)
            _add_column(columns, Path(source).name, words, options.count)
            continue
        for difficulty in options.difficulty or [None]:
            settings = overrides if difficulty is None else [*overrides, f"difficulty={difficulty}"]
            name = Path(source).stem if difficulty is None else f"{Path(source).stem} {difficulty:g}"
            _add_column(columns, name, rendered(source, settings, options.count, options.seed), options.count)
    if not columns:
        raise UserError("no source: name an LMDB, a folder with gt.txt or a .yaml file")
    print(format_table(columns))
    return 0


def _add_column(columns: dict[str, dict[str, str]], name: str, words: Iterator[Measured], total: int) -> None:
    measured = list(progress(words, total=total, unit="word", description=name))
    if not measured:
        raise UserError(f"{name}: no word of it can be decoded")
    while name in columns:
        name += "'"
    columns[name] = summarize(measured)


if __name__ == "__main__":
    run_command_line(main)
