"""Samples and batches with named fields, and the collation that makes one of the other.

Images, masks and pixel labels stay in 8 bits until a batch is on its device: workers and GPUs receive a quarter of the
bytes.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from loading.charset import Charset

B = TypeVar("B", bound="_Batch")

EMPTY = "empty"  # nothing of the label is in the charset
TOO_LONG = "too_long"

IGNORED = 255  # label of pixels that no loss and no score counts

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class LabelRule:
    """Decides which characters of a label the network learns, and which labels are unusable.

    Args:
        charset: the network's characters.
        max_length: longest text, characters; the network reads T = max_length + 1 steps.
        case_sensitive: keep the case where the charset has upper case; False lower-cases.
    """

    charset: Charset
    max_length: int = 25
    case_sensitive: bool = False

    @property
    def steps(self) -> int:
        """T: the length of the longest text and its end."""
        return self.max_length + 1

    def normalize(self, text: str) -> str:
        """Return the characters of `text` that count."""
        return self.charset.normalize(text, lower=not self.case_sensitive)

    def unusable(self, text: str) -> str | None:
        """Return why a label is unusable: none of it is in the charset, or it is too long; None if it is usable."""
        length = len(self.normalize(text))
        if not length:
            return EMPTY
        return TOO_LONG if length > self.max_length else None

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return classes (N, T) int64, 0 from the end of each text on, and lengths (N,) int64 that count the end."""
        classes = np.zeros((len(texts), self.steps), np.int64)
        lengths = np.empty(len(texts), np.int64)
        for row, text in enumerate(texts):
            encoded = self.charset.encode(self.normalize(text))
            classes[row, : len(encoded)] = encoded
            lengths[row] = len(encoded) + 1
        return torch.from_numpy(classes), torch.from_numpy(lengths)


# --- samples ----------------------------------------------------------------------------------------------------------


@dataclass
class Skipped:
    """A sample that could not be read, and why; its batch is smaller by one."""

    index: int
    reason: str


@dataclass
class WordSample:
    """One word, transformed: image (H, W, 3) uint8 RGB, mask (H, W) uint8 with 255 = text, label as stored.

    `turned` holds image and mask of each further view in which the word is read (`dataset.turn_tall`).
    """

    image: np.ndarray
    mask: np.ndarray | None
    text: str
    index: int
    turned: Sequence[tuple[np.ndarray, np.ndarray | None]] = ()

    @property
    def views(self) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Return image and mask of every view, the word as stored first."""
        return [(self.image, self.mask), *self.turned]


@dataclass
class LanguageSample:
    """A spelling, the right text, and the smoothing of the first."""

    spelling: str
    text: str
    index: int
    noise: np.ndarray | None = None  # (T, C) float32, sums to at most smooth_factor at every step


@dataclass
class SegmentationSample:
    """An image (H, W, 3) uint8 RGB and its labels (H, W) uint8: 0, 1 = text, or the index to ignore."""

    image: np.ndarray
    labels: np.ndarray
    index: int


# --- batches ----------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Batch:
    """Base of all batches; fields are tensors and lists with one entry for each of N samples.

    Fields:
        indices: (N,) int64 place of each sample in the data set.
        skipped: index -> reason of the samples of this batch that could not be read; N does not count them.
    """

    indices: Tensor
    skipped: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.indices)

    def to(self: B, device: torch.device | str, non_blocking: bool = True) -> B:
        """Return the batch with its tensors on `device`."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self: B) -> B:
        """Return the batch in page-locked memory; the data loader calls it."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self: B, change: Callable[[Tensor], Tensor]) -> B:
        fields = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **fields)

    def split(self: B, parts: int) -> list[B]:
        """Return at most `parts` batches with the samples in order; none is empty unless this one is."""
        bounds = np.linspace(0, len(self), min(parts, max(len(self), 1)) + 1).astype(int).tolist()
        if len(bounds) == 2:
            return [self]
        result = []
        for start, end in itertools.pairwise(bounds):
            rows = {name: value[start:end] for name, value in vars(self).items() if isinstance(value, Tensor | list)}
            result.append(dataclasses.replace(self, **rows, skipped=self.skipped if start == 0 else {}))
        return result


@dataclass(kw_only=True)
class _TextBatch(_Batch):
    """Base of the batches with texts.

    Fields:
        labels: (N, T) int64 classes of the normalised labels, 0 from their end on.
        lengths: (N,) int64, the end counted.
        texts: N labels as stored.
    """

    labels: Tensor
    lengths: Tensor
    texts: list[str]

    def targets(self) -> tuple[Tensor, Tensor]:
        """Return the arguments of the criterion after the network's output."""
        return self.labels, self.lengths


@dataclass(kw_only=True)
class Batch(_TextBatch):
    """N words.

    Fields:
        images: (N, 3, H, W) uint8, RGB.
        masks: (N, 1, H, W) uint8, 255 = text; None for a network without masks.
        owners: (M,) int64 in ascending order, the word that each image shows, where some words are read in several
            views (`dataset.turn_tall`; never in training): images and masks have M rows then. None where M = N.
    """

    images: Tensor
    masks: Tensor | None
    owners: Tensor | None = None

    def inputs(self) -> tuple[Tensor, Tensor | None]:
        """Return the arguments of the network: normalised images and masks in [0, 1], float32."""
        return normalize_images(self.images), None if self.masks is None else self.masks / 255.0

    def with_images(self, rows: Sequence[int]) -> "Batch":
        """Return the batch with one image for each word: those of `rows` among its M."""
        masks = None if self.masks is None else self.masks[rows]
        return dataclasses.replace(self, images=self.images[rows], masks=masks, owners=None)


