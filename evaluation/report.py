"""The report of an evaluation: one HTML file that works offline, with the images of the words in files beside it.

`<folder>/index.html` shows the scores, accuracy by length, confusions, calibration and every word with its predictions;
`<folder>/images/` holds sprites (many words on one image), which the page loads when it shows their words. The page is
rendered from the files in `report_template/`.
"""

import bisect
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
from rapidfuzz.distance import Levenshtein

from engine import distributed
from evaluation.drawing import grey, to_images, word_maps
from evaluation.evaluator import ScoredWord, read_logits
from evaluation.metrics import reliability
from loading.charset import Charset
from modules.outputs import RecogniserOutput
from utils import write_atomically

TEMPLATE = Path(__file__).resolve().parent / "report_template"
SPRITE_WORDS = 16  # on one sprite: few, because neighbours in a sorted list come from many sprites
MARGIN = 2  # pixels around each image of a sprite, so that scaling does not mix neighbours
CELL_MARGIN = 1  # the same for attention, in cells
JPEG_QUALITY = 88
DARKEST = 48  # grey level without attention: the page multiplies the image by it, and 0 would hide the word
CALIBRATION_BINS = 10
SHOWN_CONFUSIONS = 30
BETWEEN = "\t"  # separates the characters of a confusion on the page; no protocol counts it


@dataclass(frozen=True)
class ReportedWord:
    """A word with the predictions of every sub-model, and where its images are."""

    dataset: str
    word: ScoredWord
    target: str  # what the protocol compares of the label
    prediction: str  # the same of the text that was read
    vision: str | None
    language: tuple[str, ...]  # of each round
    alignment: tuple[str, ...]
    sprite: str | None = None  # name of the sprite that shows it
    row: int = 0  # its place there

    @property
    def right(self) -> bool:
        return self.target == self.prediction


