"""Packed rows as a model's inputs: see [`pack_rows`] for what packing is."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from .modeling import _BLOCK_SIZE
from .packable import packing_obstacle
from .positions import PositionPrecomputer
from .prefix_trees import PackedRows, fill, pack_rows
from .processing import EncodedRows, ProcessRewardProcessor, pad


class TreePacker:
    """
    Packs rows into trees, one for each prompt, and gives the model's inputs.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model that takes the inputs; its weights are not kept. Its `attn_implementation` says how branches are
            hidden: `sdpa` and `eager` by a dense mask, FlexAttention by a mask of blocks. FlashAttention hides rows from
            each other, but no branches.
        processor ([`ProcessRewardProcessor`]):
            Its processor, which encodes the rows.
        max_tokens (`int`, *optional*):
            Longest tree; see [`pack_rows`].
        share_prefixes (`bool`, *optional*, defaults to `True`):
            Whether rows with the same prompt become one tree. If not, each row stays as it is, a tree of one path.

    Raises:
        `ValueError`: If the architecture is not one that reads packed trees as it reads single rows; see
            [`packing_obstacle`].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessRewardProcessor,
        max_tokens: int | None = None,
        share_prefixes: bool = True,
    ):
        obstacle = packing_obstacle(model)
        if obstacle is not None:
            raise ValueError(obstacle)
        text = model.config.get_text_config()
        self.by_borders = is_flash_attention_requested(text)
        if self.by_borders and share_prefixes:
            raise ValueError(
                f"attn_implementation = {text._attn_implementation!r} cannot hide branches of packed trees from each other; "
                "load the model with 'flex_attention' or 'sdpa', or set packing to 'rows'"
            )
        self.by_blocks = "flex" in text._attn_implementation
        self.processor = processor
        self.max_tokens = max_tokens
        self.share_prefixes = share_prefixes
        self.positions = PositionPrecomputer.for_model(model)

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

    def layout(self, packed: Sequence[PackedRows]) -> list[list[int]]:
        """
        Returns which trees stand one behind another in each sequence: up to `max_tokens`; if that is `None`, up to the
        longest tree under a dense mask, and all in one sequence where what is hidden costs nothing.

        Args:
            packed (`Sequence[PackedRows]`):
                The trees.
        """
        lengths = [len(tree) for tree in packed]
        if self.max_tokens is None and (self.by_blocks or self.by_borders):
            return [list(range(len(packed)))]
        return fill(lengths, self.max_tokens or max(lengths))

    def collate(
        self, rows: EncodedRows, packed: Sequence[PackedRows], layout: Sequence[Sequence[int]] | None = None
    ) -> dict[str, Any]:
        """
        Returns the model's inputs: `input_ids`, `step_mask`, `labels` and `label_weights` of shape `(num_sequences,
        sequence_length)`, `position_ids`, what hides rows from each other (`subtree_ends`; for FlashAttention `row_borders`
        and `longest_row`) and what belongs to the images.

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
        # FlexAttention takes whole blocks; rows of a dense mask that are multiples of 8 long may go to fast kernels
        multiple = _BLOCK_SIZE if self.by_blocks else 8
        length = -(-max(sum(len(packed[number]) for number in numbers) for numbers in layout) // multiple) * multiple
        shape = (len(layout), length)
        input_ids = np.full(shape, self.processor.padding_id, dtype=np.int64)
        # Padding sees itself: a softmax over nothing would be NaN
        ends = np.tile(np.arange(1, length + 1, dtype=np.int32), (len(layout), 1))
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
            ends[index, place] = place.start + tree.subtree_ends()
            depths[index, place] = tree.depths
            labels[index, place] = tree.labels
            weights[index, place] = tree.label_weights
            for key, values in rows.prompts.token_types.items():
                types[key][index, place.start : place.start + len(values[prompt])] = values[prompt]
        arrays = {
            "input_ids": input_ids,
            "position_ids": depths,
            **types,
            "step_mask": input_ids == self.processor.step_token_id,
            "labels": labels,
            "label_weights": weights,
        }
        if not self.by_borders:
            arrays["subtree_ends"] = ends
        tensors: dict[str, Any] = {key: torch.from_numpy(array) for key, array in arrays.items()}
        if self.by_borders:
            tensors |= _borders(places, shape)
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
        tensors: dict[str, Any],
    ) -> dict[str, Any]:
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


def _borders(places: Sequence[tuple[PackedRows, int, slice]], shape: tuple[int, int]) -> dict[str, Any]:
    """Where rows begin and end if the sequences stand one behind another; the padding of each is a row of its own."""
    num_sequences, length = shape
    borders = {index * length + place.stop for _, index, place in places}
    borders |= {index * length for index in range(num_sequences + 1)}
    ordered = sorted(borders)
    longest = max(end - start for start, end in pairwise(ordered))
    return {"row_borders": torch.tensor(ordered, dtype=torch.int32), "longest_row": longest}
