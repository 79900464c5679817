"""The order of training: the same rows in a step as in any other order, with batches of like length."""

import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_prm.trainer.sampler import SortedStepSampler, TreeSampler


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 16), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_every_row_comes_once_and_steps_are_sorted_by_length(lengths, step_size, epoch):
    sampler = SortedStepSampler(lengths, step_size, seed=3)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths))) and len(sampler) == len(lengths)
    assert order == list(sampler), "an epoch's order is fixed"
    for start in range(0, len(order), step_size):
        step = [lengths[row] for row in order[start : start + step_size]]
        assert step == sorted(step, reverse=True)


def test_steps_differ_between_epochs_and_seeds_and_not_by_length():
    lengths = list(range(200))

    def steps(seed: int, epoch: int) -> list[set[int]]:
        sampler = SortedStepSampler(lengths, 20, seed)
        sampler.set_epoch(epoch)
        order = list(sampler)
        return [set(order[start : start + 20]) for start in range(0, 200, 20)]

    assert steps(0, 0) != steps(0, 1) != steps(1, 1)
    assert all(max(step) - min(step) > 60 for step in steps(0, 0)), "rows of all lengths meet in a step"


@given(trees=st.lists(st.integers(0, 6), min_size=1, max_size=30), epoch=st.integers(0, 3))
def test_every_row_comes_once_and_trees_stay_together(trees, epoch):
    sampler = TreeSampler(trees, seed=0)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(trees)))
    runs = [
        tree for index, tree in enumerate(trees[row] for row in order) if index == 0 or tree != trees[order[index - 1]]
    ]
    assert len(runs) == len(set(trees))


def test_trees_and_their_rows_are_shuffled_anew_each_epoch():
    sampler = TreeSampler([row // 4 for row in range(40)], seed=0)
    first = list(sampler)
    assert first == list(sampler) and first != list(range(40))
    sampler.set_epoch(1)
    assert list(sampler) != first


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=30),
    batch_size=st.integers(1, 24),
    num_processes=st.integers(1, 4),
)
def test_a_tree_lies_in_few_batches_and_processes_get_others(sizes, batch_size, num_processes):
    trees = [tree for tree, size in enumerate(sizes) for _ in range(size)]
    batches = torch.utils.data.BatchSampler(TreeSampler(trees, seed=0), batch_size, drop_last=False)
    shards = [BatchSamplerShard(batches, num_processes, rank, even_batches=False) for rank in range(num_processes)]
    by_process = [[[trees[row] for row in batch] for batch in shard] for shard in shards]
    homes: dict[int, set] = {}
    for rank, of_process in enumerate(by_process):
        for number, batch in enumerate(of_process):
            for tree in batch:
                homes.setdefault(tree, set()).add((rank, number))
    assert sorted(tree for process in by_process for batch in process for tree in batch) == trees
    for tree, size in enumerate(sizes):
        assert len(homes[tree]) <= -(-(size - 1) // batch_size) + 1


def test_a_steps_trees_are_drawn_from_all():
    # Trees in an order that tells their share of right labels, as a table sorted by difficulty has it
    trees = [row // 8 for row in range(8 * 200)]
    sampler = TreeSampler(trees, seed=1)
    order = [trees[row] for row in sampler]
    steps = [set(order[start : start + 64]) for start in range(0, len(order), 64)]
    assert all(len(step) == 8 for step in steps)
    means = torch.tensor([float(sum(step)) / len(step) for step in steps])
    # The mean of 8 of 200 drawn at random lies around 99.5 with a standard deviation of 20
    assert (means - 99.5).abs().max() < 70 and 12 < means.std() < 28
