"""Rows to batches, on the fly: pictures are decoded and processed when their turn comes."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.data.data_collator import DataCollatorMixin

from ..models import PositionPrecomputer, ProcessRewardProcessor, TreePacker
from .rows import to_problem

# Keys of a batch that the model does not take
ROW_KEYS = ("row_index", "problem_key", "counts")


@dataclass
class DataCollatorForProcessReward(DataCollatorMixin):
    """
    Data collator for process reward training.

    Args:
        processor ([`ProcessRewardProcessor`]):
            Processor of the model.
        max_length (`int`, *optional*):
            Longest sequence in tokens; see [`PRMConfig`].
        label_mode (`str`, *optional*, defaults to `"soft"`):
            `"soft"`, `"hard"` or `"smoothed"`; see [`PRMConfig`].
        hard_threshold (`float`, *optional*, defaults to `0.0`):
            Labels above it count as right in label mode `"hard"`.
        label_weighting (`str`, *optional*, defaults to `"none"`):
            `"none"` or `"num_judged"`; see [`PRMConfig`].
        last_step_only (`bool`, *optional*, defaults to `False`):
            Whether only the label of each row's last step is kept.
        positions ([`~mm_prm.models.PositionPrecomputer`], *optional*):
            Computes what the model would otherwise compute image by image in its forward.
        packer ([`~mm_prm.models.TreePacker`], *optional*):
            Lays rows, or trees of them, out one behind another, up to its `max_tokens`. If `None`, rows are padded.
        return_tensors (`str`, *optional*, defaults to `"pt"`):
            Only `"pt"`.
    """

    processor: ProcessRewardProcessor
    max_length: int | None = None
    label_mode: str = "soft"
    hard_threshold: float = 0.0
    label_weighting: str = "none"
    last_step_only: bool = False
    positions: PositionPrecomputer | None = None
    packer: TreePacker | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        problems, completions = [to_problem(row) for row in examples], [row["completions"] for row in examples]
        labels = [self._labels(row["labels"], row.get("num_judged")) for row in examples]
        inputs: dict[str, Any]
        if self.packer is not None:
            encoded = self.processor.encode(problems, completions, labels, max_length=self.max_length)
            weights = [
                self._weights(ids == self.processor.step_token_id, row)
                for ids, row in zip(encoded.input_ids, examples, strict=True)
            ]
            packed = self.packer.pack(encoded, weights)
            lengths = [len(tree) for tree in packed]
            inputs = self.packer.collate(encoded, packed, self.packer.layout(packed))
            num_labels = sum(int((~np.isnan(values)).sum()) for values in encoded.labels)
            counts = [sum(lengths), sum(map(len, encoded.input_ids)), num_labels]
        else:
            inputs = dict(self.processor(problems, completions, labels, max_length=self.max_length))
            num_tokens = int(inputs["attention_mask"].sum())
            counts = [num_tokens, num_tokens, int((~inputs["labels"].isnan()).sum())]
            if self.positions is not None:
                inputs |= self.positions(inputs)
            if self.label_weighting == "num_judged":
                steps = inputs["step_mask"].numpy()
                weights = [self._weights(mask, row) for mask, row in zip(steps, examples, strict=True)]
                inputs["label_weights"] = torch.from_numpy(np.stack(weights))
        inputs["row_index"] = torch.tensor([row["row_index"] for row in examples])
        inputs["problem_key"] = torch.tensor([_problem_key(row) for row in examples])
        # Tokens that are no padding, tokens that the rows have alone, labels
        inputs["counts"] = torch.tensor(counts)
        return inputs

    def _labels(
        self, labels: Sequence[float | None], num_judged: Sequence[int | None] | None = None
    ) -> list[float | None]:
        values = [None if label is None else float(label) for label in labels]
        if self.last_step_only:
            values[:-1] = [None] * (len(values) - 1)
        if self.label_mode == "hard":
            # As float32, in which files keep labels: 1 of 10 read from a file is above the float64 0.1.
            threshold = np.float32(self.hard_threshold)
            return [None if value is None else float(np.float32(value) > threshold) for value in values]
        if self.label_mode == "smoothed":
            # Laplace's rule of succession: the mean of P(right) given the counts, if nothing was known before
            return [
                None if value is None else (value * float(number or 0) + 1) / (float(number or 0) + 2)
                for value, number in zip(values, num_judged or [None] * len(values), strict=True)
            ]
        return values

    def _weights(self, step_mask: np.ndarray, row: Mapping[str, Any]) -> np.ndarray:
        """A weight for each token of a row."""
        weights = np.zeros(step_mask.shape, dtype=np.float32)
        positions = np.flatnonzero(step_mask)
        if self.label_weighting == "num_judged":
            weights[positions] = [float(number or 0) for number in row["num_judged"][: len(positions)]]
        else:
            weights[positions] = 1.0
        return weights


def _problem_key(row: Mapping[str, Any]) -> int:
    """A number that stands for the row's problem, the same in every process. Rows without an id stand for themselves."""
    problem_id = row.get("problem_id")
    if problem_id is None:
        return -1 - row["row_index"]
    return int.from_bytes(hashlib.blake2b(problem_id.encode(), digest_size=8).digest(), "big") >> 1
