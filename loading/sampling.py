"""Decides which samples come when: sample keys, the generator of each sample, and samplers that can be resumed."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from utils import UserError


class SampleKey(NamedTuple):
    """Names sample `index` as it comes in `epoch`, at `progress` (0 to 1) of the run. A plain index means epoch 0."""

    epoch: int
    index: int
    progress: float = 0.0


def as_key(key: "SampleKey | int") -> SampleKey:
    """Return what a data set was indexed with as a sample key."""
    return key if isinstance(key, SampleKey) else SampleKey(0, int(key))


class PlacedGenerator:
    """A random generator that is moved to places of Philox's sequence, no two of which share random numbers.

    Moving one generator takes a tenth of the time of making one for each place.
    """

    def __init__(self) -> None:
        self._generator = np.random.Generator(np.random.Philox(key=0))
        self._start = self._generator.bit_generator.state

    def at(self, key: tuple[int, int], counter: tuple[int, int, int]) -> np.random.Generator:
        """Return the generator of a place, named by numbers of 64 bits; the next call moves the same object."""
        self._start["state"]["key"][:] = key
        self._start["state"]["counter"][1:] = counter
        self._generator.bit_generator.state = self._start
        return self._generator


@dataclass(eq=False)
class ResumableBatchSampler:
    """Endless batches of sample keys, epoch after epoch, starting where `set_position` says.

    The global batches and their order depend on (seed, epoch, length, batch_size) only; every process takes its
    contiguous part of each of them, so that the number of processes changes nothing. The last, smaller batch of an
    epoch is left out, unless it is the only one.

    Args:
        length: samples of the data set.
        batch_size: samples of a global batch, over all processes.
        seed: of the order.
        rank, world_size: which part of each batch is this process's.
        run_batches: global batches of the run, for the keys' `progress`; None leaves that at 0.

    Raises:
        UserError: a global batch cannot be shared evenly, or there are fewer samples than processes.
    """

    length: int
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    run_batches: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size % self.world_size:
            raise UserError(
                f"dataset.train.batch_size is {self.batch_size}, which {self.world_size} processes cannot share "
                f"evenly; give a multiple of {self.world_size}"
            )
        if self.length < self.world_size:
            raise UserError(
                f"dataset.train has {self.length} samples for {self.world_size} processes; each needs one of every "
                f"batch: start at most {self.length} processes"
            )
        self.set_position(0, 0)

    def set_position(self, epoch: int, batch: int) -> None:
        """Start the next iteration with batch `batch` of epoch `epoch`, both counted from 0."""
        self.epoch = epoch + batch // len(self)
        self.batch = batch % len(self)

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return max(self.length // self.batch_size, 1)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, batch = self.epoch, self.batch
        while True:
            for samples in self._batches(epoch, batch):
                progress = float(self._progress(epoch * len(self) + batch))
                # This process's part; parts of a smaller batch differ by one sample at most.
                part = np.array_split(samples, self.world_size)[self.rank]
                yield [SampleKey(passed, index, progress) for passed, index in part.tolist()]
                batch += 1
            epoch, batch = epoch + 1, 0

    def _progress(self, batches: np.ndarray | int) -> np.ndarray:
        """Return the part of the run that is done after some global batches, 0 to 1."""
        return np.minimum(np.asarray(batches) / (self.run_batches or np.inf), 1.0)

    def _batches(self, epoch: int, first: int) -> Iterator[np.ndarray]:
        """Yield the global batches of an epoch from number `first` on: epoch and index of each sample (n, 2)."""
        order = self._order(self.length, epoch)
        for batch in range(first, len(self)):
            indices = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield np.stack([np.full_like(indices, epoch), indices], axis=1)

    def _order(self, length: int, *numbers: int) -> np.ndarray:
        """Return indices (length,) in the order that the seed and some numbers decide."""
        order = np.arange(length, dtype=np.int32 if length < 1 << 31 else np.int64)
        np.random.Generator(np.random.PCG64([self.seed, *numbers])).shuffle(order)
        return order


_GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples are as even between 0 and 1 as any sequence's


@dataclass(eq=False, kw_only=True)
class MixtureBatchSampler(ResumableBatchSampler):
    """Endless batches of several data sets, each with a share of every global batch.

    In a batch a set has its share to within one sample, and over many batches to within a few. Each set has an order of
    its own, and all of it comes before any of it comes again; the epoch in a key is the number of that pass. What comes
    when depends on seed, lengths, shares, `batch_size` and `run_batches` only.

    Args:
        lengths: samples of each set; the indices of keys go on from one to the next.
        shares: of each set, at the start and at the end of the run, between which it changes linearly; they are divided
            by their sum.
        length: samples of an epoch; None takes all sets' together.

    Raises:
        UserError: a set with a share is empty, or a global batch cannot be shared evenly.
    """

    lengths: Sequence[int]
    shares: Sequence[tuple[float, float]]
    length: int | None = None

    def __post_init__(self) -> None:
        self.length = self.length or sum(self.lengths)
        super().__post_init__()
        self.shares = np.array(self.shares, np.float64)  # (sets, 2)
        self.shares /= self.shares.sum(0)
        for place in np.flatnonzero(self.shares.sum(1)):
            if not self.lengths[place]:
                raise UserError(f"dataset.train.shares: root {place + 1} has a share and no usable sample; give it 0")
        self._starts = np.cumsum([0, *self.lengths])  # first index of each set
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # set -> pass that it is in, and its order

    def _batches(self, epoch: int, first: int) -> Iterator[np.ndarray]:
        number = epoch * len(self)
        counts = self._counts(np.arange(number + len(self)))  # of each set in every batch from the first epoch's on
        drawn = np.cumsum(counts, axis=0) - counts  # before each batch
        for batch in range(first, len(self)):
            row = number + batch
            parts = [self._part(place, drawn[row, place], counts[row, place]) for place in range(len(self.lengths))]
            samples = np.concatenate(parts)
            yield samples[self._order(len(samples), epoch, batch, 1)]

    def _counts(self, batches: np.ndarray) -> np.ndarray:
        """Return the samples of each set in some global batches: (n, sets), rows add up to `batch_size`."""
        progress = self._progress(batches)[:, None]
        shares = (1 - progress) * self.shares[:, 0] + progress * self.shares[:, 1]
        edges = np.cumsum(shares, axis=1) * self.batch_size
        edges[:, -1] = self.batch_size
        # Rounding at a place that moves from batch to batch gives each set its share in the long run.
        edges = np.floor(edges + (batches * _GOLDEN % 1)[:, None] + 1e-9).astype(np.int64)
        return np.diff(edges, axis=1, prepend=0)

    def _part(self, place: int, drawn: int, count: int) -> np.ndarray:
        """Return pass and index (count, 2) of the next samples of a set of which `drawn` have come."""
        if not count:
            return np.empty((0, 2), np.int64)
        passes, places = np.divmod(np.arange(drawn, drawn + count), self.lengths[place])
        indices = np.empty_like(places)
        for number in np.unique(passes).tolist():
            if self._orders.get(place, (-1,))[0] != number:
                self._orders[place] = number, self._order(self.lengths[place], number, place, 0)
            chosen = passes == number
            indices[chosen] = self._orders[place][1][places[chosen]]
        return np.stack([passes, indices + self._starts[place]], axis=1)
