"""Data sets: words of LMDBs or of the renderer, spellings of a CSV file, pairs for segmentation.

A data set only reads. It is indexed with `SampleKey(epoch, index)` (a plain index means epoch 0); index i is always
sample i of the usable ones. What is random in a sample comes from a generator of (seed, stream, epoch, index) alone:
neither the number of workers nor that of processes changes a sample. One that cannot be read becomes `Skipped`; its
batch is then smaller and says so.
"""

import bisect
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Dataset

from loading.augmentation import CropSegmentation, mutate_spelling
from loading.batches import IGNORED, LabelRule, LanguageSample, SegmentationSample, Skipped, WordSample
from loading.decoding import TEXT_THRESHOLD, BrokenImageError, ImageArray, Mask, decode_image, decode_mask
from loading.language_csv import read_pairs
from loading.lmdb_io import LmdbReader, find_lmdbs, image_key, label_key
from loading.masks import MASK_MISSING, MASK_SIZE, LmdbMasks, MakeMasks, find_mask_lmdb
from loading.pairs import PairFolder, PairLmdb, find_pairs
from loading.sampling import PlacedGenerator, SampleKey, as_key
from loading.transforms import WordTransform, views
from loading.word_index import MISSING, open_word_index
from rendering.config import load_render_config
from rendering.engine import WordRenderer
from utils import RENDER_SCHEME

logger = logging.getLogger(__name__)

BROKEN = "broken"  # the image cannot be decoded
TINY = "tiny"  # a side of the image is too short
_MEANS = frozenset(("weighted", "mean"))  # beside the sets in tables of scores

Word = tuple[ImageArray, Mask | None, str] | str  # image, mask and text as stored, or why there are none


@dataclass(kw_only=True, eq=False, repr=False)
class SampleSet(Dataset):
    """What all sets have in common.

    Args:
        name: of the set, in results and messages; None takes that of the file or folder.
        root: number of the root that it was found in.
        seed: of what is random in its samples.
        stream: tells data sets of one run apart, so that equal indices do not get equal random numbers.
    """

    name: str | None = None
    root: int = 0
    seed: int = 0
    stream: int = 0

    def __post_init__(self) -> None:
        self.filtered: dict[str, int] = {}  # reason -> samples that the filter left out
        self._generator = PlacedGenerator()

    def random(self, key: SampleKey) -> np.random.Generator:
        """Return the generator of one sample, a function of (seed, stream, epoch, index); valid until the next call."""
        return self._generator.at((self.seed, 0), (self.stream, key.index, key.epoch))

    def __getitems__(self, keys: Sequence[SampleKey | int]) -> list[Any]:
        """Return the samples of a batch."""
        return [self[key] for key in keys]


# --- words ------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, eq=False, repr=False)
class WordSet(SampleSet):
    """What the sets of words have in common: words that `_read` gives, transformed.

    Args:
        labels: what a usable label is.
        transform: brings image and mask to the network's size.
        turn_tall: height / width above which a word is also read turned (`transforms.views`); None in training.
        segmenter: images -> masks, 8 bits, of the same sizes, that take the place of the set's own; it is called once
            for the words of a batch. None keeps those.
    """

    labels: LabelRule
    transform: WordTransform
    turn_tall: float | None = None
    segmenter: MakeMasks | None = None

    def __getitem__(self, key: SampleKey | int) -> WordSample | Skipped:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[SampleKey | int]) -> list[WordSample | Skipped]:
        """Return the samples of a batch; their words are read together, so that online masks take a single call."""
        keys = [as_key(key) for key in keys]
        words = list(map(self._read, keys))
        usable = [place for place, word in enumerate(words) if not isinstance(word, str)]
        if self.segmenter is not None and usable:
            masks = self.segmenter([words[place][0] for place in usable])
            for place, mask in zip(usable, masks, strict=True):
                words[place] = (words[place][0], mask, words[place][2])
        return [self._sample(key, word) for key, word in zip(keys, words, strict=True)]

    def _sample(self, key: SampleKey, word: Word) -> WordSample | Skipped:
        if isinstance(word, str):
            return Skipped(key.index, word)
        image, mask, text = word
        rng = self.random(key)
        seen = views(image, mask, turn_tall=self.turn_tall)
        first, *turned = [self.transform(view.image, view.mask, rng) for view in seen]
        return WordSample(*first, text, key.index, turned)

    def _read(self, key: SampleKey) -> Word:
        raise NotImplementedError


