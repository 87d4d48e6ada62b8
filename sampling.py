"""Which samples come when: sample keys, the random generator of each sample, and samplers that can be resumed."""

from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from utils import UserError


class SampleKey(NamedTuple):
    """What a data set is asked for: sample `index` as it comes in `epoch`. A plain index means epoch 0."""

    epoch: int
    index: int


def as_key(key: "SampleKey | int") -> SampleKey:
    """A sample key of what a data set was indexed with."""
    return key if isinstance(key, SampleKey) else SampleKey(0, int(key))


class SampleGenerators:
    """The random generator of every sample, a function of (seed, stream, epoch, index) alone.

    Philox counts: the four numbers choose a place in its sequence, so that there is nothing to mix and no two samples
    share numbers. One generator is set to the place of each sample, which takes a sixth of the time of making one.

    Args:
        seed: of the run, not negative.
        stream: what tells data sets with equal indices apart.
    """

    def __init__(self, seed: int, stream: int = 0) -> None:
        self.seed = seed
        self.stream = stream
        self._philox = np.random.Philox(key=0)
        self._generator = np.random.Generator(self._philox)
        self._counter = np.array([0, stream, 0, 0], np.uint64)
        self._start = {
            "bit_generator": "Philox",
            "state": {"counter": self._counter, "key": np.array([seed, 0], np.uint64)},
            "buffer": np.zeros(4, np.uint64),
            "buffer_pos": 4,  # nothing is left in it
            "has_uint32": 0,
            "uinteger": 0,
        }

    def __getstate__(self) -> dict[str, int]:
        return {"seed": self.seed, "stream": self.stream}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(**state)

    def at(self, key: SampleKey) -> np.random.Generator:
        """The generator of one sample; the next call sets the same object to another one."""
        self._counter[2], self._counter[3] = key.index, key.epoch
        self._philox.state = self._start
        return self._generator


class ResumableBatchSampler(Sampler[list[SampleKey]]):
    """Endless batches of sample keys, epoch after epoch, starting where `set_position` says.

    The global batches and their order depend on (seed, epoch, length, batch_size) only; every process takes its
    contiguous part of each of them, so that the number of processes changes nothing.

    Args:
        length: samples of the data set.
        batch_size: samples of a global batch, over all processes.
        seed: of the order.
        shuffle: draw a new order for every epoch; else samples come in theirs.
        drop_last: leave out the last, smaller batch of an epoch. An epoch that has no whole batch keeps its only one.
        rank, world_size: which part of each batch is this process's.

    Raises:
        UserError: the data set is empty, or a global batch cannot be shared evenly.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if length < 1:
            raise UserError("the training data has no samples; check dataset.train.roots and the filter's counts")
        if batch_size % world_size:
            raise UserError(
                f"dataset.train.batch_size is {batch_size}, which {world_size} processes cannot share evenly; "
                f"give a multiple of {world_size}"
            )
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.batch = 0

    def set_position(self, epoch: int, batch: int) -> None:
        """Let the next iteration begin with batch `batch` of epoch `epoch`, both counted from 0."""
        self.epoch = epoch + batch // len(self)
        self.batch = batch % len(self)

    def __len__(self) -> int:
        """Batches of one epoch."""
        whole, rest = divmod(self.length, self.batch_size)
        return max(whole, 1) if self.drop_last or not rest else whole + 1

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, first = self.epoch, self.batch
        while True:
            order = self._order(epoch)
            for batch in range(first, len(self)):
                yield [SampleKey(epoch, int(index)) for index in self._part(order, batch)]
            epoch, first = epoch + 1, 0

    def _order(self, epoch: int) -> np.ndarray:
        """Sample indices (length,) in the order of an epoch."""
        order = np.arange(self.length, dtype=np.int32 if self.length < 1 << 31 else np.int64)
        if self.shuffle:
            np.random.Generator(np.random.PCG64([self.seed, epoch])).shuffle(order)
        return order

    def _part(self, order: np.ndarray, batch: int) -> np.ndarray:
        """This process's part of a global batch; parts of a smaller last batch differ by one sample at most."""
        whole = order[batch * self.batch_size : (batch + 1) * self.batch_size]
        return np.array_split(whole, self.world_size)[self.rank]


class ShardedSampler(Sampler[SampleKey]):
    """Every sample once, in order, over all processes: this one's contiguous share; shares may differ by a sample."""

    def __init__(self, length: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.first = rank * length // world_size
        self.end = (rank + 1) * length // world_size

    def __len__(self) -> int:
        return self.end - self.first

    def __iter__(self) -> Iterator[SampleKey]:
        return (SampleKey(0, index) for index in range(self.first, self.end))


class EqualSizeBatchSampler(Sampler[list[SampleKey]]):
    """Every sample once over all processes, in batches of samples of equal size.

    Pictures are read at their own size in evaluation; padding them to a common one would change what a network sees.

    Args:
        sizes: the size of each sample, anything that can be compared.
        batch_size: most samples of one batch.
    """

    def __init__(self, sizes: Sequence[Hashable], batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        groups: dict[Hashable, list[int]] = {}
        for index in ShardedSampler(len(sizes), rank=rank, world_size=world_size):
            groups.setdefault(sizes[index.index], []).append(index.index)
        self.batches = [
            [SampleKey(0, index) for index in group[start : start + batch_size]]
            for group in groups.values()
            for start in range(0, len(group), batch_size)
        ]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        return iter(self.batches)
