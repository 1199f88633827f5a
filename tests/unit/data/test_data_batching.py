from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedex_scale.data.batching import MASKED, Examples, collate, plan_steps, shard, shard_by_tokens

QUICK = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture
def examples() -> Examples:
    """Three examples of 3, 5 and 2 tokens, with prompts of 2, 1 and 1; 9 is pad and end token."""
    return Examples(
        tokens=np.array([1, 2, 9, 3, 4, 9, 5, 9, 6, 9], dtype=np.int32),
        starts=np.array([0, 3, 8]),
        lengths=np.array([3, 5, 2]),
        prompt_lengths=np.array([2, 1, 1]),
        rows=np.array([0, 2, 3]),
    )


@QUICK
@given(
    n=st.integers(1, 300),
    batch_size=st.integers(1, 17),
    epochs=st.integers(1, 3),
    group=st.booleans(),
)
def test_every_example_once_an_epoch(n: int, batch_size: int, epochs: int, group: bool):
    lengths = np.random.default_rng(n).integers(1, 50, size=n)
    steps = plan_steps(lengths, batch_size=batch_size, epochs=epochs, seed=3, group_by_length=group)
    per_epoch = -(-n // batch_size)
    assert len(steps) == epochs * per_epoch
    for epoch in range(epochs):
        batches = steps[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(i for batch in batches for i in batch) == list(range(n))
        assert sum(len(batch) < batch_size for batch in batches) == (n % batch_size != 0)


def test_a_plan_depends_on_its_seed_alone():
    def plan(seed: int) -> list[list[int]]:
        np.random.seed(seed + 100)
        return plan_steps(range(1, 41), batch_size=4, epochs=2, seed=seed)

    assert plan(5) == plan(5)
    assert plan(5) != plan(6)
    first, second = plan(5)[:10], plan(5)[10:]
    assert first != second


def test_grouping_by_length_pads_less():
    lengths = np.random.default_rng(0).integers(20, 500, size=2000)

    def padded(group: bool) -> int:
        steps = plan_steps(lengths, batch_size=8, epochs=1, seed=0, group_by_length=group)
        return sum(len(step) * max(lengths[step]) for step in steps)

    assert padded(True) < 1.05 * lengths.sum() < 1.4 * lengths.sum() < padded(False)


@QUICK
@given(n=st.integers(1, 70), world_size=st.integers(1, 9), micro_batch_size=st.integers(1, 8))
def test_shards_cover_a_step_alike(n: int, world_size: int, micro_batch_size: int):
    step = list(range(100, 100 + n))
    shards = [
        shard(step, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size)
        for rank in range(world_size)
    ]
    assert sorted(i for parts in shards for part in parts for i in part) == step
    assert len({len(parts) for parts in shards}) == 1
    sizes = [sum(map(len, parts)) for parts in shards]
    assert max(sizes) - min(sizes) <= 1
    assert max(len(part) for parts in shards for part in parts) <= micro_batch_size


@QUICK
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    world_size=st.integers(1, 9),
    max_tokens=st.integers(50, 400),
    packing=st.booleans(),
)
def test_micro_batches_of_so_many_tokens(
    lengths: list[int], world_size: int, max_tokens: int, packing: bool
):
    step = list(range(len(lengths)))
    shards = [
        shard_by_tokens(
            step, lengths, rank=rank, world_size=world_size, max_tokens=max_tokens, packing=packing
        )
        for rank in range(world_size)
    ]
    assert sorted(i for parts in shards for part in parts for i in part) == step
    assert len({len(parts) for parts in shards}) == 1
    for parts in shards:
        sizes = [[lengths[i] for i in part] for part in parts]
        tokens = [sum(x) if packing else max(x, default=0) * len(x) for x in sizes]
        assert max(tokens) <= max_tokens
        # No two neighbours would have fitted into one.
        for one, two in pairwise(x for x in sizes if x):
            first = sum(one) + two[0] if packing else one[0] * (len(one) + 1)
            assert first > max_tokens


def test_collate_pads_to_the_longest_and_trains_the_end_token(examples: Examples):
    batch = collate(examples, [0, 1], fallback=2, pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 9, 9, 9], [3, 4, 9, 5, 9]]
    assert batch["labels"].tolist() == [[-100, -100, 9, -100, -100], [-100, 4, 9, 5, 9]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_an_empty_micro_batch_is_a_masked_example(examples: Examples):
    batch = collate(examples, [], fallback=2, pad_id=0)
    assert batch["input_ids"].tolist() == [[6, 9]]
    assert (batch["labels"] == MASKED).all()


def test_a_selection_shares_the_tokens(examples: Examples):
    chosen = examples.select([2, 1])
    assert len(chosen) == 2
    assert chosen.tokens is examples.tokens
    assert [chosen[i] for i in range(2)] == [examples[2], examples[1]]
    assert chosen.rows.tolist() == [3, 2]
    assert chosen.num_trained.tolist() == [1, 4]
    assert chosen.select([1])[0] == examples[1]
