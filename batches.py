"""What the data loader hands to the loop: batches with named fields, and how samples become one."""

import dataclasses
import itertools
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from charset import Charset

B = TypeVar("B", bound="_Batch")

# Only ASCII: the lower case of some other letters is longer than one character.
_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)

EMPTY = "empty"  # nothing of the label is in the charset
TOO_LONG = "too_long"

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class LabelRule:
    """What a network is taught of a label.

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
        """T: the longest text and its end."""
        return self.max_length + 1

    def normalize(self, text: str) -> str:
        """The characters of `text` that count."""
        return self.charset.normalize(text if self.case_sensitive else text.translate(_LOWER))

    def unusable(self, text: str) -> str | None:
        """Why a label cannot be taught: nothing of it is in the charset, or it is too long; None if it can."""
        length = len(self.normalize(text))
        if not length:
            return EMPTY
        return TOO_LONG if length > self.max_length else None

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Classes (N, T) int64, 0 from the end of each text on, and lengths (N,) int64 that count the end."""
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
    """A sample that could not be read, and why; its place in the batch stays empty."""

    index: int
    reason: str


@dataclass
class WordSample:
    """One word, transformed: image (H, W, 3) uint8 RGB, mask (H, W) uint8 with 255 = text, label as stored."""

    image: np.ndarray
    mask: np.ndarray | None
    text: str
    index: int


@dataclass
class LanguageSample:
    """A spelling (classes (T,) int32, 0 from its end on), its right spelling, and the smoothing of the first."""

    classes: np.ndarray
    text: str
    index: int
    noise: np.ndarray | None = None  # (T, C) float32, sums to at most smooth_factor at every step


@dataclass
class SegmentationSample:
    """A picture (H, W, 3) uint8 RGB and its labels (H, W) uint8: 0, 1 = text, or the index to ignore."""

    image: np.ndarray
    labels: np.ndarray
    name: str
    index: int


# --- batches ----------------------------------------------------------------------------------------------------------


@dataclass
class _Batch:
    """What all batches can do; fields are tensors and lists with one entry for each of N samples."""

    def __len__(self) -> int:
        return len(self.indices)

    def to(self: B, device: torch.device | str, non_blocking: bool = True) -> B:
        """The batch with its tensors on `device`."""
        moved = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self._tensors()}
        return dataclasses.replace(self, **moved)

    def pin_memory(self: B) -> B:
        """The batch in page-locked memory; the data loader calls it."""
        return dataclasses.replace(self, **{name: tensor.pin_memory() for name, tensor in self._tensors()})

    def split(self: B, parts: int) -> list[B]:
        """At most `parts` batches with the samples of this one in order, none of them empty unless this one is."""
        bounds = np.linspace(0, len(self), min(parts, max(len(self), 1)) + 1).astype(int).tolist()
        if len(bounds) == 2:
            return [self]
        result = []
        for start, end in itertools.pairwise(bounds):
            rows = {
                each.name: getattr(self, each.name)[start:end]
                for each in dataclasses.fields(self)
                if isinstance(getattr(self, each.name), Tensor | list)
            }
            result.append(dataclasses.replace(self, **rows, skipped=self.skipped if start == 0 else {}))
        return result

    def state_dict(self) -> dict[str, Any]:
        """The fields, for a file."""
        return {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Tensor):
                yield each.name, value


@dataclass
class Batch(_Batch):
    """N words.

    Fields:
        images: (N, 3, H, W) float32, normalised with ImageNet's mean and deviation.
        masks: (N, 1, H, W) float32 in [0, 1], 1 = text; None for a network without masks.
        labels: (N, T) int64 classes of the normalised labels, 0 from their end on.
        lengths: (N,) int64, the end counted.
        texts: N labels as stored.
        indices: (N,) int64 place of each sample in the data set.
        skipped: index -> reason of the samples of this batch that could not be read; N does not count them.
    """

    images: Tensor
    masks: Tensor | None
    labels: Tensor
    lengths: Tensor
    texts: list[str]
    indices: Tensor
    skipped: dict[int, str] = field(default_factory=dict)

    def inputs(self) -> tuple[Tensor, Tensor | None]:
        """What the network is called with."""
        return self.images, self.masks

    def targets(self) -> tuple[Tensor, Tensor]:
        """What the criterion is called with, behind the network's output."""
        return self.labels, self.lengths


@dataclass
class LanguageBatch(_Batch):
    """N spellings and what they should read.

    Fields:
        probabilities: (N, T, C) float32 probabilities, one-hot unless smoothed.
        input_lengths: (N,) int64 of the spellings, the end counted.
        labels, lengths, texts, indices, skipped: as of Batch.
    """

    probabilities: Tensor
    input_lengths: Tensor
    labels: Tensor
    lengths: Tensor
    texts: list[str]
    indices: Tensor
    skipped: dict[int, str] = field(default_factory=dict)

    def inputs(self) -> tuple[Tensor, Tensor]:
        """What the language network is called with."""
        return self.probabilities, self.input_lengths

    def targets(self) -> tuple[Tensor, Tensor]:
        """What the criterion is called with, behind the network's output."""
        return self.labels, self.lengths


