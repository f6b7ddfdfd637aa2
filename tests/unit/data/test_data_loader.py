"""Order, layout and labels: the same samples for every layout and after every resume."""

from types import SimpleNamespace

import numpy as np
import pytest

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.config.batch import BatchPlan
from megatron_tiedlora.data.loader import (
    _halve,
    _spread,
    collate,
    evaluation_batches,
    pack,
    plan_global_batch,
    training_steps,
)
from megatron_tiedlora.data.token_dataset import TokenDataset, permutation, sample_indices
from megatron_tiedlora.model.batch import find_supervised
from megatron_tiedlora.parallel.loss import IGNORED_LABEL
from megatron_tiedlora.planning.layout import shared_shape


def make_dataset(num_samples: int, *, seed: int = 0) -> TokenDataset:
    """Samples of 2 to 40 tokens; the tokens of sample i are all 100 + i, so that rows tell where they come from."""
    lengths = np.random.default_rng(seed).integers(2, 41, num_samples)
    return TokenDataset.after_prompts(
        tokens=np.repeat(np.arange(100, 100 + num_samples), lengths).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        prompt_lengths=np.maximum(1, lengths // 2).astype(np.int32),
    )


def make_loader(
    dataset: TokenDataset, *, dp_rank: int = 0, dp_size: int = 1, micro: int = 2, packed_length=None, **options
):
    shape = BatchPlan(12, micro, dp_size, packed_length)
    return training_steps(dataset, shape, seed=7, dp_rank=dp_rank, pad_id=0, **options)


def sample_numbers(micro_batch) -> list[int]:
    return (micro_batch.tokens[:, 0] - 100).tolist()


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


def test_global_batches_of_few_samples_and_of_none_that_is_supervised():
    step = next(make_loader(make_dataset(5)))
    numbers = sorted(number for batch in step.micro_batches for number in sample_numbers(batch))
    assert len(numbers) == 12 and set(numbers) == set(range(5))
    dataset = make_dataset(50)
    silent = TokenDataset(dataset.tokens, dataset.offsets, np.zeros_like(dataset.supervised))
    with pytest.raises(UserError, match="global batch after 24 samples has no supervised token"):
        next(make_loader(silent, consumed_samples=24))


@pytest.mark.parametrize("dp_size", [1, 2, 3, 6])
def test_layout_does_not_change_the_samples(dp_size):
    dataset = make_dataset(50)
    reference = make_loader(dataset)
    options = {"dp_size": dp_size, "pad_multiple": 4 * dp_size}
    loaders = [make_loader(dataset, dp_rank=rank, **options) for rank in range(dp_size)]
    for _ in range(6):  # 72 samples: more than an epoch
        whole = [sample_numbers(batch) for batch in next(reference).micro_batches]
        steps = [next(loader) for loader in loaders]
        for step in steps:
            assert len(step.micro_batches) == 6 // dp_size
            assert step.num_supervised == sum(b.num_supervised for s in steps for b in s.micro_batches)
            assert step.num_tokens == sum(b.num_tokens for s in steps for b in s.micro_batches)
            assert step.num_positions == sum(b.labels.numel() for s in steps for b in s.micro_batches)
            lengths = [int(length) for s in steps for b in s.micro_batches for length in b.lengths]
            assert sorted(step.lengths) == sorted(lengths)
        for number, expected in enumerate(whole):
            batch = steps[number % dp_size].micro_batches[number // dp_size]
            assert sample_numbers(batch) == expected
    assert {step.consumed_samples for step in steps} == {72}


@pytest.mark.parametrize("micro", [1, 2, 3, 4, 12])
def test_micro_batches_are_sorted_parts_of_one_global_batch(micro):
    dataset = make_dataset(50)
    plan = plan_global_batch(dataset, BatchPlan(12, micro, 1), seed=7, consumed_samples=24)
    assert [len(rows) for rows in plan.micro_batches] == [micro] * (12 // micro) and plan.consumed_samples == 36
    found = [index for rows in plan.micro_batches for row in rows for index in row]
    assert sorted(found) == sorted(sample_indices(50, seed=7, consumed=24, count=12))
    lengths = dataset.lengths[found]
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
            assert (left.tokens == right.tokens).all() and (left.labels == right.labels).all()


def test_uneven_batches_are_refused():
    dataset = make_dataset(30)
    with pytest.raises(ValueError, match="12"):
        next(make_loader(dataset, micro=5))
    with pytest.raises(ValueError, match="4 ranks"):
        next(make_loader(dataset, dp_size=4))


# Samples of 5 and 3 tokens, of which the first 3 and the first one are prompts.
TWO = TokenDataset.after_prompts(
    tokens=np.array([1, 5, 6, 7, 2, 1, 8, 2], np.int32),
    offsets=np.array([0, 5, 8]),
    prompt_lengths=np.array([3, 1], np.int32),
)


def test_labels_are_shifted_and_masked_by_position():
    batch = collate(TWO, [[0], [1]], pad_id=2, pad_multiple=4)  # padding equals EOS
    assert batch.tokens.tolist() == [[1, 5, 6, 7, 2, 2, 2, 2], [1, 8, 2, 2, 2, 2, 2, 2]]
    assert batch.labels.tolist() == [
        [IGNORED_LABEL, IGNORED_LABEL, 7, 2] + [IGNORED_LABEL] * 4,
        [8, 2] + [IGNORED_LABEL] * 6,
    ]
    assert batch.positions.tolist() == [list(range(8))] * 2 and batch.documents is None
    assert batch.lengths.tolist() == [5, 3]
    assert (batch.num_samples, batch.num_tokens, batch.num_supervised) == (2, 8, 4)
    assert TWO.num_supervised_of(slice(None)).tolist() == [2, 2] and TWO.num_supervised == 4


@pytest.mark.parametrize("dp_size", [1, 2, 3, 5])
@pytest.mark.parametrize("num_samples", [1, 7, 16])
def test_evaluation_sees_every_sample_once(dp_size, num_samples):
    dataset = make_dataset(num_samples)
    ranks = [
        list(evaluation_batches(dataset, micro_batch_size=3, dp_rank=rank, dp_size=dp_size, pad_id=0))
        for rank in range(dp_size)
    ]
    expected = -(-num_samples // (3 * dp_size))
    assert {len(batches) for batches in ranks} == {expected}
    batches = [batch for rank in ranks for batch in rank]
    assert sum(batch.num_supervised for batch in batches) == dataset.num_supervised
    seen = [number for batch in batches if batch.num_samples for number in sample_numbers(batch)]
    assert sorted(seen) == list(range(num_samples))
    for batch in batches:
        assert batch.tokens.shape[1] % 8 == 0
        if not batch.num_samples:
            assert batch.tokens.shape == (1, 8) and (batch.labels == IGNORED_LABEL).all()


# Packed rows ------------------------------------------------------------------------------------------------


def test_packed_samples_restart_and_know_each_other():
    batch = collate(TWO, [[1, 0], []], pad_id=9, pad_multiple=4, packed=True)
    ignored = [IGNORED_LABEL]
    assert batch.tokens.tolist() == [[1, 8, 2, 1, 5, 6, 7, 2], [9] * 8]
    assert batch.labels.tolist() == [[8, 2, *ignored, *ignored, *ignored, 7, 2, *ignored], ignored * 8]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4], list(range(8))]
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1], [0] * 8]
    assert (batch.num_samples, batch.num_tokens, batch.num_supervised) == (2, 8, 4)
    padded = collate(TWO, [[1]], pad_id=9, pad_multiple=4, packed=True)
    assert padded.documents.tolist() == [[0, 0, 0, 1]] and padded.positions.tolist() == [[0, 1, 2, 0]]


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_packed_steps_hold_the_same_samples_on_equally_many_micro_batches(micro, dp_size):
    dataset = make_dataset(50)
    plain = make_loader(dataset)
    options = {"dp_size": dp_size, "micro": micro, "packed_length": 60}
    loaders = [make_loader(dataset, dp_rank=rank, **options) for rank in range(dp_size)]
    for _ in range(5):
        expected, steps = next(plain), [next(loader) for loader in loaders]
        assert len({len(step.micro_batches) for step in steps}) == 1
        batches = [batch for step in steps for batch in step.micro_batches]
        assert {step.num_supervised for step in steps} == {expected.num_supervised}
        assert {step.lengths for step in steps} == {expected.lengths}
        assert {step.num_positions for step in steps} == {sum(batch.labels.numel() for batch in batches)}
        assert sum(batch.num_supervised for batch in batches) == expected.num_supervised
        assert sum(batch.num_samples for batch in batches) == 12
        assert sum(batch.num_tokens for batch in batches) == expected.num_tokens
        (num_rows,) = {batch.tokens.shape[0] for batch in batches}
        assert num_rows <= micro and all(batch.tokens.shape[1] <= 64 for batch in batches)
        assert len(batches) < 12 / micro + dp_size
        assert all(length for batch in batches for length in batch.lengths)


