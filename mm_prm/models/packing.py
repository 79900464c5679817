"""
Prefix-tree packing: rows of one problem become one sequence in which every shared token stands once.

Rows of a tree share image, question and their first steps. Laid out as the tree that they are, each token attends to the
tokens on its own path only, at the position that it has in its row alone; so the model computes for every row what it
would compute for it alone, and shared parts once. Several trees, or plain rows, may stand one behind another in a
sequence: none sees another, and nothing is padded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from .positions import PositionPrecomputer
from .processing import EncodedRows, ProcessRewardProcessor, pad

# Models whose tokens have one position each, counted from 0, and attend to everything before them
_PLAIN_MODEL_TYPES = frozenset({"idefics3", "internvl", "llama", "llava_onevision", "qwen2", "qwen3", "smolvlm"})


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

    def attention_mask(self) -> np.ndarray:
        """
        Returns a mask of shape `(length, length)`: true where a token may attend to another, which is to itself and to what
        precedes it in its row. Made when it is needed, because it is by far the largest part.
        """
        mask = np.zeros((len(self), len(self)), dtype=bool)
        end = 0
        for path in self.paths:
            num_new = int(np.count_nonzero(path >= end))
            start, end = end, end + num_new
            mask[start:end, path[: len(path) - num_new]] = True
            mask[start:end, start:end] = np.tri(num_new, dtype=bool)
        return mask


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
            Longest sequence. A tree that is longer is split between rows, and what they share is repeated; a single row is
            never split. If `None`, there is one sequence.

    Returns:
        `list[PackedRows]`: Each row is in one of them.
    """
    # In lexical order, what a row shares with any row before it, it shares with the one right before it.
    order = sorted(range(len(input_ids)), key=lambda row: input_ids[row].tolist())
    groups: list[list[tuple[int, int]]] = []
    length = 0
    for position, row in enumerate(order):
        shared = _shared_length(input_ids[order[position - 1]], input_ids[row]) if position else 0
        added = len(input_ids[row]) - shared
        if not groups or (max_tokens is not None and length + added > max_tokens):
            groups.append([(row, 0)])
            length = len(input_ids[row])
        else:
            groups[-1].append((row, shared))
            length += added
    return [_pack(group, input_ids, labels, label_weights) for group in groups]


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