@dataclass
class SegmentationBatch(_Batch):
    """N pictures of one size and their labels.

    Fields:
        images: (N, 3, H, W) float32, normalised with ImageNet's mean and deviation.
        labels: (N, H, W) int64: 0, 1 = text, ignore_index where nothing is known.
        names: N names of the samples.
        indices, skipped: as of Batch.
    """

    images: Tensor
    labels: Tensor
    names: list[str]
    indices: Tensor
    skipped: dict[int, str] = field(default_factory=dict)

    def inputs(self) -> tuple[Tensor]:
        """What SSN is called with."""
        return (self.images,)

    def targets(self) -> tuple[Tensor]:
        """What its criterion is called with, behind the network's output."""
        return (self.labels,)


# --- collation --------------------------------------------------------------------------------------------------------


def part_skipped(samples: Sequence[Any]) -> tuple[list[Any], dict[int, str]]:
    """The samples that could be read, and index -> reason of the others."""
    read = [sample for sample in samples if not isinstance(sample, Skipped)]
    return read, {sample.index: sample.reason for sample in samples if isinstance(sample, Skipped)}


class ImageNormalizer:
    """Pictures (N, H, W, 3) uint8 RGB -> (N, 3, H, W) float32, mean and deviation of ImageNet."""

    def __init__(self, *, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> None:
        self.scale = (1.0 / (255.0 * torch.tensor(std))).view(3, 1, 1)
        self.offset = (-torch.tensor(mean) / torch.tensor(std)).view(3, 1, 1)

    def __call__(self, pictures: np.ndarray) -> Tensor:
        planes = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return planes.mul_(self.scale).add_(self.offset)

    def inverse(self, images: Tensor) -> Tensor:
        """Normalised images (..., 3, H, W) -> RGB in [0, 1]."""
        scale, offset = self.scale.to(images), self.offset.to(images)
        return ((images - offset) / (255.0 * scale)).clamp(0, 1)


class WordCollate:
    """Samples of one size -> Batch; picklable.

    Args:
        labels: what is taught of a label.
        size: height and width, for a batch of which nothing could be read.
        with_masks: whether such a batch has masks.
    """

    def __init__(self, labels: LabelRule, *, size: tuple[int, int] = (32, 128), with_masks: bool = False) -> None:
        self.labels = labels
        self.size = size
        self.with_masks = with_masks
        self.normalize = ImageNormalizer()

    def __call__(self, samples: Sequence[WordSample | Skipped]) -> Batch:
        read, skipped = part_skipped(samples)
        texts = [sample.text for sample in read]
        labels, lengths = self.labels.encode(texts)
        pictures = np.stack([s.image for s in read]) if read else np.empty((0, *self.size, 3), np.uint8)
        masks = None
        if read and read[0].mask is not None:
            masks = torch.from_numpy(np.stack([sample.mask for sample in read])).unsqueeze(1).float().div_(255.0)
        elif not read and self.with_masks:
            masks = torch.empty(0, 1, *self.size)
        return Batch(
            images=self.normalize(pictures),
            masks=masks,
            labels=labels,
            lengths=lengths,
            texts=texts,
            indices=torch.tensor([sample.index for sample in read], dtype=torch.int64),
            skipped=skipped,
        )


class LanguageCollate:
    """Spellings -> LanguageBatch with one-hot (or smoothed) inputs; picklable."""

    def __init__(self, labels: LabelRule) -> None:
        self.labels = labels

    def __call__(self, samples: Sequence[LanguageSample]) -> LanguageBatch:
        classes = torch.from_numpy(np.stack([sample.classes for sample in samples])).long()  # (N, T)
        probabilities = torch.zeros(*classes.shape, self.labels.charset.num_classes)  # (N, T, C)
        probabilities.scatter_(2, classes.unsqueeze(2), 1.0)
        if samples[0].noise is not None:
            noise = torch.from_numpy(np.stack([sample.noise for sample in samples]))  # (N, T, C)
            probabilities = probabilities * (1 - noise.sum(-1, keepdim=True)) + noise
        texts = [sample.text for sample in samples]
        labels, lengths = self.labels.encode(texts)
        return LanguageBatch(
            probabilities=probabilities,
            input_lengths=(classes > 0).sum(1) + 1,
            labels=labels,
            lengths=lengths,
            texts=texts,
            indices=torch.tensor([sample.index for sample in samples], dtype=torch.int64),
        )


class SegmentationCollate:
    """Pictures of one size -> SegmentationBatch; picklable. `size` is for a batch of which nothing could be read."""

    def __init__(self, *, size: tuple[int, int] = (32, 128)) -> None:
        self.size = size
        self.normalize = ImageNormalizer()

    def __call__(self, samples: Sequence[SegmentationSample | Skipped]) -> SegmentationBatch:
        read, skipped = part_skipped(samples)
        pictures = np.stack([s.image for s in read]) if read else np.empty((0, *self.size, 3), np.uint8)
        labels = np.stack([s.labels for s in read]) if read else np.empty((0, *self.size), np.uint8)
        return SegmentationBatch(
            images=self.normalize(pictures),
            labels=torch.from_numpy(labels).long(),
            names=[sample.name for sample in read],
            indices=torch.tensor([sample.index for sample in read], dtype=torch.int64),
            skipped=skipped,
        )
