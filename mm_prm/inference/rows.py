"""Rows of a problem in tokens, and batches of them: sorted by length, filled up to a budget of tokens."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence

AnyRow = TypeVar("AnyRow", bound=Sized)

# Outputs of the processor with one entry a token; all others belong to the images.
_SEQUENCES = ("input_ids", "attention_mask", "step_mask", "mm_token_type_ids", "token_type_ids")


@dataclass(frozen=True, eq=False)
class Row:
    """
    One solution of one problem, ready for the model.

    Args:
        problem (`int`):
            Index of the problem.
        steps (`tuple[str, ...]`):
            The solution.
        sequences (`dict[str, torch.Tensor]`):
            What has one entry for each token, of shape `(length,)`.
        images (`dict[str, torch.Tensor]`):
            What belongs to the images; the rows of a problem share these tensors.
    """

    problem: int
    steps: tuple[str, ...]
    sequences: dict[str, torch.Tensor]
    images: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.sequences["input_ids"])


def encode_rows(
    processor: Any, index: int, problem: Mapping[str, Any], solutions: Sequence[tuple[str, ...]]
) -> list[Row]:
    """
    Encode distinct solutions of one problem, its images once.

    Args:
        processor ([`ProcessRewardProcessor`]):
            Processor of the model.
        index (`int`):
            Index of the problem.
        problem (`Mapping[str, Any]`):
            Problem row.
        solutions (`Sequence[tuple[str, ...]]`):
            The steps of each solution, at least one.

    Returns:
        `list[Row]`
    """
    encoded = processor([problem] * len(solutions), solutions)
    lengths = encoded["attention_mask"].sum(dim=1).tolist()
    # Every solution comes with a copy of the same images, in the order of the rows. The first copy is enough.
    images = {
        key: tensor[: len(tensor) // len(solutions)].clone()
        for key, tensor in encoded.items()
        if key not in _SEQUENCES
    }
    rows = []
    for number, (steps, length) in enumerate(zip(solutions, lengths, strict=True)):
        sequences = {key: encoded[key][number, :length] for key in _SEQUENCES if key in encoded}
        num_scores = int(sequences["step_mask"].sum())
        if num_scores != len(steps):
            raise ValueError(f"problem {problem['id']!r}: {len(steps)} steps would get {num_scores} scores")
        rows.append(Row(index, steps, sequences, images))
    return rows


def collate(rows: Sequence[Row], padding: int) -> dict[str, torch.Tensor]:
    """Pad rows on the right and put their images one after another, as the model's forward takes them."""
    batch = {
        key: pad_sequence(
            [row.sequences[key] for row in rows], batch_first=True, padding_value=padding if key == "input_ids" else 0
        )
        for key in rows[0].sequences
    }
    for key in {key: None for row in rows for key in row.images}:
        batch[key] = torch.cat([row.images[key] for row in rows if key in row.images])
    return batch


def token_budget_batches(rows: Sequence[AnyRow], max_tokens: int, shared: int = 0) -> list[list[AnyRow]]:
    """
    Sort rows by length and cut them into batches of at most `max_tokens`, padding included.

    Args:
        rows (`Sequence[Sized]`):
            Rows, or packed sequences of rows, in any order.
        max_tokens (`int`):
            Largest number of rows times longest row. A row above it makes a batch of its own.
        shared (`int`, *optional*, defaults to `0`):
            Number of leading tokens that were computed before.

    Returns:
        `list[list[Sized]]`: Longest first, so that what does not fit into memory fails at once.
    """
    batches: list[list[AnyRow]] = []
    for row in sorted(rows, key=len, reverse=True):
        longest = len(batches[-1][0]) - shared if batches else 0
        if batches and (len(batches[-1]) + 1) * longest <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def windows(groups: Iterable[list[Row]], max_tokens: int) -> Iterator[list[Row]]:
    """Join the rows of problems until there are enough tokens to sort, so that few images are held at a time."""
    window: list[Row] = []
    for rows in groups:
        window += rows
        if sum(map(len, window)) >= max_tokens:
            yield window
            window = []
    if window:
        yield window
