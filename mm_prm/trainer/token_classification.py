"""
Plain token classification models, trained as TRL's `PRMTrainer` trained them until version 1.13: text only, a separator
behind each step, and the label at the separator's last token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from torch.nn import functional
from transformers import EvalPrediction, PreTrainedTokenizerBase
from transformers.data.data_collator import DataCollatorMixin
from transformers.utils import logging

from ..data.features import RowError
from ..models import process_reward_loss
from .prm_config import PRMConfig

logger = logging.get_logger(__name__)

# What stands where a token has no label
IGNORED = -100


def tokenize_row(
    features: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    step_separator: str,
    max_length: int | None,
    max_completion_length: int | None,
    train_on_last_step_only: bool,
    is_eval: bool,
) -> dict[str, list]:
    """
    Turns a row into token ids and labels; see [`PRMTrainer.tokenize_row`].
    """
    steps, labels = features["completions"], [_label(label) for label in features["labels"]]
    if train_on_last_step_only and not is_eval:
        labels[:-1] = [IGNORED] * (len(labels) - 1)
    prompt_ids = tokenizer(features["prompt"], add_special_tokens=False)["input_ids"]
    if tokenizer.bos_token_id is not None:
        prompt_ids = [tokenizer.bos_token_id, *prompt_ids]
    separator_ids = tokenizer.encode(step_separator, add_special_tokens=False)
    completion_ids: list[int] = []
    completion_labels: list[int | float] = []
    for step, label in zip(steps, labels, strict=True):
        step_ids = [*tokenizer(step, add_special_tokens=False)["input_ids"], *separator_ids]
        completion_ids += step_ids
        completion_labels += [IGNORED] * (len(step_ids) - 1) + [label]
    input_ids = [*prompt_ids, *completion_ids[:max_completion_length]]
    token_labels = [IGNORED] * len(prompt_ids) + completion_labels[:max_completion_length]
    return {"input_ids": input_ids[:max_length], "labels": token_labels[:max_length]}


def _label(label: bool | int | float | None) -> int | float:
    if label is None:
        return IGNORED
    return label if isinstance(label, float) else int(label)


def prepare_tokenized_rows(
    rows: datasets.Dataset | Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    args: PRMConfig,
    *,
    max_length: int | None,
    is_eval: bool,
) -> datasets.Dataset:
    """
    Tokenises rows, unless they are tokenised already, and numbers them.

    Args:
        rows (`datasets.Dataset` or `Sequence[Mapping[str, Any]]`):
            Rows with `prompt`, `completions` and `labels`, or with `input_ids` and `labels`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        args ([`PRMConfig`]):
            Settings of the training.
        max_length (`int`, *optional*):
            Longest sequence in tokens.
        is_eval (`bool`):
            Whether the rows are for evaluation, which reads all labels.

    Returns:
        `datasets.Dataset`: With `input_ids`, `labels` (floats if the rows' are, -100 where there is none) and `row_index`.

    Raises:
        [`RowError`]: At the first bad row.
    """
    if not isinstance(rows, datasets.Dataset):
        rows = datasets.Dataset.from_list([dict(row) for row in rows])
    if "input_ids" in rows.column_names:
        return rows if "row_index" in rows.column_names else rows.add_column("row_index", list(range(len(rows))))
    are_soft = _check_rows(rows)
    label = datasets.Value("float32" if are_soft else "int64")
    features = {"input_ids": datasets.List(datasets.Value("int64")), "labels": datasets.List(label)}
    settings: dict[str, Any] = {
        "tokenizer": tokenizer,
        "step_separator": args.step_separator,
        "max_length": max_length,
        "max_completion_length": args.max_completion_length,
        "train_on_last_step_only": args.train_on_last_step_only,
        "is_eval": is_eval,
    }

    def tokenized(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        return {**tokenize_row(row, **settings), "row_index": index}

    with PartialState().main_process_first():
        return rows.map(
            tokenized,
            with_indices=True,
            num_proc=args.dataset_num_proc,
            remove_columns=rows.column_names,
            features=datasets.Features({**features, "row_index": datasets.Value("int64")}),
            desc=f"Tokenizing {'eval' if is_eval else 'train'} dataset",
        )


def _check_rows(rows: datasets.Dataset) -> bool:
    """Checks that each step has its label; returns whether labels are floats, and so probabilities."""
    for column in ("prompt", "completions", "labels"):
        if column not in rows.column_names:
            advice = f"the dataset has no such column; it has {', '.join(rows.column_names)}"
            raise RowError("training", "row 0", column, None, advice)
    are_soft = False
    for index, row in enumerate(rows.select_columns(["completions", "labels"])):
        labels, steps = row["labels"], row["completions"]
        if labels is None or steps is None or len(labels) != len(steps):
            advice = f"must hold one label for each of the {len(steps or [])} completions, null where there is none"
            raise RowError("training", f"row {index}", "labels", labels, advice)
        for number, label in enumerate(labels):
            if isinstance(label, float):
                are_soft = True
                if not 0 <= label <= 1:
                    advice = "must be in [0, 1], or null for no label"
                    raise RowError("training", f"row {index}", f"labels[{number}]", label, advice)
    return are_soft


@dataclass
class DataCollatorForTokenLabels(DataCollatorMixin):
    """
    Data collator for token classification with labels of any number type.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model, which says on which side sequences are padded.
        return_tensors (`str`, *optional*, defaults to `"pt"`):
            Only `"pt"`.
    """

    tokenizer: PreTrainedTokenizerBase
    return_tensors: str = "pt"

    def torch_call(self, examples: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [{"input_ids": example["input_ids"]} for example in examples]
        inputs = dict(self.tokenizer.pad(ids, return_tensors="pt"))
        labels = [torch.as_tensor(example["labels"]) for example in examples]
        inputs["labels"] = torch.nn.utils.rnn.pad_sequence(
            labels, batch_first=True, padding_value=IGNORED, padding_side=self.tokenizer.padding_side
        )
        inputs["row_index"] = torch.tensor([example["row_index"] for example in examples])
        num_tokens = int(inputs["attention_mask"].sum())
        inputs["counts"] = torch.tensor([num_tokens, num_tokens, int((inputs["labels"] != IGNORED).sum())])
        return inputs


def token_label_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """
    Computes the mean cross-entropy over labelled tokens: of classes for whole numbers, of P(right) for floats.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, sequence_length, num_labels)`):
            Logits of each token; [wrong, right] if labels are floats.
        labels (`torch.Tensor` of shape `(batch_size, sequence_length)`):
            Class of each token, or the probability that its step is right; -100 where there is no label.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*):
            Number of labels of the optimizer step. Defaults to the number in this batch.
    """
    if labels.is_floating_point():
        if logits.shape[-1] != 2:
            raise ValueError(
                f"labels are probabilities, but the model has {logits.shape[-1]} classes; load it with num_labels = 2, "
                "wrong and right"
            )
        labels = labels.masked_fill(labels == IGNORED, torch.nan)
        return process_reward_loss(logits, labels, num_items_in_batch=num_items_in_batch)
    labelled = labels != IGNORED
    losses = functional.cross_entropy(logits[labelled].float(), labels[labelled], reduction="sum")
    total = labelled.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return losses / total


def compute_accuracy(eval_pred: EvalPrediction | tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    """
    Computes the share of right predictions.

    Args:
        eval_pred ([`~transformers.EvalPrediction`] or `tuple` of predictions and labels):
            Either logits of shape `(batch_size, sequence_length, num_labels)` and a label for each token (-100 where there
            is none; a probability counts as right above 0.5), or two scores a row of shape `(batch_size, 2)` and which of
            them should be higher; rows with equal scores are left out.
    """
    predictions, labels = eval_pred
    if predictions.ndim == 3:
        labelled = labels != IGNORED
        chosen, expected = predictions.argmax(axis=2)[labelled], labels[labelled]
        if np.issubdtype(expected.dtype, np.floating):
            expected = expected > 0.5
    else:
        differ = predictions[:, 0] != predictions[:, 1]
        if not differ.all():
            logger.warning(
                f"There are {int((~differ).sum())} out of {len(predictions)} instances where the predictions for both "
                "options are equal. These instances are ignored in the accuracy computation."
            )
        chosen, expected = predictions[differ].argmax(axis=1), labels[differ]
    return {"accuracy": float((chosen == expected).mean())}
