"""The order of training: the same rows in a step as in any other order, with batches of like length."""

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
    runs = [tree for index, tree in enumerate(trees[row] for row in order) if index == 0 or tree != trees[order[index - 1]]]
    assert len(runs) == len(set(trees))


def test_trees_and_their_rows_are_shuffled_anew_each_epoch():
    sampler = TreeSampler([row // 4 for row in range(40)], seed=0)
    first = list(sampler)
    assert first == list(sampler) and first != list(range(40))
    sampler.set_epoch(1)
    assert list(sampler) != first
