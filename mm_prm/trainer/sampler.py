"""
The order of training: shuffled, and within that either sorted by length in each optimizer step, so that batches need
little padding, or with rows of one tree next to each other, so that they can be packed.
"""

from collections.abc import Hashable, Iterator, Sequence

import torch
from torch.utils.data import Sampler


class SortedStepSampler(Sampler[int]):
    """
    Shuffles the rows, cuts them into optimizer steps, and sorts each step's rows from long to short.

    With gradient accumulation a step's batches then hold rows of like length. The loss of a step is a sum over all its
    labels divided by their number, so the step is the same as in any other order; only padding is saved. Rows are never
    sorted across steps: buckets of one length would make the share of right labels differ from step to step.

    Args:
        lengths (`Sequence[int]`):
            A number that grows with each row's length; characters will do.
        step_size (`int`):
            Number of rows of an optimizer step, over all processes.
        seed (`int`):
            Seed of the order; each epoch has its own.
    """

    def __init__(self, lengths: Sequence[int], step_size: int, seed: int):
        self.lengths = torch.as_tensor(lengths)
        self.step_size = step_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration that of `epoch`."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        for step in torch.randperm(len(self.lengths), generator=generator).split(self.step_size):
            yield from step[self.lengths[step].argsort(descending=True, stable=True)].tolist()


class TreeSampler(Sampler[int]):
    """
    Shuffles trees, and the rows within each, and keeps the rows of a tree together.

    Batches still count rows: one that is full ends within a tree, and the rest of the tree opens the next batch, which under
    several processes is another one's. Labels of one tree resemble each other (an easy problem's are high), so a step of n
    rows knows about as much as its n / (rows of a tree) trees do. Which trees meet in a step is drawn from all, in each
    epoch anew, so steps that hold many trees have the labels of the whole on average; steps of few vary more than steps of
    as many rows drawn one by one.

    Args:
        trees (`Sequence[Hashable]`):
            The tree of each row.
        seed (`int`):
            Seed of the order; each epoch has its own.
    """

    def __init__(self, trees: Sequence[Hashable], seed: int):
        self.num_rows = len(trees)
        members: dict[Hashable, list[int]] = {}
        for row, tree in enumerate(trees):
            members.setdefault(tree, []).append(row)
        self.trees = [torch.tensor(rows) for rows in members.values()]
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.num_rows

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration that of `epoch`."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        for tree in torch.randperm(len(self.trees), generator=generator).tolist():
            rows = self.trees[tree]
            yield from rows[torch.randperm(len(rows), generator=generator)].tolist()