class TreePacker:
    """
    Packs rows into trees, one for each prompt, and gives the model's inputs.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model that takes the inputs; its weights are not kept.
        processor ([`ProcessRewardProcessor`]):
            Its processor, which encodes the rows.
        max_tokens (`int`, *optional*):
            Longest tree; see [`pack_rows`].
        share_prefixes (`bool`, *optional*, defaults to `True`):
            Whether rows with the same prompt become one tree. If not, each row stays as it is, a tree of one path.

    Raises:
        `ValueError`: If the architecture is not one that reads packed trees as it reads single rows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessRewardProcessor,
        max_tokens: int | None = None,
        share_prefixes: bool = True,
    ):
        self.processor = processor
        self.max_tokens = max_tokens
        self.share_prefixes = share_prefixes
        self.positions = PositionPrecomputer.for_model(model)
        text = model.config.get_text_config()
        if self.positions is None and model.config.model_type not in _PLAIN_MODEL_TYPES:
            raise ValueError(
                f"{model.config.model_type!r} models are not known to read packed trees as they read single rows; set "
                "packing to 'none'"
            )
        settings = text.to_dict()
        # Mistral's text models have a window and no list of layers
        kinds = settings.get("layer_types") or ["sliding_attention" if settings.get("sliding_window") else "full_attention"]
        if set(kinds) != {"full_attention"}:
            raise ValueError(
                f"this {model.config.model_type!r} model has layers that do not attend to all tokens "
                f"({', '.join(sorted(set(kinds)))}); set packing to 'none'"
            )
        if text._attn_implementation != "sdpa":
            raise ValueError(
                f"packed trees need attention by mask; load the model with attn_implementation = 'sdpa' instead of "
                f"{text._attn_implementation!r}, or set packing to 'none'"
            )

    def pack(self, rows: EncodedRows, label_weights: Sequence[np.ndarray] | None = None) -> list[PackedRows]:
        """
        Packs rows, those with the same prompt together.

        Args:
            rows ([`EncodedRows`]):
                The rows.
            label_weights (`Sequence[np.ndarray]`, *optional*):
                A weight for each token of each row (float32). Defaults to 1 for all.
        """
        if label_weights is None:
            label_weights = [np.ones_like(labels) for labels in rows.labels]
        by_prompt: dict[int, list[int]] = {}
        for row, number in enumerate(rows.prompts.numbers):
            by_prompt.setdefault(number if self.share_prefixes else row, []).append(row)
        packed = []
        for members in by_prompt.values():
            sequences = pack_rows(
                [rows.input_ids[row] for row in members],
                [rows.labels[row] for row in members],
                [label_weights[row] for row in members],
                max_tokens=self.max_tokens,
            )
            for sequence in sequences:
                sequence.rows = [members[row] for row in sequence.rows]
            packed += sequences
        return packed

    def collate(
        self, rows: EncodedRows, packed: Sequence[PackedRows], layout: Sequence[Sequence[int]] | None = None
    ) -> dict[str, torch.Tensor]:
        """
        Returns the model's inputs: `input_ids`, `step_mask`, `labels` and `label_weights` of shape `(num_sequences,
        sequence_length)`, `attention_mask` (`torch.BoolTensor` of shape `(num_sequences, 1, sequence_length,
        sequence_length)`), `position_ids` and what belongs to the images.

        Args:
            rows ([`EncodedRows`]):
                The rows.
            packed (`Sequence[PackedRows]`):
                Trees that were made of them.
            layout (`Sequence[Sequence[int]]`, *optional*):
                Numbers of the trees that stand one behind another in each sequence; see [`fill`]. Defaults to a sequence
                for each tree.
        """
        if layout is None:
            layout = [[number] for number in range(len(packed))]
        # Rows of a mask that are multiples of 8 long may go to PyTorch's fast kernels
        length = -(-max(sum(len(packed[number]) for number in numbers) for numbers in layout) // 8) * 8
        shape = (len(layout), length)
        input_ids = np.full(shape, self.processor.padding_id, dtype=np.int64)
        mask = np.zeros((len(layout), 1, length, length), dtype=bool)
        # Padding attends to itself: a softmax over nothing would be NaN
        mask[:, :, np.arange(length), np.arange(length)] = True
        depths = np.zeros(shape, dtype=np.int64)
        labels = np.full(shape, np.nan, dtype=np.float32)
        weights = np.zeros(shape, dtype=np.float32)
        types = {key: np.zeros(shape, dtype=np.int64) for key in rows.prompts.token_types}
        places: list[tuple[PackedRows, int, slice]] = []
        for index, numbers in enumerate(layout):
            start = 0
            for number in numbers:
                place = slice(start, start + len(packed[number]))
                places.append((packed[number], index, place))
                start = place.stop
        prompts = [rows.prompts.numbers[tree.rows[0]] for tree, _, _ in places]
        for (tree, index, place), prompt in zip(places, prompts, strict=True):
            input_ids[index, place] = tree.input_ids
            mask[index, 0, place, place] = tree.attention_mask()
            depths[index, place] = tree.depths
            labels[index, place] = tree.labels
            weights[index, place] = tree.label_weights
            for key, values in rows.prompts.token_types.items():
                types[key][index, place.start : place.start + len(values[prompt])] = values[prompt]
        arrays = {
            "input_ids": input_ids,
            "attention_mask": mask,
            "position_ids": depths,
            **types,
            "step_mask": input_ids == self.processor.step_token_id,
            "labels": labels,
            "label_weights": weights,
        }
        tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
        tensors |= rows.prompts.images(prompts)
        if self.positions is not None:
            tensors |= self._row_positions(self.positions, rows, places, prompts, tensors)
        return tensors

    def _row_positions(
        self,
        positions: PositionPrecomputer,
        rows: EncodedRows,
        places: Sequence[tuple[PackedRows, int, slice]],
        prompts: Sequence[int],
        tensors: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Positions as each row alone has them: those of the longest row of each tree, at every token's depth."""
        longest = [max((rows.input_ids[row] for row in tree.rows), key=len) for tree, _, _ in places]
        types = [rows.prompts.token_types["mm_token_type_ids"][prompt] for prompt in prompts]
        alone = {
            "input_ids": torch.from_numpy(pad(longest, self.processor.padding_id)),
            "attention_mask": torch.from_numpy(pad([np.ones_like(row) for row in longest], 0)),
            "mm_token_type_ids": torch.from_numpy(pad(types, 0, like=longest)),
        }
        if "image_grid_thw" in tensors:
            alone["image_grid_thw"] = tensors["image_grid_thw"]
        of_rows = positions(alone)
        if "position_ids" in of_rows:
            of_trees = of_rows["position_ids"]
            of_rows["position_ids"] = torch.zeros((3, *tensors["position_ids"].shape), dtype=of_trees.dtype)
            for number, (tree, index, place) in enumerate(places):
                of_rows["position_ids"][:, index, place] = of_trees[:, number, torch.from_numpy(tree.depths)]
        return of_rows