@dataclass(kw_only=True, eq=False, repr=False)
class WordDataset(WordSet):
    """The usable words of one LMDB.

    Args:
        path: the LMDB.
        masks: where stored masks come from; None for a network without, or with a `segmenter`.
        cache_dir: folder that keeps the result of the filter; None filters anew.
        min_side: pixels; a word whose image has a shorter side is skipped when it is read.

    Raises:
        UserError: this is no LMDB, or the masks do not belong to it.
    """

    path: str | Path = field(kw_only=False)
    masks: LmdbMasks | None = None
    cache_dir: str | Path | None = None
    min_side: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.name = self.name or Path(os.path.abspath(self.path)).name
        self.reader = LmdbReader(self.path)
        self.numbers, self.filtered = open_word_index(self.reader, self.labels, cache_dir=self.cache_dir)
        if self.masks is not None and len(self):
            self.masks.check(self.reader, self.numbers)
        logger.info("%s: %s words; left out: %s", self.reader.path, f"{len(self):,}", _counts(self.filtered))

    def __len__(self) -> int:
        return len(self.numbers)

    def number(self, index: int) -> int:
        """Return the number of a sample in the LMDB, from 1: that of its keys."""
        return int(self.numbers[index])

    def describe(self, index: int) -> str:
        """Return file and key of a sample, for messages."""
        return f"{self.reader.path} {image_key(self.number(index))}"

    def _read(self, key: SampleKey) -> Word:
        number = self.number(key.index)
        data, text = self.reader.get(image_key(number)), self.reader.get(label_key(number))
        if data is None or text is None:
            return MISSING
        try:
            image = decode_image(data)
        except BrokenImageError:
            return BROKEN
        if min(image.shape[:2]) < self.min_side:
            return TINY
        mask = None if self.masks is None else self.masks.read(number, image)
        return mask if isinstance(mask, str) else (image, mask, text.decode())


@dataclass(kw_only=True, eq=False, repr=False)
class RenderedDataset(WordSet):
    """Words that are rendered when they are asked for, new ones in every epoch; texts that are not usable are skipped.

    Sample i of epoch e is word e * length + i of (seed, split, stream) in every process.

    Args:
        path: YAML file of render settings.
        length: words in an epoch; None: as in the file.
        split: distinguishes training from test, so that they share no word.
        difficulty: at the start and at the end of the run, 0 to 1; None: as in the file.
        with_masks: keep the masks.

    Raises:
        UserError: the file, a font folder, a word list or a folder of photographs is missing or wrong.
    """

    path: str | Path = field(kw_only=False)
    length: int | None = None
    split: int = 0
    difficulty: tuple[float, float] | None = None
    with_masks: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.name = self.name or Path(self.path).stem
        config = load_render_config(self.path)
        self.length = self.length or config.length
        self.renderer = WordRenderer(config)
        numbers = np.random.SeedSequence((self.seed, self.split, self.stream))
        self.renderer_seed = int(numbers.generate_state(1, np.uint64)[0])

    def __len__(self) -> int:
        return self.length

    def describe(self, index: int) -> str:
        """Return the name of a sample, for messages."""
        return f"{self.name} word {index}"

    def _read(self, key: SampleKey) -> Word:
        if not 0 <= key.index < self.length:
            raise IndexError(f"word {key.index} of {self.length}")
        difficulty = None if self.difficulty is None else float(np.interp(key.progress, (0, 1), self.difficulty))
        number = key.epoch * self.length + key.index
        word = self.renderer.render(self.renderer_seed, number, difficulty=difficulty)
        return self.labels.unusable(word.text) or (word.image, word.mask if self.with_masks else None, word.text)


