"""The order of training: shuffled, and sorted by length within each optimizer step, so that batches need little padding."""

from collections.abc import Iterator, Sequence

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
