import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DistributedSampler

from lightning_compress.data.sampling import LengthBucketedSampler

LENGTHS = np.random.default_rng(0).integers(3, 120, size=331).tolist()


def batches(sampler: LengthBucketedSampler) -> list[list[int]]:
    return list(BatchSampler(sampler, sampler.batch_size, drop_last=False))


def padding(drawn: list[list[int]]) -> int:
    return sum(max(LENGTHS[i] for i in batch) - LENGTHS[j] for batch in drawn for j in batch)


@given(
    count=st.integers(1, 70),
    batch_size=st.integers(1, 9),
    num_replicas=st.integers(1, 4),
    bucket=st.booleans(),
    shuffle=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_the_ranks_together_draw_every_example_and_equally_many(
    count, batch_size, num_replicas, bucket, shuffle
):
    samplers = [
        LengthBucketedSampler(
            LENGTHS[:count], batch_size, shuffle=shuffle, bucket=bucket, num_replicas=num_replicas, rank=rank
        )
        for rank in range(num_replicas)
    ]
    drawn = [list(sampler) for sampler in samplers]
    assert {index for indices in drawn for index in indices} == set(range(count))
    assert {len(indices) for indices in drawn} == {len(samplers[0])}
    assert sum(map(len, drawn)) < count + num_replicas


def test_batches_of_similar_length_need_far_less_padding():
    bucketed = padding(batches(LengthBucketedSampler(LENGTHS, 16)))
    shuffled = padding(batches(LengthBucketedSampler(LENGTHS, 16, bucket=False)))
    assert bucketed < shuffled / 4


def test_only_the_last_batch_is_incomplete():
    assert [len(batch) for batch in batches(LengthBucketedSampler(LENGTHS, 16))] == [16] * 20 + [11]


def test_each_epoch_has_an_order_of_its_own_fixed_by_the_seed():
    first, second = LengthBucketedSampler(LENGTHS, 16, seed=4), LengthBucketedSampler(LENGTHS, 16, seed=4)
    epoch_0 = list(first)
    assert list(second) == epoch_0
    first.set_epoch(1)
    assert list(first) != epoch_0
    second.set_epoch(1)
    assert list(second) == list(first)
    assert list(LengthBucketedSampler(LENGTHS, 16, seed=5)) != epoch_0


def test_batches_do_not_come_in_the_order_of_their_length():
    means = [np.mean([LENGTHS[i] for i in batch]) for batch in batches(LengthBucketedSampler(LENGTHS, 16))]
    assert means != sorted(means)


@pytest.mark.parametrize("bucket", [True, False])
def test_without_shuffling_the_order_is_the_same_in_every_epoch(bucket):
    sampler = LengthBucketedSampler(LENGTHS, 16, shuffle=False, bucket=bucket)
    epoch_0 = list(sampler)
    sampler.set_epoch(3)
    assert list(sampler) == epoch_0
    assert (epoch_0 == list(range(len(LENGTHS)))) is not bucket


def test_the_ranks_work_on_similar_lengths_at_the_same_time():
    ranks = [batches(LengthBucketedSampler(LENGTHS, 8, num_replicas=2, rank=rank)) for rank in range(2)]
    longest = [[max(LENGTHS[i] for i in batch) for batch in drawn[:-1]] for drawn in ranks]
    assert max(abs(a - b) for a, b in zip(*longest, strict=True)) <= 8


def test_lightning_leaves_it_in_place_since_it_is_a_distributed_sampler():
    assert isinstance(LengthBucketedSampler([1, 2], 1), DistributedSampler)


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        LengthBucketedSampler(LENGTHS, 0)