class JoinedDataset(ConcatDataset):
    """Several data sets one after the other; indices go on from one to the next."""

    def locate(self, index: int) -> tuple[int, int]:
        """Return the number of the data set that sample `index` is in, and its index there."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        place = bisect.bisect_right(self.cumulative_sizes, index)
        return place, index - (self.cumulative_sizes[place - 1] if place else 0)

    def __getitem__(self, key: SampleKey | int) -> Any:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[SampleKey | int]) -> list[Any]:
        """Return the samples of a batch in the order of the keys; each data set is read once."""
        by_dataset: dict[int, list[tuple[int, int, SampleKey]]] = {}
        for row, key in enumerate(map(as_key, keys)):
            place, local = self.locate(key.index)
            by_dataset.setdefault(place, []).append((row, key.index, key._replace(index=local)))
        samples: list[Any] = [None] * len(keys)
        for place, entries in by_dataset.items():
            read = self.datasets[place].__getitems__([key for _, _, key in entries])
            for (row, index, _), sample in zip(entries, read, strict=True):
                sample.index = index
                samples[row] = sample
        return samples

    def describe(self, index: int) -> str:
        """Return file and key of a sample, for messages."""
        place, local = self.locate(index)
        return self.datasets[place].describe(local)


def open_word_datasets(
    roots: Sequence[str | Path],
    *,
    labels: LabelRule,
    transform: WordTransform,
    masks: str | Path | MakeMasks | None = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    min_side: int = 1,
    length: int | None = None,
    split: int = 0,
    difficulty: tuple[float, float] | None = None,
    turn_tall: float | None = None,
) -> list[WordDataset | RenderedDataset]:
    """Open every LMDB of some roots, by path, and a renderer for each root of the form `render://FILE.yaml`.

    Args:
        roots: LMDBs or folders of LMDBs; the data sets come in their order.
        masks: root of the mask LMDBs (those of `<root of images>/X` are in `<masks>/X`), beside which rendered words
            bring their own; a function that makes all of them, as `segmenter` of WordSet; or None for none.
        length, split, difficulty: as for RenderedDataset; the others as for WordDataset.
    """
    found: list[tuple[int, str | Path]] = []  # number of the root, and an LMDB or a renderer's URL
    for number, root in enumerate(map(str, roots)):
        found += [(number, path) for path in ([root] if root.startswith(RENDER_SCHEME) else find_lmdbs(root))]
    datasets: list[WordDataset | RenderedDataset] = []
    segmenter = masks if callable(masks) else None
    for stream, ((number, path), name) in enumerate(zip(found, _names([path for _, path in found]), strict=True)):
        common = {"labels": labels, "transform": transform, "turn_tall": turn_tall, "segmenter": segmenter}
        common |= {"name": name, "root": number, "seed": seed, "stream": stream}
        if isinstance(path, str):
            rendered = {"length": length, "split": split, "difficulty": difficulty, "with_masks": masks is not None}
            datasets.append(RenderedDataset(path.removeprefix(RENDER_SCHEME), **rendered, **common))
        else:
            stored = None
            if masks is not None and segmenter is None:
                stored = LmdbMasks(find_mask_lmdb(masks, roots[number], path))
            datasets.append(WordDataset(path, masks=stored, cache_dir=cache_dir, min_side=min_side, **common))
    return datasets


def _names(paths: Sequence[str | Path]) -> list[str]:
    """Return the last parts of some paths, as many as tell them apart; the same path twice gets a number.

    No name is one of the means in tables of scores.
    """
    parts = [
        Path(path.removeprefix(RENDER_SCHEME)).with_suffix("").parts
        if isinstance(path, str)
        else Path(os.path.abspath(path)).parts
        for path in paths
    ]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["-".join(each[-depth:]).strip("/") for each in parts]
        if len(set(names)) == len(names) and _MEANS.isdisjoint(names):
            return names
    return [f"{each[-1]}-{number}" for number, each in enumerate(parts, start=1)]


def _counts(filtered: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in filtered.items()) or "none"


# --- language ---------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, eq=False, repr=False)
class LanguageDataset(SampleSet):
    """Pairs of a spelling and the right one, of a tab-separated file with columns `inp` and `gt`.

    Texts are normalised by the rule; pairs of which one side is empty or too long are left out and counted.

    Args:
        path: the file, UTF-8.
        labels: what a usable text is.
        use_sm: mutate the spelling (`mutate_spelling`).
        smooth_label: smooth the one-hot spelling: a share of up to `smooth_factor`, sampled for each word, is spread
            over the characters at random.
    """

    path: str | Path = field(kw_only=False)
    labels: LabelRule
    use_sm: bool = False
    smooth_label: bool = False
    smooth_factor: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.path = Path(self.path)
        self.name = self.name or self.path.stem
        self._pairs, self._rows, self.filtered = read_pairs(self.path, self.labels)
        logger.info("%s: %s pairs; left out: %s", self.path, f"{len(self):,}", _counts(self.filtered))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: SampleKey | int) -> LanguageSample:
        key = as_key(key)
        rng = self.random(key)
        text, target = self._pairs[self._rows[key.index]]
        if self.use_sm:
            text = mutate_spelling(text, self.labels.charset.characters, rng, max_length=self.labels.max_length)
        noise = None
        if self.smooth_label:  # (T, C), each step with the same sum, at most `smooth_factor`
            noise = rng.random((self.labels.steps, self.labels.charset.num_classes), dtype=np.float32)
            noise *= np.float32(rng.uniform(0.0, self.smooth_factor)) / noise.sum(1, keepdims=True)
        return LanguageSample(text, target, key.index, noise)

    def describe(self, index: int) -> str:
        """Return file and text of a sample, for messages."""
        return f"{self.path} {self._pairs[self._rows[index]][1]!r}"


# --- segmentation -----------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, eq=False, repr=False)
class SegmentationDataset(SampleSet):
    """Images and the classes of their pixels: 0, 1 = text, IGNORED where nothing is known.

    Args:
        source: pairs of a folder or of LMDBs.
        transform: makes crops of a fixed size for training; None keeps images as they are.
        ignore_level: grey level of masks that marks them; None has none.
    """

    source: PairFolder | PairLmdb = field(kw_only=False)
    transform: CropSegmentation | None = None
    ignore_level: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.name = self.name or Path(os.path.abspath(self.source.path)).name
        self.filtered = self.source.filtered
        self._classes = (np.arange(256) >= TEXT_THRESHOLD).astype(np.uint8)  # by grey level
        if self.ignore_level is not None:
            self._classes[self.ignore_level] = IGNORED

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: SampleKey | int) -> SegmentationSample | Skipped:
        key = as_key(key)
        stored, stored_mask = self.source.read(key.index)
        if stored is None or stored_mask is None:
            return Skipped(key.index, MISSING if stored is None else MASK_MISSING)
        try:
            image, mask = decode_image(stored), decode_mask(stored_mask)
        except BrokenImageError:
            return Skipped(key.index, BROKEN)
        if mask.shape != image.shape[:2]:
            return Skipped(key.index, MASK_SIZE)
        labels = self._classes[mask]
        if self.transform is not None:
            image, labels = self.transform(image, labels, self.random(key))
        return SegmentationSample(image, labels, key.index)

    def describe(self, index: int) -> str:
        """Return file and key of a sample, for messages."""
        return f"{self.source.path} {self.source.name(index)}"


def open_segmentation_datasets(
    roots: Sequence[str | Path],
    *,
    mask_root: str | Path | None = None,
    transform: CropSegmentation | None = None,
    ignore_level: int | None = None,
    seed: int = 0,
) -> list[SegmentationDataset]:
    """Open every set of some roots: `roots` and `mask_root` as for `find_pairs`, the rest as in SegmentationDataset."""
    common = {"transform": transform, "ignore_level": ignore_level, "seed": seed}
    found = [(number, source) for number, root in enumerate(roots) for source in find_pairs(root, mask_root)]
    names = _names([source.path for _, source in found])
    return [
        SegmentationDataset(source, stream=stream, name=name, root=root, **common)
        for stream, ((root, source), name) in enumerate(zip(found, names, strict=True))
    ]
