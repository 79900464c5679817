"""How rows become batches, for process reward models and for token classification models; and whether they are packed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import datasets
from transformers import DataCollator, PreTrainedModel
from transformers.utils import logging

from ..models import PositionPrecomputer, TreePacker, packing_obstacle, use_flex_attention
from .collator import DataCollatorForProcessReward
from .prm_config import PRMConfig
from .rows import RowView, prepare_rows
from .token_classification import DataCollatorForTokenLabels, prepare_tokenized_rows

logger = logging.get_logger(__name__)

Rows: TypeAlias = datasets.Dataset | Sequence[Mapping[str, Any]]


def settle_packing(model: PreTrainedModel, args: PRMConfig) -> None:
    """
    Turns packing off, in the settings, for an architecture that cannot read packed rows; and lets one that can compute
    them with FlexAttention on a GPU, unless `model_init_kwargs` names an attention.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        args ([`PRMConfig`]):
            Settings of the training.
    """
    if args.packing == "none":
        return
    obstacle = packing_obstacle(model)
    if obstacle is not None:
        logger.warning(f"{obstacle}: packing = {args.packing!r} falls back to 'none'")
        args.packing, args.max_tokens = "none", None
    elif args.device.type == "cuda" and "attn_implementation" not in (args.model_init_kwargs or {}):
        use_flex_attention(model)


def process_reward_batches(
    model: PreTrainedModel, processor: Any, args: PRMConfig
) -> tuple[Callable[[Rows, bool], RowView], DataCollator, DataCollator]:
    """
    Returns what prepares the rows of a process reward model, and the collators of training and evaluation.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        processor ([`ProcessRewardProcessor`]):
            Its processor.
        args ([`PRMConfig`]):
            Settings of the training.
    """
    defaults = PRMConfig.__dataclass_fields__
    for name in ("step_separator", "max_completion_length"):
        if getattr(args, name) != defaults[name].default:
            raise ValueError(
                f"{name} = {getattr(args, name)!r}: only for token classification models; the template of a process reward "
                "model writes what follows a step, and max_length cuts whole steps"
            )
    max_length = args.longest_sequence(token_classification=False)

    def prepare(rows: Rows, is_eval: bool) -> RowView:
        return prepare_rows(
            rows,
            processor,
            max_length=max_length,
            needs_num_judged=args.needs_num_judged,
            skip_bad_rows=args.on_bad_row == "skip",
        )

    packer, positions = None, None
    if args.packing == "none":
        positions = PositionPrecomputer.for_model(model)
    else:
        packer = TreePacker(model, processor, args.max_tokens, share_prefixes=args.packing == "tree")
        positions = packer.positions
    # Evaluation wants the scores of each row, so it does not pack
    evaluation = DataCollatorForProcessReward(
        processor, max_length, args.label_mode, args.hard_threshold, args.label_weighting, positions=positions
    )
    training = replace(evaluation, last_step_only=args.train_on_last_step_only, packer=packer)
    return prepare, training, evaluation


def token_classification_batches(
    model: PreTrainedModel, tokenizer: Any, args: PRMConfig
) -> tuple[Callable[[Rows, bool], datasets.Dataset], DataCollator, DataCollator]:
    """The same for a token classification model and its tokenizer."""
    for name in ("packing", "label_mode", "label_weighting", "on_bad_row"):
        default = PRMConfig.__dataclass_fields__[name].default
        if getattr(args, name) != default:
            raise ValueError(
                f"{name} = {getattr(args, name)!r}: not for token classification models; make the model a process reward "
                "model with mm_prm.models.create_process_reward_model"
            )
    max_length = args.longest_sequence(token_classification=True)

    def prepare(rows: Rows, is_eval: bool) -> datasets.Dataset:
        return prepare_tokenized_rows(rows, tokenizer, args, max_length=max_length, is_eval=is_eval)

    collator = DataCollatorForTokenLabels(tokenizer)
    return prepare, collator, collator
