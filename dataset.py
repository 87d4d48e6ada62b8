"""Data sets: words of LMDBs or of the renderer, spellings of a CSV file, pairs for segmentation.

A data set only reads. It is indexed with `SampleKey(epoch, index)` (a plain index means epoch 0); index i is sample i
of the usable ones, always. What is random in a sample comes from a generator of (seed, epoch, index) alone, so that
neither the number of workers nor that of processes changes a sample. A sample that cannot be read becomes `Skipped`;
the batch is smaller then and says so.
"""

import bisect
import logging
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from loading.augmentation import CropSegmentation
from loading.batches import (
    LabelRule,
    LanguageSample,
    SegmentationSample,
    Skipped,
    WordSample,
)
from loading.decoding import (
    TEXT_THRESHOLD,
    BrokenImageError,
    ImageArray,
    Mask,
    decode_image,
    decode_mask,
    image_size,
)
from loading.language_csv import read_pairs
from loading.lmdb_io import LmdbReader, find_lmdbs, image_key, label_key, mask_key
from loading.masks import LmdbMasks, MakeMasks, MaskSource, OnlineMasks, find_mask_lmdb
from loading.sampling import (
    SampleGenerators,
    SampleKey,
    as_key,
)
from loading.transforms import WordTransform, views
from loading.word_index import MISSING, open_word_index
from utils import RENDER_SCHEME, UserError

logger = logging.getLogger(__name__)

BROKEN = "broken"  # the image cannot be decoded
TINY = "tiny"  # a side of the image is too short


# --- words ------------------------------------------------------------------------------------------------------------