@pytest.mark.parametrize(
    ("micro", "dp_size", "least", "rows"),
    [
        (1, 1, 1, [12]),  # all in one row
        (12, 1, 1, [12]),  # that row is not cut up to make twelve of them
        (1, 4, 1, [3, 3, 3, 3]),
        (3, 4, 1, [3, 3, 3, 3]),
        (1, 12, 1, [1] * 12),
        (2, 3, 1, [4, 4, 4]),
        (1, 2, 3, [2] * 6),  # a pipeline's three
        (1, 2, 8, [1] * 12),  # there are no more samples
        (2, 2, 8, [2] * 6),  # nor more micro-batches of two rows, without packing
        (6, 2, 8, [6, 6]),
    ],
)
def test_rows_that_could_hold_a_whole_step_leave_work_for_every_rank_and_stage(micro, dp_size, least, rows):
    """Twelve samples of 9 tokens, and rows of 4,096."""
    tokens, prompt_lengths = np.zeros(40 * 9, np.int32), np.ones(40, np.int32)
    dataset = TokenDataset.after_prompts(tokens=tokens, offsets=np.arange(41) * 9, prompt_lengths=prompt_lengths)
    shape = BatchPlan(12, micro, dp_size, packed_length=4096, min_micro_batches=least)
    plan = plan_global_batch(dataset, shape, seed=7, consumed_samples=24)
    assert [len(row) for part in plan.micro_batches for row in part] == rows
    shares = [plan.on_rank(rank, dp_size=dp_size) for rank in range(dp_size)]
    assert len({len(share) for share in shares}) == 1 and all(share and all(map(len, share)) for share in shares)