@dataclass(eq=False, kw_only=True)
class Report:
    """Observes an evaluation and writes the report at its end."""

    folder: Path  # where `index.html` and `images/` go
    title: str  # heading of the page
    charset: Charset
    protocol: Charset  # the characters that the evaluation compares
    details: Mapping[str, str] = field(default_factory=dict)  # further facts for the head of the page, by name
    with_attention: bool = True  # keep the attention of each character
    rank: int = 0  # of this process; each process writes its own sprites
    max_words: int = 20_000  # of a process that are listed with their images; the others only count
    _words: list[ReportedWord] = field(default_factory=list, init=False)
    _layout: dict[str, Any] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        # Other names than those of an earlier report, whose page stays usable until this one replaces it.
        prefix = f"{time.time_ns():x}-{self.rank}"
        self._sprites = SpriteWriter(self.folder / "images", prefix=prefix, attention=self.with_attention)

    def on_batch(self, dataset: str, batch: Any, output: RecogniserOutput, words: Sequence[ScoredWord]) -> None:
        """Store the predictions of one batch and draw its words."""
        vision = [None] * len(words) if output.vision is None else read_logits(output.vision.logits, self.charset)[0]
        language, alignment = (self._read_rounds(part, len(words)) for part in (output.language, output.alignment))
        places: list[tuple[str | None, int]] = [(None, 0)] * len(words)
        if output.vision is not None:
            tiles = self._tiles(batch, output, words)
            places = [self._sprites.add(*each) if self._sprites.count < self.max_words else (None, 0) for each in tiles]
        for word, place, *read in zip(words, places, vision, language, alignment, strict=True):
            compared = self.protocol.normalize(word.label), self.protocol.normalize(word.text)
            self._words.append(ReportedWord(dataset, word, *compared, *read, *place))

    def on_end(self, scores: Mapping[str, Any]) -> None:
        """Write the page."""
        self._sprites.flush()
        words = distributed.gather(self._words)
        layout = next(iter(distributed.gather([self._layout] if self._layout else [])), None)
        distributed.barrier()
        if distributed.is_main():
            self._write(words, layout, scores)

    def _read_rounds(self, rounds: Sequence[Any] | None, count: int) -> list[tuple[str, ...]]:
        """Return the predictions of each word in every round."""
        texts = [read_logits(each.logits, self.charset)[0] for each in rounds or ()]
        return list(zip(*texts, strict=True)) if texts else [()] * count

    def _tiles(
        self, batch: Any, output: RecogniserOutput, words: Sequence[ScoredWord]
    ) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
        """Yield the images (word, mask, refined mask; RGB) and the attention (steps, h, w) of each word."""
        masks, attention = word_maps(batch, output)
        layers = {"word": to_images(batch.images)}
        layers |= {name: [grey(each) for each in maps] for name, maps in masks.items()}
        if self._layout is None:
            height, width = layers["word"].shape[1:3]
            cells = list(attention.shape[-2:])
            self._layout = {"width": width, "height": height, "layers": list(layers), "cells": cells}
        for row, word in enumerate(words):
            yield [layer[row] for layer in layers.values()], attention[row, : len(word.text) + 1]

    def _write(self, words: Sequence[ReportedWord], layout: dict[str, Any] | None, scores: Mapping[str, Any]) -> None:
        datasets = list(scores["datasets"])
        compared = [each for each in words if each.target]
        compared.sort(key=lambda each: (datasets.index(each.dataset), each.word.index))
        listed = [each for each in compared if layout is None or each.sprite is not None][: self.max_words]
        facts = {"scored": scores["model_eval"], "protocol": f"{scores['protocol']} characters"}
        page = render_page(
            "index.html.j2",
            title=self.title,
            details={**self.details, **facts},
            scores=scores,
            lengths=accuracy_by_length(compared),
            calibration=calibration(compared, CALIBRATION_BINS),
            confusions=most_confused(compared, SHOWN_CONFUSIONS),
            between=BETWEEN,
            total=len(compared),
            data=self._page_data(listed, layout, datasets),
        )
        write_atomically(self.folder / "index.html", page)
        used = {each.sprite for each in words}
        for path in [*self.folder.glob("images/*.jpg"), *self.folder.glob("images/*.png")]:
            if path.stem.partition("-")[2] not in used:  # of an earlier report
                path.unlink()

    def _page_data(
        self, listed: Sequence[ReportedWord], layout: Mapping[str, Any] | None, datasets: Sequence[str]
    ) -> str:
        """Return the data of the page's script as JSON that is safe inside a script element."""
        sprites = sorted({each.sprite for each in listed if each.sprite is not None})
        content = {
            "datasets": datasets,
            "sprites": sprites,
            "margin": MARGIN,
            "cellMargin": CELL_MARGIN,
            "layout": layout,
            "attention": self.with_attention and layout is not None,
            "folds": not self.protocol.has_upper_case,
            "between": BETWEEN,
            "characters": self.protocol.characters,
            "words": [word_row(each, datasets, sprites) for each in listed],
        }
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        return text.replace("<", "\\u003c")


