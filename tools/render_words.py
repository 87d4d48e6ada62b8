"""Render words with the exact mask of their letters into two LMDBs: OUTPUT/images/NAME and OUTPUT/masks/NAME."""

import argparse
import functools
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python tools/NAME.py`

import cv2
import numpy as np

from evaluation.contact_sheet import save_sheet_of_lmdb
from loading.lmdb_io import LmdbWriter
from rendering.config import OutputConfig, RenderConfig, load_render_config
from rendering.engine import RenderedWord, WordRenderer
from tools import support
from utils import is_folder_name, run_command_line

EXAMPLE = """  python tools/render_words.py --output data/rendered --name words --count 10000 --seed 0
  python tools/render_words.py --output data/rendered --name hard --count 2000 --difficulty 0.9 --contact-sheet hard.png

train on them with dataset.train.roots=[data/rendered/images] dataset.masks.root=data/rendered/masks"""

SHEET_WORDS = 64
_JPEG_QUALITY = 95


EncodedWord = tuple[bytes, bytes, str]  # image and mask as stored, text


def encode_word(word: RenderedWord, output: OutputConfig) -> EncodedWord:
    """Encode image and mask; JPEG keeps colour at full resolution."""
    image = np.ascontiguousarray(word.image[..., ::-1])
    if output.image == "png":
        encoded = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 3])[1]
    else:
        full_colour = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
        encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY, *full_colour])[1]
    mask = cv2.imencode(".png", word.mask, [cv2.IMWRITE_PNG_COMPRESSION, 3])[1]
    return encoded.tobytes(), mask.tobytes(), word.text


@functools.lru_cache(maxsize=1)
def _renderer(settings: str) -> WordRenderer:
    """Build the renderer of this process from settings as JSON; forked workers inherit that of the main process."""
    cv2.setNumThreads(1)  # the workers share the cores already
    return WordRenderer(RenderConfig.model_validate_json(settings))


def render_and_encode(index: int, *, settings: str, seed: int) -> EncodedWord:
    """Render word `index` of `seed` and encode it; runs in a worker."""
    renderer = _renderer(settings)
    return encode_word(renderer.render(seed, index), renderer.config.output)


def render_words(config: RenderConfig, count: int, *, seed: int, workers: int) -> Iterator[EncodedWord]:
    """Yield words 0 to count - 1 of `seed`, the same for any number of workers, with a progress bar."""
    settings = config.model_dump_json()
    _renderer(settings)  # raises the errors of the settings before any worker starts
    render = functools.partial(render_and_encode, settings=settings, seed=seed)
    words = support.map_in_processes(render, range(count), workers=workers, chunk_size=32)
    return support.progress(words, total=count, unit="word", description="words")


def write_lmdbs(words: Iterator[EncodedWord], output: Path, name: str, *, overwrite: bool) -> None:
    """Write both LMDBs, which appear together at the end."""
    paths = output / "images" / name, output / "masks" / name
    new = [path for path in paths if not path.exists()]
    try:
        with LmdbWriter(paths[1], overwrite=overwrite) as masks, LmdbWriter(paths[0], overwrite=overwrite) as images:
            for image, mask, text in words:
                images.append(image, text)
                masks.append(mask, text)
            images.commit()  # a full disk shows here, before either has its name
            masks.commit()
    except BaseException:
        for path in new:
            shutil.rmtree(path, ignore_errors=True)
        raise


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line; settings may stand before, between and after the flags."""
    parser = support.make_parser(__doc__, EXAMPLE)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as background=clutter")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="folder of images/ and masks/")
    parser.add_argument("--name", required=True, help="name of both LMDBs")
    parser.add_argument("--count", type=support.positive, default=10000, help="number of words (default: 10000)")
    parser.add_argument("--seed", type=support.seed_number, default=0, help="of the words (default: 0)")
    parser.add_argument("--config", metavar="YAML", help="settings, such as configs/render.yaml (default: built in)")
    parser.add_argument("--difficulty", type=float, metavar="0..1", help="0: clear words, 1: hard ones")
    parser.add_argument("--photos", metavar="FOLDER", help="photographs for backgrounds")
    parser.add_argument("--contact-sheet", type=Path, metavar="PNG", help=f"image of the first {SHEET_WORDS} words")
    support.add_run_arguments(parser)
    options = parser.parse_intermixed_args(arguments)
    if not is_folder_name(options.name):
        parser.error(f"argument --name: {options.name!r} is not the name of one folder")
    flags = {"difficulty": options.difficulty, "photos": options.photos}
    options.overrides += [f"{name}={json.dumps(value)}" for name, value in flags.items() if value is not None]
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    config = load_render_config(options.config, options.overrides)
    start = time.perf_counter()
    words = render_words(config, options.count, seed=options.seed, workers=options.workers)
    write_lmdbs(words, options.output, options.name, overwrite=options.overwrite)
    counts = {"words": options.count, "words a second": options.count / (time.perf_counter() - start)}
    paths = [options.output / kind / options.name for kind in ("images", "masks")]
    if options.contact_sheet:
        save_sheet_of_lmdb(*paths, range(1, min(options.count, SHEET_WORDS) + 1), options.contact_sheet)
    support.print_summary(f"wrote {paths[0]} and {paths[1]}", counts)
    return 0


if __name__ == "__main__":
    run_command_line(main)