class WordDataset(Dataset):
    """The usable words of one LMDB.

    Args:
        path: the LMDB.
        labels: what a usable label is.
        transform: brings image and mask to the network's size.
        masks: where the masks come from; None for a network without.
        seed: of augmentation.
        stream: tells data sets of one run apart, so that equal indices are not augmented alike.
        name: of the set, in results and messages; None takes the folder's.
        cache_dir: folder that keeps the result of the filter; None filters anew.
        min_side: pixels; a word whose image has a shorter side is skipped when it comes.
        turn_tall: height / width above which a word is read turned, too (`transforms.views`); None in training.

    Raises:
        UserError: this is no LMDB, or the masks do not belong to it.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        labels: LabelRule,
        transform: WordTransform,
        masks: MaskSource | None = None,
        seed: int = 0,
        stream: int = 0,
        name: str | None = None,
        cache_dir: str | Path | None = None,
        min_side: int = 1,
        turn_tall: float | None = None,
    ) -> None:
        self.reader = LmdbReader(path)
        self.name = name or Path(os.path.abspath(path)).name
        self.transform = transform
        self.turn_tall = turn_tall
        self.masks = masks
        self.min_side = min_side
        self.root = 0  # number of the root that it was found in
        self.index = open_word_index(self.reader, labels, cache_dir=cache_dir)
        self.filtered = self.index.filtered  # reason -> words that the filter left out
        self._generators = SampleGenerators(seed, stream)
        if masks is not None and len(self.index):
            masks.check(self.reader, self.index.numbers)
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in self.filtered.items()) or "none"
        logger.info("%s: %s words; left out: %s", self.reader.path, f"{len(self):,}", left_out)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: SampleKey | int) -> WordSample | Skipped:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[SampleKey | int]) -> list[WordSample | Skipped]:
        """The samples of a batch, read together: masks made on the spot are made in one call."""
        keys = [as_key(key) for key in keys]
        read = self._read_words([self.number(key.index) for key in keys])
        if self.masks is not None:
            self._add_masks(read)
        samples: list[WordSample | Skipped] = []
        for key, word in zip(keys, read, strict=True):
            if isinstance(word, str):
                samples.append(Skipped(key.index, word))
                continue
            _, image, mask, text = word
            samples.append(_word_sample(self, key, image, mask, text))
        return samples

    def image(self, index: int) -> ImageArray:
        """The image of a sample as stored, RGB uint8; raises BrokenImageError."""
        data = self.reader.get(image_key(self.number(index)))
        return decode_image(data if data is not None else b"")

    def number(self, index: int) -> int:
        """Number of a sample in the LMDB, from 1: that of its keys."""
        return int(self.index.numbers[index])

    def describe(self, index: int) -> str:
        """File and key of a sample, for messages."""
        return f"{self.reader.path} {image_key(self.number(index))}"

    def _read_words(self, numbers: list[int]) -> list[Any]:
        """For each number [number, image, None, text], or the reason why it cannot be read."""
        words: list[Any] = []
        with self.reader.transaction(buffers=True) as transaction:
            for number in numbers:
                data = transaction.get(image_key(number).encode())
                text = transaction.get(label_key(number).encode())
                if data is None or text is None:
                    words.append(MISSING)
                    continue
                try:
                    image = decode_image(data)
                except BrokenImageError:
                    words.append(BROKEN)
                    continue
                tiny = min(image.shape[:2]) < self.min_side
                words.append(TINY if tiny else [number, image, None, bytes(text).decode()])
        return words

    def _add_masks(self, words: list[Any]) -> None:
        """Put masks into the words that were read; a word without becomes the reason."""
        places = [place for place, word in enumerate(words) if not isinstance(word, str)]
        if not places:
            return
        numbers = [words[place][0] for place in places]
        masks = self.masks.read(self.reader, numbers, [words[place][1] for place in places])
        for place, mask in zip(places, masks, strict=True):
            if isinstance(mask, str):
                words[place] = mask
            else:
                words[place][2] = mask


class RenderedDataset(Dataset):
    """Words that are drawn when they are asked for.

    Args:
        source: `source[SampleKey]` -> (image uint8 RGB, mask uint8, text), and its length.
        labels, transform, seed, stream, name, turn_tall: as of WordDataset; a text that is not usable is skipped when
            it comes.
        with_masks: keep the masks.
        segmenter: images -> masks that take the place of the exact ones; None keeps those.
    """

    def __init__(
        self,
        source: Any,
        *,
        labels: LabelRule,
        transform: WordTransform,
        with_masks: bool = True,
        segmenter: MakeMasks | None = None,
        seed: int = 0,
        stream: int = 0,
        name: str = "rendered",
        turn_tall: float | None = None,
    ) -> None:
        self.source = source
        self.labels = labels
        self.transform = transform
        self.turn_tall = turn_tall
        self.with_masks = with_masks
        self.segmenter = segmenter
        self.name = name
        self.root = 0  # as of WordDataset
        self.filtered: dict[str, int] = {}
        self._generators = SampleGenerators(seed, stream)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: SampleKey | int) -> WordSample | Skipped:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[SampleKey | int]) -> list[WordSample | Skipped]:
        """The samples of a batch, drawn together: masks made on the spot are made in one call."""
        keys = [as_key(key) for key in keys]
        words = [self.source[key] for key in keys]
        samples: list[Any] = [
            Skipped(key.index, reason) if (reason := self.labels.unusable(text)) else None
            for key, (_, _, text) in zip(keys, words, strict=True)
        ]
        usable = [place for place, sample in enumerate(samples) if sample is None]
        masks = self._masks([words[place] for place in usable])
        for place, mask in zip(usable, masks, strict=True):
            image, text = words[place][0], words[place][2]
            samples[place] = _word_sample(self, keys[place], image, mask, text)
        return samples

    def _masks(self, words: list[tuple[ImageArray, Mask, str]]) -> Sequence[Mask | None]:
        if not self.with_masks:
            return [None] * len(words)
        if self.segmenter is None or not words:
            return [mask for _, mask, _ in words]
        return self.segmenter([image for image, _, _ in words])

    def describe(self, index: int) -> str:
        """Name of a sample, for messages."""
        return f"{self.name} word {index}"


def _word_sample(
    dataset: WordDataset | RenderedDataset, key: SampleKey, image: ImageArray, mask: Mask | None, text: str
) -> WordSample:
    """A word that was read, transformed in every view."""
    rng = dataset._generators.at(key)
    seen = views(image, mask, turn_tall=dataset.turn_tall)
    first, *turned = [dataset.transform(view.image, view.mask, rng) for view in seen]
    return WordSample(*first, text, key.index, turned)


class JoinedDataset(Dataset):
    """Several data sets one after the other; indices go on from one to the next."""

    def __init__(self, datasets: Sequence[Any]) -> None:
        self.datasets = list(datasets)
        self._ends = np.cumsum([len(each) for each in self.datasets], dtype=np.int64).tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def locate(self, index: int) -> tuple[int, int]:
        """Number of the data set that sample `index` is in, and its index there."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        place = bisect.bisect_right(self._ends, index)
        return place, index - (self._ends[place - 1] if place else 0)

    def __getitem__(self, key: SampleKey | int) -> Any:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[SampleKey | int]) -> list[Any]:
        """The samples of a batch in the order of the keys, each data set read once."""
        by_dataset: dict[int, list[tuple[int, int, SampleKey]]] = {}
        for row, key in enumerate(map(as_key, keys)):
            place, local = self.locate(key.index)
            by_dataset.setdefault(place, []).append((row, key.index, key._replace(index=local)))
        samples: list[Any] = [None] * len(keys)
        for place, wanted in by_dataset.items():
            dataset = self.datasets[place]
            read = _read_many(dataset, [key for _, _, key in wanted])
            for (row, index, _), sample in zip(wanted, read, strict=True):
                sample.index = index
                samples[row] = sample
        return samples

    def describe(self, index: int) -> str:
        """File and key of a sample, for messages."""
        place, local = self.locate(index)
        return self.datasets[place].describe(local)

    @property
    def filtered(self) -> dict[str, dict[str, int]]:
        """Name of each data set -> reason -> samples that its filter left out."""
        return {each.name: dict(each.filtered) for each in self.datasets}


