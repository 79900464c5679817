"""
Prefix-tree packing: rows of one problem become one sequence in which every shared token stands once.

Rows of a tree share image, question and their first steps. Laid out as the tree that they are, each token attends to the
tokens on its own path only, at the position that it has in its row alone; so the model computes for every row what it
would compute for it alone, and shared parts once. Several trees, or plain rows, may stand one behind another in a
sequence: none sees another, and nothing is padded.

The tree is laid out depth first, so that the tokens that see a token, those of its subtree, stand right behind it: where
this subtree ends is all that attention needs to know of a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np


@dataclass
class PackedRows:
    """
    Several rows with a common beginning as one sequence.

    Args:
        rows (`list[int]`):
            Numbers of the rows.
        paths (`list[np.ndarray]`):
            For each of them, where its tokens stand in the sequence.
        input_ids (`np.ndarray` of shape `(length,)`):
            Token ids; the first row in whole, then of each row what no row before it has.
        depths (`np.ndarray` of shape `(length,)`):
            Index that each token has in its own row.
        labels (`np.ndarray` of shape `(length,)`):
            Weighted mean of the labels of all rows that share a token, NaN where none has one (float32).
        label_weights (`np.ndarray` of shape `(length,)`):
            Sum of these labels' weights (float32). Cross-entropy is linear in the label, so that of the mean label times
            the sum of the weights is the weighted sum over the rows.
    """

    rows: list[int]
    paths: list[np.ndarray]
    input_ids: np.ndarray
    depths: np.ndarray
    labels: np.ndarray
    label_weights: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)

    def subtree_ends(self) -> np.ndarray:
        """
        Returns for each token where the tokens that see it end (int32): all from the token itself up to there have it in
        their row.
        """
        ends = np.zeros(len(self), dtype=np.int32)
        for path in self.paths:  # later rows end later
            ends[path] = np.maximum(ends[path], path[-1] + 1)
        return ends


def pack_rows(
    input_ids: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    label_weights: Sequence[np.ndarray],
    *,
    max_tokens: int | None = None,
) -> list[PackedRows]:
    """
    Packs rows that begin with the same prompt.

    Args:
        input_ids (`Sequence[np.ndarray]`):
            Token ids of each row.
        labels (`Sequence[np.ndarray]`):
            A label for each token, NaN where there is none (float32).
        label_weights (`Sequence[np.ndarray]`):
            A weight for each token (float32).
        max_tokens (`int`, *optional*):
            Longest sequence. A tree that is longer is split at forks where little has to be repeated, and evenly among such;
            a single row that is longer stays whole and alone. If `None`, there is one sequence.

    Returns:
        `list[PackedRows]`: Each row is in one of them.
    """
    # In lexical order, what a row shares with any row before it, it shares with the one right before it.
    order = sorted(range(len(input_ids)), key=lambda row: input_ids[row].tolist())
    lengths = [len(input_ids[row]) for row in order]
    shared = [0, *(_shared_length(input_ids[first], input_ids[second]) for first, second in pairwise(order))]
    groups = []
    for places in _split(lengths, shared, max_tokens):
        with_previous = [0, *(_shared_by(shared, *pair) for pair in pairwise(places))]
        groups.append([(order[place], number) for place, number in zip(places, with_previous, strict=True)])
    return [_pack(group, input_ids, labels, label_weights) for group in groups]


def _split(lengths: Sequence[int], shared: Sequence[int], max_tokens: int | None) -> list[list[int]]:
    """
    Cuts rows in lexical order into groups of at most `max_tokens` distinct tokens, or of one row; so that as few tokens as
    can be are repeated, and among such cuts into groups as even as can be.

    Args:
        lengths (`Sequence[int]`):
            Length of each row.
        shared (`Sequence[int]`):
            How many tokens it shares with the row before it.
        max_tokens (`int`, *optional*):
            Most tokens of a group.

    Returns:
        `list[list[int]]`: Places of the rows of each group, in order.
    """
    if max_tokens is None:
        return [list(range(len(lengths)))]
    # For the first rows, up to each: tokens of their groups, sum of these numbers' squares (the less, the more even), and
    # where the last group begins
    best: list[tuple[int, int, int]] = [(0, 0, 0)]
    for end in range(1, len(lengths) + 1):
        ways, beyond_first = [], 0
        for start in reversed(range(end)):
            tokens = lengths[start] + beyond_first
            if tokens > max_tokens and start < end - 1:
                break
            ways.append((best[start][0] + tokens, best[start][1] + tokens**2, start))
            beyond_first += lengths[start] - shared[start]
        best.append(min(ways))
    groups: list[list[int]] = []
    end = len(lengths)
    while end:
        groups.append(list(range(best[end][2], end)))
        end = best[end][2]

    # What is left of two subtrees that do not stand next to each other may fit into one group
    def joined() -> tuple[list[int], list[int], list[int]] | None:
        for one, other in combinations(groups, 2):
            both = sorted(one + other)
            saved = sum(_shared_by(shared, *pair) for pair in pairwise(both))
            if sum(lengths[place] for place in both) - saved <= max_tokens:
                return one, other, both
        return None

    while (found := joined()) is not None:
        one, other, both = found
        groups = [group for group in groups if group not in (one, other)] + [both]
    return sorted(groups)


def _shared_by(shared: Sequence[int], first: int, second: int) -> int:
    """How many tokens two rows share, given how many each shares with the one before it."""
    return min(shared[first + 1 : second + 1])


def _pack(
    group: list[tuple[int, int]],
    input_ids: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    label_weights: Sequence[np.ndarray],
) -> PackedRows:
    length = sum(len(input_ids[row]) - shared for row, shared in group)
    ids = np.empty(length, dtype=np.int64)
    depths = np.empty(length, dtype=np.int64)
    sums, weights = np.zeros(length, dtype=np.float64), np.zeros(length, dtype=np.float64)
    path = np.empty(0, dtype=np.int64)
    paths = []
    end = 0
    for row, shared in group:
        new = np.arange(end, end + len(input_ids[row]) - shared)
        end += len(new)
        path = np.concatenate([path[:shared], new])
        paths.append(path)
        ids[new] = input_ids[row][shared:]
        depths[new] = np.arange(shared, len(path))
        labelled = np.flatnonzero(~np.isnan(labels[row]))
        sums[path[labelled]] += labels[row][labelled].astype(np.float64) * label_weights[row][labelled]
        weights[path[labelled]] += label_weights[row][labelled]
    with np.errstate(invalid="ignore"):
        means = (sums / weights).astype(np.float32)
    return PackedRows([row for row, _ in group], paths, ids, depths, means, weights.astype(np.float32))


def fill(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """
    Puts sequences one behind another into as few long ones as first-fit decreasing finds.

    Args:
        lengths (`Sequence[int]`):
            Length of each sequence.
        max_tokens (`int`):
            Longest sum of lengths. A sequence that is longer stays alone.

    Returns:
        `list[list[int]]`: Numbers of the sequences that stand one behind another, each once.
    """
    layout: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        place = next((place for place, left in enumerate(room) if left >= lengths[number]), None)
        if place is None:
            place = len(layout)
            layout.append([])
            room.append(max_tokens)
        layout[place].append(number)
        room[place] -= lengths[number]
    return layout


def _shared_length(first: np.ndarray, second: np.ndarray) -> int:
    shorter = min(len(first), len(second))
    differ = np.flatnonzero(first[:shorter] != second[:shorter])
    return int(differ[0]) if len(differ) else shorter