@pytest.mark.parametrize("multiple", [1, 2, 4, 16])
@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_packing_holds_all_and_is_near_the_fewest_rows(seed, group_size, multiple):
    lengths = np.random.default_rng(seed).integers(1, 101, 200)
    groups = pack(lengths, 100, group_size=group_size, multiple=multiple)
    rows = [row for group in groups for row in group]
    assert sorted(index for row in rows for index in row) == list(range(200)) and all(rows)
    filled = [int(lengths[row].sum()) for row in rows]
    assert max(filled) <= 100 and filled == sorted(filled, reverse=True)
    assert len(groups) % multiple == 0 and len({len(group) for group in groups}) == 1 and len(groups[0]) <= group_size
    fewest = -(-int(lengths.sum()) // 100)
    assert len(rows) < 11 / 9 * fewest + 1 + len(groups)
    assert len(groups) < (11 / 9 * fewest + 1) / group_size + 1 + multiple
    assert pack(lengths.tolist(), 100, group_size=group_size, multiple=multiple) == groups


def rows_of(groups: list[list[list[int]]]) -> list[list[int]]:
    assert all(len(group) == 1 for group in groups)
    return [row for group in groups for row in group]


def test_rows_are_evened_out():
    """Eight samples of 10 fit one row of 100; four ranks get 20 tokens each, not 80 and three times nothing."""
    assert [len(row) for row in rows_of(pack([10] * 8, 100, multiple=4))] == [2, 2, 2, 2]
    assert pack([10] * 8, 100, group_size=8, multiple=4) == [[[0, 4]], [[1, 5]], [[2, 6]], [[3, 7]]]
    assert pack([10] * 8, 40, group_size=2) == [[[0, 2, 4, 6], [1, 3, 5, 7]]]
    assert pack([50, 40, 30, 30], 100, multiple=1) == [[[0, 3]], [[1, 2]]]  # first fit: 90 and 60
    assert rows_of(pack([6, 6, 4, 4, 4], 12, multiple=4)) == [[2, 4], [0], [1], [3]]
    assert pack([], 10, multiple=2) == []


def test_rows_that_cannot_be_evened_out_are_those_of_first_fit_or_their_halves():
    assert rows_of(pack([6, 6, 4, 4, 4], 12, multiple=2)) == [[0, 1], [2, 3, 4]]
    assert _spread([6, 6, 4, 4, 4], range(5), 2, 12) is None, "4 + 4 + 6 is too much, so first fit's rows were kept"
    assert _halve([6, 6, 4, 4, 3], [[0, 1], [2, 3, 4]], 4) == [[0], [2, 4], [1], [3]]
    assert _halve([6, 4], [[0], [1]], 3) == [[0], [1], []], "no row has two samples"


# Several answers in a sample --------------------------------------------------------------------------------


def scattered(num_samples: int, *, seed: int = 5) -> TokenDataset:
    """Samples of 2 to 40 tokens of which any may be supervised, but the first."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(2, 41, num_samples)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    supervised = draw.random(int(offsets[-1])) < 0.3
    supervised[offsets[:-1]] = False
    return TokenDataset(draw.integers(3, 99, int(offsets[-1])).astype(np.int32), offsets, supervised)


@pytest.mark.parametrize("packed", [True, False])
def test_labels_of_scattered_answers(packed):
    """Each is in the position before it, in its own sample."""
    dataset = scattered(60)
    assert dataset.prompt_lengths is None and dataset.num_supervised == dataset.supervised.sum()
    counts = [int(dataset.supervised_of(index).sum()) for index in range(60)]
    assert dataset.num_supervised_of(slice(None)).tolist() == counts
    rows = [[3, 9], [4], [5, 1, 7]] if packed else [[3], [9], [4]]
    batch = collate(dataset, rows, pad_id=0, pad_multiple=8, packed=packed)
    for number, row in enumerate(rows):
        expected = []
        for index in row:
            tokens, learned = dataset.sample(index).tolist(), dataset.supervised_of(index).tolist()
            pairs = zip(tokens[1:], learned[1:], strict=True)
            expected += [*(token if is_label else IGNORED_LABEL for token, is_label in pairs), IGNORED_LABEL]
        assert batch.labels[number, : len(expected)].tolist() == expected
        assert (batch.labels[number, len(expected) :] == IGNORED_LABEL).all()
    assert batch.num_supervised == sum(int(dataset.num_supervised_of(row).sum()) for row in rows)


def test_the_messages_of_scattered_answers_are_those_that_are_planned():
    """Also where a part of a shard has one position more: sizes are padded, so it takes many batches to tell."""
    dataset, draw = scattered(60), np.random.default_rng(3)
    for parts in (1, 2, 4) * 40:
        layout = SimpleNamespace(pad_multiple=8, sequence_parts=parts, overlap=False)
        rows = draw.permutation(60)[:6].reshape(2, 3).tolist()
        batch = collate(dataset, rows, pad_id=0, pad_multiple=8, packed=True)
        masks = [np.concatenate([dataset.supervised_of(index) for index in row]) for row in rows]
        shape, found = shared_shape(layout, [(0, masks)]), find_supervised(batch.labels, parts)
        assert shape.num_tokens == batch.labels.numel()
        assert (shape.num_supervised, shape.after[0]) == (len(found.labels), len(found.rows))