def _read_many(dataset: Any, keys: list[SampleKey]) -> list[Any]:
    if hasattr(dataset, "__getitems__"):
        return dataset.__getitems__(keys)
    return [dataset[key] for key in keys]


class SkipLog:
    """Counts, in the main process, what workers could not read; names each sample once in the log.

    Args:
        dataset: the one that the batches come from; it has `describe`.
        most_named: samples that are named; the rest is only counted.
    """

    def __init__(self, dataset: Any, *, most_named: int = 100) -> None:
        self.dataset = dataset
        self.most_named = most_named
        self.counts: Counter[str] = Counter()
        self._seen: set[int] = set()

    def update(self, skipped: dict[int, str]) -> None:
        """Take note of `batch.skipped`."""
        for index, reason in skipped.items():
            if index in self._seen:
                continue
            self._seen.add(index)
            self.counts[reason] += 1
            if len(self._seen) <= self.most_named:
                logger.warning("%s cannot be read (%s) and is skipped", self.dataset.describe(index), reason)


def open_word_datasets(
    roots: Sequence[str | Path],
    *,
    labels: LabelRule,
    transform: WordTransform,
    masks: str | Path | OnlineMasks | None = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    min_side: int = 1,
    length: int | None = None,
    split: int = 0,
    difficulty: tuple[float, float] | None = None,
    turn_tall: float | None = None,
) -> list[WordDataset | RenderedDataset]:
    """Open every LMDB of some roots, and renderers for roots of the form `render://FILE.yaml`.

    Args:
        roots: LMDBs or folders of LMDBs.
        masks: root of the mask LMDBs (those of `<root of images>/X` are in `<masks>/X`), beside which rendered words
            bring their own; a network that makes all of them; or None for none.
        labels, transform, seed, cache_dir, min_side, turn_tall: as of WordDataset.
        length, split, difficulty: of renderers, as of `rendering.RenderedWords`.

    Returns:
        One data set for each LMDB, in the order of the roots and of the paths below them, with different names; its
        `root` is the number of the root that it was found in.
    """
    found: list[tuple[int, Path | str]] = []
    for number, root in enumerate(map(str, roots)):
        paths = [root] if root.startswith(RENDER_SCHEME) else find_lmdbs(root)
        found += [(number, path) for path in paths]
    names = _distinct_names([str(path) for _, path in found])
    datasets: list[WordDataset | RenderedDataset] = []
    for stream, ((number, path), name) in enumerate(zip(found, names, strict=True)):
        common = {"transform": transform, "seed": seed, "stream": stream, "name": name, "turn_tall": turn_tall}
        if isinstance(path, str):
            segmenter = masks.segmenter if isinstance(masks, OnlineMasks) else None
            common |= {"with_masks": masks is not None, "segmenter": segmenter}
            source = _open_renderer(path, length=length, seed=seed, split=split, stream=stream, difficulty=difficulty)
            datasets.append(RenderedDataset(source, labels=labels, **common))
        else:
            named = isinstance(masks, str | Path)
            source = LmdbMasks(find_mask_lmdb(masks, roots[number], path)) if named else masks
            common |= {"masks": source, "cache_dir": cache_dir, "min_side": min_side}
            datasets.append(WordDataset(path, labels=labels, **common))
        datasets[-1].root = number
    return datasets