@dataclass(kw_only=True)
class LanguageBatch(_TextBatch):
    """N spellings and what they should read.

    Fields:
        probabilities: (N, T, C) float32 probabilities, one-hot unless smoothed.
        input_lengths: (N,) int64 of the spellings, the end counted.
    """

    probabilities: Tensor
    input_lengths: Tensor

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Return the arguments of the language network."""
        return self.probabilities, self.input_lengths


@dataclass(kw_only=True)
class SegmentationBatch(_Batch):
    """N images of one size and their labels.

    Fields:
        images: (N, 3, H, W) uint8, RGB.
        labels: (N, H, W) uint8: 0, 1 = text, IGNORED where nothing is known.
    """

    images: Tensor
    labels: Tensor

    def inputs(self) -> tuple[Tensor]:
        """Return the arguments of SSN: normalised images, float32."""
        return (normalize_images(self.images),)

    def targets(self) -> tuple[Tensor]:
        """Return the arguments of its criterion after the network's output: int64."""
        return (self.labels.long(),)


# --- collation --------------------------------------------------------------------------------------------------------


def split_skipped(samples: Sequence[Any]) -> tuple[list[Any], dict[int, str]]:
    """Return the samples that could be read, and index -> reason of the others."""
    read = [sample for sample in samples if not isinstance(sample, Skipped)]
    return read, {sample.index: sample.reason for sample in samples if isinstance(sample, Skipped)}


def sample_indices(samples: Sequence[Any]) -> Tensor:
    """Return the places (N,) int64 of samples in their data set."""
    return torch.tensor([sample.index for sample in samples], dtype=torch.int64)


def stack(arrays: Sequence[np.ndarray]) -> Tensor:
    """Stack arrays (H, W[, 3]) uint8 to (N, H, W[, 3]), or to (0, 0, 0, 3) if there are none."""
    return torch.from_numpy(np.stack(arrays) if arrays else np.empty((0, 0, 0, 3), np.uint8))


def stack_images(images: Sequence[np.ndarray]) -> Tensor:
    """Stack RGB images (H, W, 3) uint8 to (N, 3, H, W), channels-last in memory."""
    return stack(images).permute(0, 3, 1, 2)


def normalize_images(images: Tensor) -> Tensor:
    """Normalise RGB levels 0 to 255 (N, 3, H, W) to float32 by ImageNet's mean and deviation, contiguous."""
    scale, offset = _scale_and_offset(images.device)
    return images.to(torch.float32, memory_format=torch.contiguous_format, copy=True).mul_(scale).add_(offset)


@functools.cache
def _scale_and_offset(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (3, 1, 1) each; kept, as fetching them from the host would make a GPU wait at every batch."""
    with torch.inference_mode(False):
        mean, std = torch.tensor(IMAGENET_MEAN, device=device), torch.tensor(IMAGENET_STD, device=device)
        return (1.0 / (255.0 * std)).view(3, 1, 1), (-mean / std).view(3, 1, 1)


@dataclass(frozen=True)
class WordCollate:
    """Samples of one size -> Batch; picklable. `labels` decides which characters the network learns."""

    labels: LabelRule

    def __call__(self, samples: Sequence[WordSample | Skipped]) -> Batch:
        read, skipped = split_skipped(samples)
        texts = [sample.text for sample in read]
        labels, lengths = self.labels.encode(texts)
        views = [view for sample in read for view in sample.views]
        with_masks = bool(read) and read[0].mask is not None
        owners = None
        if len(views) > len(read):
            owners = torch.tensor([word for word, sample in enumerate(read) for _ in sample.views])
        return Batch(
            images=stack_images([image for image, _ in views]),
            masks=stack([mask for _, mask in views]).unsqueeze(1) if with_masks else None,
            labels=labels,
            lengths=lengths,
            texts=texts,
            indices=sample_indices(read),
            skipped=skipped,
            owners=owners,
        )


@dataclass(frozen=True)
class LanguageCollate:
    """Spellings -> LanguageBatch with one-hot (or smoothed) inputs; picklable."""

    labels: LabelRule

    def __call__(self, samples: Sequence[LanguageSample]) -> LanguageBatch:
        classes, input_lengths = self.labels.encode([sample.spelling for sample in samples])
        probabilities = torch.zeros(*classes.shape, self.labels.charset.num_classes)  # (N, T, C)
        probabilities.scatter_(2, classes.unsqueeze(2), 1.0)
        if samples and samples[0].noise is not None:
            noise = torch.from_numpy(np.stack([sample.noise for sample in samples]))  # (N, T, C)
            probabilities = probabilities * (1 - noise.sum(-1, keepdim=True)) + noise
        texts = [sample.text for sample in samples]
        labels, lengths = self.labels.encode(texts)
        return LanguageBatch(
            probabilities=probabilities,
            input_lengths=input_lengths,
            labels=labels,
            lengths=lengths,
            texts=texts,
            indices=sample_indices(samples),
        )


def collate_segmentation(samples: Sequence[SegmentationSample | Skipped]) -> SegmentationBatch:
    """Return images of one size and their labels as a batch."""
    read, skipped = split_skipped(samples)
    return SegmentationBatch(
        images=stack_images([sample.image for sample in read]),
        labels=stack([sample.labels for sample in read]),
        indices=sample_indices(read),
        skipped=skipped,
    )
