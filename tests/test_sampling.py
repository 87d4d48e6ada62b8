"""Mixtures: each data set has its share of every batch, in passes of its own; resuming and processes change nothing."""

import itertools
from collections import Counter

import numpy as np
import pytest

from loading.sampling import MixtureBatchSampler, ResumableBatchSampler, SampleKey
from utils import UserError

LENGTHS = (50, 7, 1000)  # indices from 0, 50 and 57 on


def batches_of(sampler, count: int) -> list[list[SampleKey]]:
    return list(itertools.islice(iter(sampler), count))


def set_of(key: SampleKey) -> int:
    return int(np.searchsorted([50, 57], key.index, side="right"))


def counts_of(batch: list[SampleKey]) -> list[int]:
    counted = Counter(map(set_of, batch))
    return [counted[place] for place in range(len(LENGTHS))]


def mixture(shares, batch_size: int = 20, **options) -> MixtureBatchSampler:
    pairs = [share if isinstance(share, tuple) else (share, share) for share in shares]
    options = {"seed": 3, "run_batches": 200, **options}
    return MixtureBatchSampler(batch_size, lengths=LENGTHS, shares=pairs, **options)


def test_every_batch_holds_the_shares():
    batches = batches_of(mixture([5, 1, 4]), 300)
    assert {len(batch) for batch in batches} == {20}
    assert all(counts_of(batch) == [10, 2, 8] for batch in batches)
    uneven = batches_of(mixture([1, 1, 1.01]), 900)  # 6.64 and 6.71 of 20
    assert {each for batch in uneven for each in counts_of(batch)} == {6, 7}
    np.testing.assert_allclose(
        np.sum([counts_of(batch) for batch in uneven], 0), 18000 / 3.01 * np.array([1, 1, 1.01]), atol=4
    )


def test_shares_change_linearly_over_the_run():
    counts = np.array([counts_of(batch) for batch in batches_of(mixture([(9, 0), 0, (1, 10)], 100), 200)])
    progress = np.arange(200) / 200
    np.testing.assert_allclose(counts[:, 0], 90 * (1 - progress), atol=1)
    assert not counts[:, 1].any()
    assert counts[-1].tolist() in ([0, 0, 100], [1, 0, 99])
    beyond = mixture([(9, 0), 0, (1, 10)], 100)
    beyond.set_position(0, 250)
    assert counts_of(next(iter(beyond))) == [0, 0, 100]


def test_a_set_is_passed_through_before_it_repeats_and_each_pass_has_its_order():
    keys = [key for batch in batches_of(mixture([5, 1, 4]), 60) for key in batch]
    assert len({key[:2] for key in keys}) == len(keys)
    for place, length in enumerate(LENGTHS):
        drawn = [key for key in keys if set_of(key) == place]
        for number, passed in itertools.groupby(sorted(drawn), key=lambda key: key.epoch):
            indices = {key.index for key in passed}
            assert len(indices) == length or number == len(drawn) // length
    orders = [[key.index for key in keys if set_of(key) == 0 and key.epoch == number] for number in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(50))
    assert orders[0] != orders[1]


@pytest.mark.parametrize("world_size", [2, 4])
def test_resuming_and_the_number_of_processes_change_nothing(world_size):
    shares = [(3, 1), 1, (1, 3)]
    whole = batches_of(mixture(shares, length=120), 30)  # 6 batches an epoch
    for position in range(0, 30, 7):
        sampler = mixture(shares, length=120)
        sampler.set_position(*divmod(position, len(sampler)))
        assert batches_of(sampler, 30 - position) == whole[position:]
    parts = [
        batches_of(mixture(shares, length=120, rank=rank, world_size=world_size), 30) for rank in range(world_size)
    ]
    assert [list(itertools.chain(*rows)) for rows in zip(*parts, strict=True)] == whole
    drawn = [np.sum([counts_of(batch) for batch in batches], 0) for batches in (parts[0], whole)]
    np.testing.assert_allclose(drawn[0] * world_size, drawn[1], atol=60)  # a process's part is mixed too


def test_the_seed_decides_the_order():
    assert batches_of(mixture([1, 1, 1]), 3) != batches_of(mixture([1, 1, 1], seed=4), 3)


def test_an_epoch_is_all_samples_or_the_length_asked_for():
    assert len(mixture([1, 1, 1])) == 1057 // 20
    assert len(mixture([1, 1, 1], length=4000)) == 200


def test_keys_tell_how_much_of_the_run_is_done():
    for sampler in (ResumableBatchSampler(40, 10, run_batches=8), mixture([1, 0, 0], 10, length=40, run_batches=8)):
        progress = [{key.progress for key in batch} for batch in batches_of(sampler, 10)]
        assert progress == [{min(batch / 8, 1.0)} for batch in range(10)]
        sampler.set_position(1, 2)
        assert next(iter(sampler))[0].progress == 6 / 8
    assert next(iter(ResumableBatchSampler(40, 10)))[0].progress == 0


def test_fewer_samples_than_processes_are_refused():
    with pytest.raises(UserError, match="3 samples for 4 processes"):
        ResumableBatchSampler(3, 8, world_size=4)
    assert len(next(iter(ResumableBatchSampler(4, 8, rank=3, world_size=4)))) == 1


def test_a_share_of_nothing_is_refused():
    with pytest.raises(UserError, match="root 2 has a share and no usable sample"):
        MixtureBatchSampler(4, lengths=[5, 0], shares=[(1, 1), (0, 1)])
    batch = next(iter(MixtureBatchSampler(4, lengths=[5, 0], shares=[(1, 1), (0, 0)])))
    assert {key.index for key in batch} < set(range(5))