@dataclass(eq=False)
class SpriteWriter:
    """Writes sprites: `words-<name>.jpg` with a row of images for each word, and `attention-<name>.png`."""

    folder: Path
    prefix: str
    attention: bool
    count: int = field(default=0, init=False)  # of words
    _number: int = field(default=0, init=False)  # of the sprite that is being filled
    _rows: list[np.ndarray] = field(default_factory=list, init=False)
    _attention: list[np.ndarray] = field(default_factory=list, init=False)

    @property
    def _name(self) -> str:
        return f"{self.prefix}-{self._number:05d}"

    def add(self, images: Sequence[np.ndarray], attention: np.ndarray) -> tuple[str, int]:
        """Add a word: its images (RGB, all of one size) and attention (steps, h, w); returns sprite and row."""
        place = self._name, len(self._rows)
        self._rows.append(np.concatenate([_with_margin(each, MARGIN) for each in images], axis=1))
        if self.attention:
            self._attention.append(attention_strip(attention))
        self.count += 1
        if len(self._rows) == SPRITE_WORDS:
            self.flush()
        return place

    def flush(self) -> None:
        """Write the sprite that is being filled."""
        if not self._rows:
            return
        sheet = np.concatenate(self._rows)[..., ::-1]
        self._store(f"words-{self._name}.jpg", sheet, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        if self.attention:
            width = max(each.shape[1] for each in self._attention)
            strips = [np.pad(each, ((0, 0), (0, width - each.shape[1]))) for each in self._attention]
            self._store(f"attention-{self._name}.png", np.concatenate(strips), [cv2.IMWRITE_PNG_COMPRESSION, 9])
        self._rows, self._attention = [], []
        self._number += 1

    def _store(self, name: str, image: np.ndarray, options: list[int]) -> None:
        write_atomically(self.folder / name, cv2.imencode(Path(name).suffix, image, options)[1].tobytes())


def attention_strip(attention: np.ndarray) -> np.ndarray:
    """Return attention (steps, h, w) as grey tiles side by side: (h + 2, steps * (w + 2)) uint8, brightest at peaks."""
    largest = np.maximum(attention.max(axis=(1, 2), keepdims=True), 1e-9)
    levels = np.rint(DARKEST + (255 - DARKEST) * np.sqrt(attention / largest)).astype(np.uint8)  # (steps, h, w)
    return np.concatenate([_with_margin(each, CELL_MARGIN) for each in levels], axis=1)


def _with_margin(image: np.ndarray, pixels: int) -> np.ndarray:
    return cv2.copyMakeBorder(image, pixels, pixels, pixels, pixels, cv2.BORDER_REPLICATE)


# --- what the page shows ----------------------------------------------------------------------------------------------


def accuracy_by_length(words: Sequence[ReportedWord]) -> list[dict[str, Any]]:
    """Return `length`, `words` and `accuracy` for each length of a target that occurs, shortest first."""
    counts = Counter(len(each.target) for each in words)
    right = Counter(len(each.target) for each in words if each.right)
    return [{"length": n, "words": counts[n], "accuracy": right[n] / counts[n]} for n in sorted(counts)]


def calibration(words: Sequence[ReportedWord], bins: int) -> list[dict[str, Any]]:
    """Return bins of confidence of equal width: `low`, `high`, `words`, mean `confidence`, `accuracy` (None if empty).

    The bins are those of `metrics.expected_calibration_error`.
    """
    sums = reliability([each.word.confidence for each in words], [each.right for each in words], bins)
    rows = []
    for place, (count, confidence, right) in enumerate(sums.T.tolist()):
        mean, accuracy = (confidence / count, right / count) if count else (None, None)
        edges = {"low": place / bins, "high": (place + 1) / bins}
        rows.append({**edges, "words": int(count), "confidence": mean, "accuracy": accuracy})
    return rows


def confusions_of(target: str, prediction: str) -> list[tuple[str, str]]:
    """Return the single-character edits from target to prediction: (true, read), "" for no character."""
    return [
        (
            "" if edit.tag == "insert" else target[edit.src_pos],
            "" if edit.tag == "delete" else prediction[edit.dest_pos],
        )
        for edit in Levenshtein.editops(target, prediction)
    ]


def most_confused(words: Sequence[ReportedWord], most: int) -> list[dict[str, Any]]:
    """Return the most frequent confusions: `true`, `read`, `count`, `share` of the occurrences of the true character.

    `share` is None for characters that were inserted.
    """
    counts = Counter(pair for each in words for pair in confusions_of(each.target, each.prediction))
    occurrences = Counter(character for each in words for character in each.target)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]
    return [
        {"true": true, "read": read, "count": count, "share": count / occurrences[true] if true else None}
        for (true, read), count in ranked
    ]


def word_row(each: ReportedWord, datasets: Sequence[str], sprites: Sequence[str]) -> list[Any]:
    """Return a word as the page's script gets it, without names to save space.

    Data set, number, label, prediction, confidence in 1/10,000, right (0 or 1), length, similarity in 1/1,000, sprite
    (-1 for none), row, predictions of vision, language and alignment (0 where the same), confusions ("o\\t0").
    """
    word = each.word

    def short(text: str | None) -> str | int | None:
        return 0 if text == word.text else text

    return [
        datasets.index(each.dataset),
        word.number,
        word.label,
        word.text,
        round(word.confidence * 10_000),
        int(each.right),
        len(each.target),
        round(Levenshtein.normalized_similarity(each.target, each.prediction) * 1_000),
        -1 if each.sprite is None else bisect.bisect_left(sprites, each.sprite),
        each.row,
        short(each.vision),
        [*map(short, each.language)],
        [*map(short, each.alignment)],
        [f"{true}{BETWEEN}{read}" for true, read in confusions_of(each.target, each.prediction)],
    ]


def render_page(template: str, **values: object) -> str:
    """Return the HTML that a file of `report_template/` makes of some values; all of them are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["percent"] = lambda value, digits=1: f"{100 * value:.{digits}f}"
    return environment.get_template(template).render(**values)
