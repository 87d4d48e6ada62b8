"""Measure what text masks buy, and on which backgrounds: checkpoints read the same words with several kinds of masks.

Rendered words (--count) are drawn on every kind of background (--backgrounds) at three contrasts, with the same letters
in the same places. The luminance of the letters differs from what is behind them by 0.05 to 0.15 (low), 0.1 to 0.3
(middle), or at least 0.3, as the renderer usually draws them (high). Real words come from LMDBs (--words) and are
grouped into quartiles by the complexity of their background: the mean gradient of the luminance (0 to 1) per pixel of
the image scaled to a height of 32, outside the text mask dilated by 2 pixels; 0 where nothing is outside. That mask is
the SSN's for real words, the same for all networks, and the exact one for rendered words.

Networks that take masks read all words with each kind of --masks:
  ssn    masks of one SSN (--ssn), as in use
  exact  the renderer's masks, which a perfect SSN would predict; rendered words only
  none   empty masks
  full   masks that call every pixel text
  other  the mask of another word: the exact one, or the SSN's for real words
--mask-ablations adds, for the networks named (without names: for all), exact masks (the SSN's for real words) that are
eroded or dilated by 1 and 2 pixels or shifted by 2 and 4 (right, down, left or up in turn), all in pixels of the image
scaled to a height of 32; and masks of the SSN at 0.75 and 1.5 times its `areas`.

The output folder receives study.json (settings and checkpoints), items.csv (the words), and in predictions/ a table
for each checkpoint and kind of masks, which is not measured again. From these alone, table.md, results.json and the
plots are made, also without any --checkpoint. Checkpoints with the same NAME count as trainings of one network with
different seeds.
"""

