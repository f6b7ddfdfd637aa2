"""Order, layout and labels: the same samples for every layout and after every resume."""

import numpy as np
import pytest

from megatron_tiedlora.data.encode import TokenDataset
from megatron_tiedlora.data.loader import (
    TrainingLoader,
    collate,
    evaluation_batches,
    num_evaluation_batches,
    plan_global_batch,
)
from megatron_tiedlora.data.order import permutation, sample_indices
from megatron_tiedlora.parallel.loss import IGNORED_LABEL


def make_dataset(num_samples: int, *, seed: int = 0) -> TokenDataset:
    """Samples of 2 to 40 tokens; the tokens of sample i are all 100 + i, so that rows tell where they come from."""
    lengths = np.random.default_rng(seed).integers(2, 41, num_samples)
    return TokenDataset(
        tokens=np.repeat(np.arange(100, 100 + num_samples), lengths).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        prompt_lengths=np.maximum(1, lengths // 2).astype(np.int32),
        truncated_prompts=0,
    )


def make_loader(dataset: TokenDataset, *, dp_rank: int = 0, dp_size: int = 1, micro: int = 2, **options):
    return TrainingLoader(
        dataset,
        seed=7,
        global_batch_size=12,
        micro_batch_size=micro,
        dp_rank=dp_rank,
        dp_size=dp_size,
        pad_id=0,
        **options,
    )


def sample_numbers(micro_batch) -> list[int]:
    return (micro_batch.input_ids[:, 0] - 100).tolist()


def test_permutation_is_pinned():
    # Fixed values: a change of the order would make every saved run resume on other samples.
    assert permutation(8, seed=0, stream=0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert sorted(permutation(50, seed=-3, stream=2)) == list(range(50))
    assert permutation(50, seed=1, stream=0).tolist() != permutation(50, seed=1, stream=1).tolist()


def test_indices_walk_through_epochs():
    whole = sample_indices(10, seed=4, consumed=0, count=35)
    for epoch in range(3):
        assert sorted(whole[10 * epoch : 10 * epoch + 10]) == list(range(10))
    for consumed in (0, 3, 10, 24):
        assert (sample_indices(10, seed=4, consumed=consumed, count=11) == whole[consumed : consumed + 11]).all()
    with pytest.raises(ValueError, match="empty"):
        sample_indices(0, seed=0, consumed=0, count=1)


def test_small_dataset_fills_a_global_batch():
    step = next(make_loader(make_dataset(5)))
    numbers = sorted(number for batch in step.micro_batches for number in sample_numbers(batch))
    assert len(numbers) == 12 and set(numbers) == set(range(5))


@pytest.mark.parametrize("dp_size", [1, 2, 3, 6])
def test_layout_does_not_change_the_samples(dp_size):
    dataset = make_dataset(50)
    reference = make_loader(dataset)
    loaders = [make_loader(dataset, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    for _ in range(6):  # 72 samples: more than an epoch
        whole = [sample_numbers(batch) for batch in next(reference).micro_batches]
        steps = [next(loader) for loader in loaders]
        for step in steps:
            assert len(step.micro_batches) == 6 // dp_size
            assert step.num_supervised == sum(b.num_supervised for s in steps for b in s.micro_batches)
            assert step.num_tokens == sum(b.num_tokens for s in steps for b in s.micro_batches)
        for number, expected in enumerate(whole):
            batch = steps[number % dp_size].micro_batches[number // dp_size]
            assert sample_numbers(batch) == expected
    assert {loader.consumed_samples for loader in loaders} == {72}


@pytest.mark.parametrize("micro", [1, 2, 3, 4, 12])
def test_micro_batches_are_sorted_parts_of_one_global_batch(micro):
    dataset = make_dataset(50)
    plan = plan_global_batch(dataset, seed=7, consumed_samples=24, global_batch_size=12, micro_batch_size=micro)
    assert plan.micro_batches.shape == (12 // micro, micro) and plan.consumed_samples == 36
    assert sorted(plan.micro_batches.ravel()) == sorted(sample_indices(50, seed=7, consumed=24, count=12))
    lengths = dataset.lengths[plan.micro_batches.ravel()]
    assert (np.diff(lengths) >= 0).all() and plan.num_tokens == lengths.sum()


def test_resume_goes_on_exactly():
    dataset = make_dataset(30)
    loader = make_loader(dataset)
    steps = [next(loader) for _ in range(10)]
    resumed = make_loader(dataset, consumed_samples=steps[3].consumed_samples)
    for expected in steps[4:]:
        step = next(resumed)
        assert step.consumed_samples == expected.consumed_samples
        for left, right in zip(step.micro_batches, expected.micro_batches, strict=True):
            assert (left.input_ids == right.input_ids).all() and (left.labels == right.labels).all()


def test_uneven_batches_are_refused():
    dataset = make_dataset(30)
    with pytest.raises(ValueError, match="12"):
        next(make_loader(dataset, micro=5))
    with pytest.raises(ValueError, match="4 ranks"):
        next(make_loader(dataset, dp_size=4))


def test_labels_are_shifted_and_masked_by_position():
    dataset = TokenDataset(
        tokens=np.array([1, 5, 6, 7, 2, 1, 8, 2], np.int32),
        offsets=np.array([0, 5, 8]),
        prompt_lengths=np.array([3, 1], np.int32),
        truncated_prompts=0,
    )
    batch = collate(dataset, [0, 1], pad_id=2, pad_multiple=4)  # padding equals EOS
    assert batch.input_ids.tolist() == [[1, 5, 6, 7, 2, 2, 2, 2], [1, 8, 2, 2, 2, 2, 2, 2]]
    assert batch.labels.tolist() == [
        [IGNORED_LABEL, IGNORED_LABEL, 7, 2] + [IGNORED_LABEL] * 4,
        [8, 2] + [IGNORED_LABEL] * 6,
    ]
    assert batch.position_ids.tolist() == [list(range(8))] * 2
    assert batch.lengths.tolist() == [5, 3]
    assert (batch.num_samples, batch.num_tokens, batch.num_supervised) == (2, 8, 4)
    assert dataset.supervised_counts.tolist() == [2, 2] and dataset.supervised(1) == 2


@pytest.mark.parametrize("dp_size", [1, 2, 3, 5])
@pytest.mark.parametrize("num_samples", [1, 7, 16])
def test_evaluation_sees_every_sample_once(dp_size, num_samples):
    dataset = make_dataset(num_samples)
    ranks = [
        list(evaluation_batches(dataset, micro_batch_size=3, dp_rank=rank, dp_size=dp_size, pad_id=0))
        for rank in range(dp_size)
    ]
    expected = num_evaluation_batches(dataset, micro_batch_size=3, dp_size=dp_size)
    assert {len(batches) for batches in ranks} == {expected}
    batches = [batch for rank in ranks for batch in rank]
    assert sum(batch.num_supervised for batch in batches) == dataset.stats.supervised_tokens
    seen = [number for batch in batches if batch.num_samples for number in sample_numbers(batch)]
    assert sorted(seen) == list(range(num_samples))
    for batch in batches:
        assert batch.input_ids.shape[1] % 8 == 0
        if not batch.num_samples:
            assert batch.input_ids.shape == (1, 8) and (batch.labels == IGNORED_LABEL).all()