def _open_renderer(root: str, **options: Any) -> Any:
    from rendering.endless import RenderedWords  # the engine is only needed for such roots

    return RenderedWords(root.removeprefix(RENDER_SCHEME), **options)


def _distinct_names(paths: Sequence[str]) -> list[str]:
    """The last parts of some paths, as many as it takes to tell them apart; the same path twice gets a number."""
    parts = [
        Path(path.removeprefix(RENDER_SCHEME)).with_suffix("").parts
        if path.startswith(RENDER_SCHEME)
        else Path(os.path.abspath(path)).parts
        for path in paths
    ]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["-".join(each[-depth:]).strip("/") for each in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{each[-1]}-{number}" for number, each in enumerate(parts, start=1)]


# --- language ---------------------------------------------------------------------------------------------------------


class LanguageDataset(Dataset):
    """Pairs of a spelling and the right one, of a tab-separated file with columns `inp` and `gt`.

    Texts are normalised by the rule; pairs of which one side is empty or too long are left out and counted.

    Args:
        path: the file, UTF-8.
        labels: what a usable text is.
        use_sm: mutate the spelling (`mutate_spelling`).
        smooth_label: smooth the one-hot spelling: a share of up to `smooth_factor`, drawn for each word, goes to random
            characters.
        seed: of both.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        labels: LabelRule,
        use_sm: bool = False,
        smooth_label: bool = False,
        smooth_factor: float = 0.1,
        seed: int = 0,
        stream: int = 0,
        name: str | None = None,
    ) -> None:
        self.path = Path(path)
        self.name = name or self.path.stem
        self.labels = labels
        self.use_sm = use_sm
        self.smooth_label = smooth_label
        self.smooth_factor = smooth_factor
        self.root = 0  # as of WordDataset
        self._generators = SampleGenerators(seed, stream)
        self._inputs, self._targets, self.filtered = read_pairs(self.path, labels)
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in self.filtered.items()) or "none"
        logger.info("%s: %s pairs; left out: %s", self.path, f"{len(self):,}", left_out)

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, key: SampleKey | int) -> LanguageSample:
        key = as_key(key)
        rng = self._generators.at(key)
        text, target = self._inputs[key.index], self._targets[key.index]
        if self.use_sm:
            text = mutate_spelling(text, self.labels.charset.characters, rng, max_length=self.labels.max_length)
        classes = np.zeros(self.labels.steps, np.int32)
        classes[: len(text)] = self.labels.charset.encode(text)
        return LanguageSample(classes, target, key.index, self._noise(rng) if self.smooth_label else None)

    def describe(self, index: int) -> str:
        """File and text of a sample, for messages."""
        return f"{self.path} {self._targets[index]!r}"

    def _noise(self, rng: np.random.Generator) -> np.ndarray:
        """What smoothing adds: (T, C), each step with the same sum, at most `smooth_factor`."""
        noise = rng.random((self.labels.steps, self.labels.charset.num_classes), dtype=np.float32)
        share = np.float32(rng.uniform(0.0, self.smooth_factor))
        return noise * (share / noise.sum(1, keepdims=True))


_MUTATION_COUNTS = np.cumsum([0.7, 0.15, 0.1, 0.05])  # none, one, two, three characters
_MUTATION_KINDS = np.cumsum([0.7, 0.15, 0.15])  # replace, insert before, delete
SHORT_WORD = 4


def mutate_spelling(text: str, characters: str, rng: np.random.Generator, *, max_length: int) -> str:
    """A text with a few wrong characters, as a recogniser would read it; never empty, never over `max_length`.

    None, one, two or three characters (0.7, 0.15, 0.1, 0.05), at most one of up to four and at most half of longer
    texts, are each replaced, preceded by another or deleted (0.7, 0.15, 0.15). Texts that are mostly digits stay.
    """
    count = int(np.searchsorted(_MUTATION_COUNTS, rng.random(), side="right"))
    count = min(count, 1 if len(text) <= SHORT_WORD else len(text) // 2, 3)
    if not count or sum(map(str.isdigit, text)) > len(text) / 2:
        return text
    mutated = list(text)
    for place in rng.choice(len(text), count, replace=False).tolist():
        kind = int(np.searchsorted(_MUTATION_KINDS, rng.random(), side="right"))
        if kind < 2:
            new = characters[rng.integers(len(characters))]
            mutated[place] = new if kind == 0 else new + text[place]
        else:
            mutated[place] = ""
    return "".join(mutated)[:max_length] or text


# --- segmentation -----------------------------------------------------------------------------------------------------


class SegmentationFolder:
    """Pairs of a folder: `images/` and `masks/` with equal stems; masks are grey, 255 = text."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        images = {each.stem: each for each in sorted((self.path / "images").iterdir())}
        masks = {each.stem: each for each in sorted((self.path / "masks").iterdir())}
        alone = len(images.keys() ^ masks.keys())
        self.filtered = {MISSING: alone} if alone else {}
        self.pairs = [(images[stem], masks[stem]) for stem in images if stem in masks]

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> tuple[bytes | None, bytes | None]:
        """The encoded image and mask, None of a file that cannot be read."""
        image, mask = self.pairs[index]
        return _bytes_of(image), _bytes_of(mask)

    def image(self, index: int) -> bytes:
        """An encoded image, empty where it cannot be read."""
        return _bytes_of(self.pairs[index][0]) or b""

    def describe(self, index: int) -> str:
        """Stem of a pair."""
        return self.pairs[index][0].stem


def _bytes_of(path: Path) -> bytes | None:
    """What a file holds; None of one that has gone, of a folder, or of a link that leads nowhere."""
    try:
        return path.read_bytes()
    except OSError:
        return None


class SegmentationLmdb:
    """Pairs of an LMDB with `image-%09d` and `mask-%09d`, or of a word LMDB and its mask LMDB."""

    def __init__(self, path: str | Path, mask_path: str | Path | None = None) -> None:
        self.path = Path(path)
        self.images = LmdbReader(path)
        self.masks = self.images if mask_path is None else LmdbReader(mask_path)
        self.mask_key: Callable[[int], str] = mask_key if mask_path is None else image_key
        self.filtered: dict[str, int] = {}
        self._length = len(self.images)
        if mask_path is not None and self._length:
            LmdbMasks(mask_path).check(self.images, np.arange(1, self._length + 1))
        elif self._length and self.images.get(mask_key(1)) is None:
            raise UserError(
                f"{path}: has no {mask_key(1)}, it is no segmentation data; "
                "name the masks of a word LMDB in dataset.masks.root"
            )

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> tuple[bytes | None, bytes | None]:
        """The encoded image and mask."""
        return self.images.get(image_key(index + 1)), self.masks.get(self.mask_key(index + 1))

    def image(self, index: int) -> bytes:
        """An encoded image, empty where there is none."""
        return self.images.get(image_key(index + 1)) or b""

    def describe(self, index: int) -> str:
        """Key of a pair."""
        return image_key(index + 1)


class SegmentationDataset(Dataset):
    """Images and their pixels' classes: 0, 1 = text, `ignore_index` where nothing is known.

    Args:
        source: pairs of a folder or of LMDBs.
        transform: makes crops of a fixed size for training; None gives whole images.
        ignore_index: label of pixels that do not count.
        ignore_level: grey level of masks that marks them; None has none.
        seed, stream, name: as of WordDataset.
    """

    def __init__(
        self,
        source: SegmentationFolder | SegmentationLmdb,
        *,
        transform: CropSegmentation | None = None,
        ignore_index: int = 255,
        ignore_level: int | None = None,
        seed: int = 0,
        stream: int = 0,
        name: str | None = None,
    ) -> None:
        self.source = source
        self.name = name or Path(os.path.abspath(source.path)).name
        self.transform = transform
        self.ignore_index = ignore_index
        self.root = 0  # as of WordDataset
        self.filtered = source.filtered
        self._generators = SampleGenerators(seed, stream)
        self._classes = (np.arange(256) >= TEXT_THRESHOLD).astype(np.uint8)  # by grey level
        if ignore_level is not None:
            self._classes[ignore_level] = ignore_index

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: SampleKey | int) -> SegmentationSample | Skipped:
        key = as_key(key)
        stored, stored_mask = self.source.read(key.index)
        if stored is None or stored_mask is None:
            return Skipped(key.index, MISSING if stored is None else "mask_missing")
        try:
            image = decode_image(stored)
            mask = decode_mask(stored_mask)
        except BrokenImageError:
            return Skipped(key.index, BROKEN)
        if mask.shape != image.shape[:2]:
            return Skipped(key.index, "mask_size")
        labels = self._classes[mask]
        if self.transform is not None:
            image, labels = self.transform(image, labels, self._generators.at(key))
        return SegmentationSample(image, labels, self.source.describe(key.index), key.index)

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of an image, from its header where that tells; (0, 0) where it cannot be read."""
        try:
            return image_size(self.source.image(index))
        except BrokenImageError:
            return 0, 0

    def describe(self, index: int) -> str:
        """File and key of a sample, for messages."""
        return f"{self.source.path} {self.source.describe(index)}"


def open_segmentation_datasets(
    roots: Sequence[str | Path],
    *,
    transform: CropSegmentation | None = None,
    mask_root: str | Path | None = None,
    ignore_index: int = 255,
    ignore_level: int | None = None,
    seed: int = 0,
) -> list[SegmentationDataset]:
    """Open every set of some roots.

    Args:
        roots: folders with `images/` and `masks/` (images, not LMDBs), LMDBs with images and masks, or folders of
            such LMDBs; with `mask_root`, word LMDBs or folders of them.
        mask_root: root of the mask LMDBs; those of `<root of images>/X` are in `<mask_root>/X`.
        transform, ignore_index, ignore_level, seed: as of SegmentationDataset.
    """
    sources: list[SegmentationFolder | SegmentationLmdb] = []
    numbers: list[int] = []  # of each source's root
    for number, root in enumerate(map(Path, roots)):
        if _is_pair_folder(root):
            sources.append(SegmentationFolder(root))
        else:
            for path in find_lmdbs(root):
                mask_path = None if LmdbReader(path).get(mask_key(1)) is not None or mask_root is None else mask_root
                sources.append(SegmentationLmdb(path, mask_path and find_mask_lmdb(mask_path, root, path)))
        numbers += [number] * (len(sources) - len(numbers))
    names = _distinct_names([str(source.path) for source in sources])
    datasets = [
        SegmentationDataset(
            source,
            transform=transform,
            ignore_index=ignore_index,
            ignore_level=ignore_level,
            seed=seed,
            stream=stream,
            name=name,
        )
        for stream, (source, name) in enumerate(zip(sources, names, strict=True))
    ]
    for dataset, number in zip(datasets, numbers, strict=True):
        dataset.root = number
    return datasets


def _is_pair_folder(root: Path) -> bool:
    folders = root / "images", root / "masks"
    return all(each.is_dir() for each in folders) and any(each.is_file() for each in folders[0].iterdir())


# --- loading ----------------------------------------------------------------------------------------------------------


def initialize_worker(_worker: int) -> None:
    """Let a worker process use one thread: the processes are what runs side by side.

    A process group of its own keeps Ctrl-C, and the launcher's signals, from ending it under the run: that stops when
    its step is done and ends its workers itself. A scheduler gives its notice (SIGUSR1) to every process of a job.
    """
    os.setpgrp()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """End this process when the one that started it is killed; torch's own watch misses that under forkserver."""
    multiprocessing.parent_process().join()
    os._exit(1)


def make_loader(
    dataset: Dataset,
    collate: Callable[[Sequence[Any]], Any],
    *,
    batch_sampler: Any = None,
    sampler: Any = None,
    batch_size: int = 1,
    num_workers: int = 0,
    multiprocessing_context: str | None = None,
    pin_memory: bool = False,
) -> DataLoader:
    """A data loader over a batch sampler (training), or over a sampler in batches of `batch_size` (evaluation)."""
    batching: dict[str, Any] = {"batch_sampler": batch_sampler}
    if batch_sampler is None:
        batching = {"sampler": sampler, "batch_size": batch_size}
    return DataLoader(
        dataset,
        collate_fn=collate,
        num_workers=num_workers,
        multiprocessing_context=multiprocessing_context if num_workers else None,
        worker_init_fn=initialize_worker,
        pin_memory=pin_memory and torch.cuda.is_available(),
        generator=torch.Generator(),  # of the workers' seeds, which torch's own would lose a number to at every start
        **batching,
    )