import argparse
import functools
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python tools/NAME.py`

import cv2
import numpy as np

from bundle import load_ssn
from engine.distributed import pick_device
from evaluation.tables import csv_text
from inference.segmenter import Segmenter
from loading.batches import LabelRule
from loading.charset import PROTOCOLS, Charset
from loading.lmdb_io import LmdbReader
from loading.word_index import scan_words
from reader import Reader
from rendering.config import BACKGROUND_KINDS, RenderConfig, load_render_config
from rendering.engine import RenderedWord, WordRenderer
from tools.background_report import ABLATIONS, CONTRASTS, MASKS, NO_MASKS, RENDERED, write_report
from tools.support import decoded_words, make_parser, map_in_processes, positive, progress, seed_number, usable_cores
from utils import UserError, run_command_line, write_atomically

EXAMPLE = """  python tools/background_study.py --checkpoint binet=a/best-a.pth --checkpoint binet=b/best-b.pth \\
      --checkpoint no-masks=c/best-c.pth --ssn ssn/best-ssn.pth --masks ssn exact none --photos photos \\
      --words data/evaluation/IC13_1015 data/evaluation/IC15_2077 --output workdir/background-study"""

_SETTINGS = {  # contrast -> smallest contrast, and chance that letters have between a third of it and all of it
    "low": (0.15, 1.0),
    "middle": (0.3, 1.0),
    "high": (0.3, 0.0),
}
_HEIGHT = 32  # pixels; height at which masks are changed and backgrounds are measured
_SHIFTS = ((1, 0), (0, 1), (-1, 0), (0, -1))


@dataclass(frozen=True)
class Item:
    """A word to read: `group` is RENDERED or the name of an LMDB, `word` its index there; `exact` is its mask or None.

    Image and mask are uint8, (h, w, 3) and (h, w); real words have neither kind of background nor contrast.
    """

    group: str
    word: int
    background: str
    contrast: str
    text: str
    image: np.ndarray
    exact: np.ndarray | None


# --- words ------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=len(CONTRASTS))
def _renderer(settings: str, contrast: str) -> WordRenderer:
    cv2.setNumThreads(1)  # the workers share the cores already
    config = RenderConfig.model_validate_json(settings)
    least, low = _SETTINGS[contrast]
    if not config.difficulty:
        raise UserError("difficulty=0: words of low contrast need more")
    chances = {**config.chances, "low_contrast": low / (2 * config.difficulty)}  # `chance` multiplies it again
    return WordRenderer(config.model_copy(update={"contrast": least, "chances": chances}))


def render_kinds(index: int, *, settings: str, seed: int, kinds: Sequence[str]) -> dict[tuple[str, str], RenderedWord]:
    """Return word `index` of `seed` by contrast and kind of background; runs in a worker."""
    words = {each: _renderer(settings, each).render_on_backgrounds(seed, index, kinds) for each in CONTRASTS}
    return {(contrast, kind): word for contrast, by_kind in words.items() for kind, word in by_kind.items()}


def render_items(
    config: RenderConfig, count: int, *, seed: int, kinds: Sequence[str], rule: LabelRule, workers: int
) -> list[Item]:
    """Return the first `count` words of `seed` that can be scored, as items sorted by contrast, background, word."""
    settings = config.model_dump_json()
    _renderer(settings, CONTRASTS[0])  # reports mistakes in the settings before any worker starts
    render = functools.partial(render_kinds, settings=settings, seed=seed, kinds=tuple(kinds))
    rendered = map_in_processes(render, range(4 * count + 100), workers=workers, chunk_size=16)
    usable = ((i, word) for i, word in enumerate(rendered) if not rule.unusable(next(iter(word.values())).text))
    words = list(progress(itertools.islice(usable, count), total=count, unit="word", description="render"))
    if len(words) < count:
        raise UserError(f"only {len(words)} of {count} words can be scored; check the render settings' words")
    return [
        Item(RENDERED, index, kind, contrast, (one := word[contrast, kind]).text, one.image, one.mask)
        for contrast, kind in itertools.product(CONTRASTS, kinds)
        for index, word in words
    ]


def stored_items(path: str, rule: LabelRule) -> Iterator[Item]:
    """Yield the words of an LMDB that can be scored and decoded."""
    for number, image, text in decoded_words(path, scan_words(LmdbReader(path), rule)[0].tolist()):
        yield Item(Path(path).name, number, "", "", text, image, None)


def complexity(image: np.ndarray, mask: np.ndarray) -> float:
    """Return the complexity of the background of an image, uint8 (h, w, 3), with its text mask, uint8 (h, w)."""
    size = max(1, round(_HEIGHT * image.shape[1] / image.shape[0])), _HEIGHT
    grey = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), size, interpolation=cv2.INTER_AREA) / np.float32(255)
    text = cv2.resize(mask, size, interpolation=cv2.INTER_AREA) > 127
    outside = cv2.dilate(text.astype(np.uint8), np.ones((5, 5), np.uint8)) == 0
    padded = cv2.copyMakeBorder(grey, 1, 1, 1, 1, cv2.BORDER_REPLICATE)
    across, down = padded[1:-1, 2:] - padded[1:-1, :-2], padded[2:, 1:-1] - padded[:-2, 1:-1]
    return float(np.hypot(across, down)[outside].mean() / 2) if outside.any() else 0.0


# --- masks ------------------------------------------------------------------------------------------------------------


class MaskMaker:
    """Makes the masks of all items, of one kind at a time; those of the SSN are the same for all networks.

    Args:
        segment: (images, scale) -> masks of the SSN at `scale` times its areas.
    """

    def __init__(self, items: Sequence[Item], segment: Callable[[Sequence[np.ndarray], float], list[np.ndarray]]):
        self._items, self._segment = items, segment

    def best(self) -> list[np.ndarray]:
        """Return the exact masks, and those of the SSN for real words."""
        real = iter(self._segment([item.image for item in self._items if item.exact is None], 1.0))
        return [next(real) if item.exact is None else item.exact for item in self._items]

    def make(self, kind: str) -> list[np.ndarray | None]:
        """Return masks, uint8 of the images' sizes, 255 = text; None where a word has none of this kind."""
        if kind == "exact":
            return [item.exact for item in self._items]
        if kind in ("none", "full"):
            return [np.full(item.image.shape[:2], 255 * (kind == "full"), np.uint8) for item in self._items]
        name, _, amount = kind.partition("-")
        if name == "ssn":
            return self._segment([item.image for item in self._items], float(amount or 1))
        best = self.best()
        if kind == "other":
            others = self._others()
            return [
                None if other == place else _fitted(best[other], self._items[place])
                for place, other in enumerate(others)
            ]
        return [changed(mask, name, int(amount), item.word) for mask, item in zip(best, self._items, strict=True)]

    def _others(self) -> list[int]:
        """Return for each item the place of the next one of the same group, background and contrast; or its own."""
        cells: dict[tuple[str, str, str], list[int]] = {}
        for place, item in enumerate(self._items):
            cells.setdefault((item.group, item.background, item.contrast), []).append(place)
        following = {a: b for cell in cells.values() for a, b in zip(cell, [*cell[1:], cell[0]], strict=True)}
        return [following[place] for place in range(len(self._items))]


def _fitted(mask: np.ndarray, item: Item) -> np.ndarray:
    return cv2.resize(mask, (item.image.shape[1], item.image.shape[0]))


def changed(mask: np.ndarray, change: str, pixels: int, word: int) -> np.ndarray:
    """Return a mask eroded, dilated or shifted by `pixels` of a height of 32; `word` chooses the direction."""
    height, width = mask.shape
    small = cv2.resize(mask, (max(1, round(_HEIGHT * width / height)), _HEIGHT))
    if change == "shifted":
        x, y = (pixels * each for each in _SHIFTS[word % len(_SHIFTS)])
        small = cv2.warpAffine(small, np.float32([[1, 0, x], [0, 1, y]]), (small.shape[1], small.shape[0]))
    else:
        operation = {"eroded": cv2.erode, "dilated": cv2.dilate}[change]
        small = operation(small, np.ones((2 * pixels + 1, 2 * pixels + 1), np.uint8))
    return cv2.resize(small, (width, height))


def overlap(mask: np.ndarray, exact: np.ndarray) -> float:
    """Return the intersection over union of two masks, uint8 (h, w), cut at one half; 1 where both are empty."""
    first, second = mask > 127, exact > 127
    union = np.count_nonzero(first | second)
    return np.count_nonzero(first & second) / union if union else 1.0


def cached_segmenter(path: str, device: str | None) -> Callable[[Sequence[np.ndarray], float], list[np.ndarray]]:
    """Return the function that gives masks of the SSN of a checkpoint, each image and scale computed once."""
    load = functools.cache(load_ssn)  # only where masks are needed
    known: dict[tuple[int, float], tuple[np.ndarray, np.ndarray]] = {}  # keeps the image, so that its id stays its own

    def segment(images: Sequence[np.ndarray], scale: float) -> list[np.ndarray]:
        missing = [image for image in images if (id(image), scale) not in known]
        if missing:
            network, areas = load(path)
            segmenter = Segmenter(network, [round(scale * area) for area in areas], device=pick_device(name=device))
            known.update({(id(i), scale): (i, mask) for i, mask in zip(missing, segmenter(missing), strict=True)})
        return [known[id(image), scale][1] for image in images]

    return segment


# --- measuring --------------------------------------------------------------------------------------------------------


def save_table(path: Path, header: str, rows: Sequence[Sequence]) -> None:
    """Write a CSV file; the names in `header` are separated by spaces."""
    write_atomically(path, csv_text([header.split(), *rows]))


def read_items(reader: Reader, items: Sequence[Item], masks: Sequence[np.ndarray | None] | None, protocol: int) -> list:
    """Return a row for each item that has a mask (`masks` None: for all): item, prediction, right, quality of the mask.

    The quality is the overlap with the exact mask, empty where there is none of them.
    """
    normalize = Charset(PROTOCOLS[protocol]).normalize
    chosen = [place for place in range(len(items)) if masks is None or masks[place] is not None]
    given = None if masks is None else [masks[place] for place in chosen]
    rows = []
    for place, prediction in zip(chosen, reader.stream([items[i].image for i in chosen], given), strict=True):
        item, quality = items[place], ""
        if masks is not None and item.exact is not None:
            quality = f"{overlap(masks[place], item.exact):.4f}"
        right = int(normalize(prediction.text) == normalize(item.text))
        rows.append([place, prediction.text, right, quality])
    return rows


def measure(options: argparse.Namespace, output: Path) -> None:
    """Read all words with the checkpoints and kinds of masks that are not in the output folder yet."""
    checkpoints = [named_checkpoint(each) for each in options.checkpoint]
    if unknown := {*(options.mask_ablations or ())} - {name for name, _ in checkpoints}:
        raise UserError(f"--mask-ablations {' '.join(sorted(unknown))}: no --checkpoint has this NAME")
    digests = [hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12] for _, path in checkpoints]
    ssn = options.ssn or checkpoints[0][1]
    rule = LabelRule(Charset(PROTOCOLS[options.protocol]), options.max_length, case_sensitive=True)
    config = load_render_config(options.config, options.overrides)
    if options.photos is not None:
        config = config.model_copy(update={"photos": options.photos})
    usual = [kind for kind in BACKGROUND_KINDS if kind != "scene" and (kind != "photo" or config.photos)]
    kinds = options.backgrounds or usual
    segment = cached_segmenter(ssn, options.device)
    settings = {name: getattr(options, name) for name in ("count", "seed", "protocol", "max_length")} | {
        "backgrounds": kinds,
        "words": {Path(path).name: len(LmdbReader(path)) for path in options.words},
        "ssn": hashlib.sha256(Path(ssn).read_bytes()).hexdigest()[:12],
        "render": config.model_dump() | {"photos": config.photos and Path(config.photos).name},
    }
    if len(settings["words"]) < len(options.words):
        raise UserError("--words: two LMDBs have the same name; rename one")
    study = json.loads((output / "study.json").read_text()) if (output / "study.json").exists() else {}
    wrong = [key for key in settings if study and study["settings"].get(key) != settings[key]]
    if wrong:
        raise UserError(f"{output}: holds a study with other settings ({', '.join(wrong)}); name another --output")
    known = study.get("checkpoints", {})
    for (name, path), digest in zip(checkpoints, digests, strict=True):
        if known.setdefault(f"{name}={path}", digest) != digest:
            raise UserError(f"{path}: has changed since {output} was measured; name another --output")
    items = render_items(config, options.count, seed=options.seed, kinds=kinds, rule=rule, workers=options.workers)
    for path in options.words:
        items += stored_items(path, rule)
    maker = MaskMaker(items, segment)
    rows = [
        [item.group, item.word, item.background, item.contrast, f"{complexity(item.image, mask):.6f}", item.text]
        for item, mask in zip(items, maker.best(), strict=True)
    ]
    save_table(output / "items.csv", "group word background contrast complexity text", rows)
    write_atomically(output / "study.json", json.dumps({"settings": settings, "checkpoints": known}, indent=2))
    for (name, path), digest in progress(
        list(zip(checkpoints, digests, strict=True)), total=len(checkpoints), unit="checkpoint", description="read"
    ):
        reader = Reader(path, device=options.device, masks="none", precision="fp32", tta_below=0)
        ablated = options.mask_ablations is not None and (not options.mask_ablations or name in options.mask_ablations)
        for kind in (*options.masks, *(ABLATIONS if ablated else ())) if reader.takes_masks else (NO_MASKS,):
            table = output / "predictions" / f"{quote(name, safe='')}.{digest}.{kind}.csv"
            if table.exists():
                continue
            masks = None if kind == NO_MASKS else maker.make(kind)
            rows = [[name, path, kind, *row] for row in read_items(reader, items, masks, options.protocol)]
            save_table(table, "name checkpoint masks item prediction right quality", rows)


# --- the command line -------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status."""
    options = parse_arguments(arguments)
    output = Path(options.output)
    if options.checkpoint:
        measure(options, output)
    print(write_report(output, options.baseline))
    return 0


def named_checkpoint(text: str) -> tuple[str, str]:
    """Split NAME=FILE; a FILE without a name gets its own."""
    name, equals, path = text.partition("=")
    path = path if equals else text
    if not Path(path).is_file():
        raise UserError(f"--checkpoint {text}: {path} does not exist; give NAME=FILE")
    return (name if equals else Path(path).stem), path


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__, EXAMPLE)
    parser.add_argument("--checkpoint", action="append", metavar="NAME=FILE", help="recogniser to measure; repeatable")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to write to, or to resume")
    parser.add_argument(
        "--baseline",
        metavar="NAME",
        help="subtracted in differences, with SSN's masks if it takes any (default: one without)",
    )
    parser.add_argument("--words", nargs="+", default=[], metavar="LMDB", help="real words")
    parser.add_argument("--ssn", metavar="FILE", help="predicts the masks (default: the SSN in the first checkpoint)")
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=["ssn"], help="kinds of masks (default: ssn)")
    parser.add_argument("--mask-ablations", nargs="*", metavar="NAME", help="also read with masks that are made worse")
    parser.add_argument("--backgrounds", nargs="+", choices=BACKGROUND_KINDS, help="default: all but scene")
    parser.add_argument("--photos", metavar="FOLDER", help="photographs for the background `photo`")
    parser.add_argument("--count", type=positive, default=1000, help="rendered words (default: %(default)s)")
    parser.add_argument("--seed", type=seed_number, default=1_000_003, help="of the words; none of the training data's")
    parser.add_argument("--config", metavar="YAML", help="render settings (default: the renderer's own)")
    parser.add_argument("--protocol", type=int, choices=PROTOCOLS, default=36, help="characters compared (%(default)s)")
    parser.add_argument("--max-length", type=positive, default=25, help="longest word (default: %(default)s)")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    parser.add_argument("--workers", type=positive, default=usable_cores(), help="processes (default: the cores)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the render settings but contrast")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    run_command_line(main)
