"""`PRMConfig`: the settings of [`PRMTrainer`]."""

from dataclasses import dataclass, field
from typing import Any

from trl.trainer.base_config import _BaseConfig

from .row_config import RowTrainerConfig

LABEL_MODES = ("soft", "hard", "smoothed")
LABEL_WEIGHTINGS = ("none", "num_judged")
PACKINGS = ("none", "rows", "tree")
# Longest sequence of token classification models where nothing is set, as in TRL
_DEFAULT_MAX_LENGTH = 1024


@dataclass
class PRMConfig(RowTrainerConfig, _BaseConfig):
    r"""
    Configuration class for the [`PRMTrainer`].

    This class includes only the parameters that are specific to process reward training. For a full list of training
    arguments, please refer to the [`~transformers.TrainingArguments`] documentation. Note that default values in this
    class may differ from those in [`~transformers.TrainingArguments`].

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the model

        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments of `from_pretrained`, used when the `model` argument of the [`PRMTrainer`] is a string.
        freeze_vision_tower (`bool`, *optional*, defaults to `True`):
            Whether to leave the vision tower as it is, with its connector where the architecture counts it to the tower
            (Qwen-VL).
        freeze_connector (`bool`, *optional*, defaults to `False`):
            Whether to leave what stands between vision tower and language model as it is.
        freeze_language_model (`bool`, *optional*, defaults to `False`):
            Whether to leave the language model as it is, its embeddings and its head included.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to disable dropout in the model.

        > Parameters that control the data

        max_length (`int`, *optional*, defaults to `-1`):
            Longest sequence in tokens, images included. Whole trailing steps are dropped with their labels; rows that
            have no label left are dropped before training and counted. Token classification models are cut at a token, as
            in TRL. If `None`, nothing is cut. -1 stands for 1024 for token classification models and for `None` otherwise.
        on_bad_row (`str`, *optional*, defaults to `"raise"`):
            At a row that cannot be used, `"raise"` names it and stops before training, `"skip"` leaves it out, and counts
            and lists those left out.
        packing (`str`, *optional*, defaults to `"none"`):
            `"rows"` lays rows one behind another instead of padding them. `"tree"` lays the rows of one tree (of one
            `problem_id`) in a batch out as one sequence, in which image, question and every shared step stand once. Loss
            and gradients are those of `"none"`. Batches still count rows. On a GPU, FlexAttention computes packed
            sequences, elsewhere SDPA; `attn_implementation` in `model_init_kwargs` names another (for rows, also
            `"flash_attention_2"`). An architecture that cannot (sliding windows, linear attention, …) is named in a warning
            and falls back to `"none"`. With `"tree"`, trees are drawn at random and each stays together: a batch of few
            trees has labels that resemble each other, so let an optimizer step hold many.
        max_tokens (`int`, *optional*):
            Longest packed sequence: rows or trees fill it one behind another. A tree that is longer is split at forks, where
            little has to be repeated; a row that is longer stays whole and alone (`max_length` cuts rows). If `None`,
            sequences are as long as the longest row or tree of the batch; with FlexAttention and FlashAttention, which do
            not pay for what is hidden, a batch is one sequence.
        label_mode (`str`, *optional*, defaults to `"soft"`):
            `"soft"` trains on the labels as they are, `"hard"` on 1 for labels above `hard_threshold` and 0 for others,
            `"smoothed"` on (label · n + 1) / (n + 2), where n is the number of judged rollouts behind the label (column
            `num_judged`): few rollouts say little.
        hard_threshold (`float`, *optional*, defaults to `0.0`):
            Labels above it count as right in label mode `"hard"`. With Monte Carlo labels, 0 calls a step right if any
            rollout from it ended right.
        label_weighting (`str`, *optional*, defaults to `"none"`):
            `"none"` weighs all labels alike, `"num_judged"` by the number of judged rollouts behind them (column
            `num_judged`).
        train_on_last_step_only (`bool`, *optional*, defaults to `False`):
            Whether to train on the label of each row's last step alone. Evaluation reads all labels.

    > Parameters that control token classification models

        step_separator (`str`, *optional*, defaults to `"\n"`):
            What follows each step; its last token has the label.
        max_completion_length (`int`, *optional*):
            Longest completion in tokens, all steps together. If `None`, it is not cut.
        dataset_num_proc (`int`, *optional*):
            Number of processes that tokenise.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `logging_steps`: Defaults to `10` instead of `500`.
    > - `gradient_checkpointing`: Defaults to `True` instead of `False`.
    > - `bf16`: Defaults to `True` on a GPU that has it if `fp16` is not set, instead of `False`.
    > - `learning_rate`: Defaults to `1e-5` instead of `5e-5`.
    > - `remove_unused_columns`: Defaults to `False`, because the collator reads the rows.
    """

    _choices = (
        ("label_mode", LABEL_MODES),
        ("label_weighting", LABEL_WEIGHTINGS),
        ("packing", PACKINGS),
        *RowTrainerConfig._choices,
    )
    _VALID_DICT_FIELDS = [*_BaseConfig._VALID_DICT_FIELDS, "model_init_kwargs"]  # noqa: RUF012

    # Parameters whose default values are overridden from TrainingArguments
    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay false: the collator reads the rows as they are."}
    )

    # Parameters that control the model
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments of `from_pretrained`, used when `model` is a string."},
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Whether to disable dropout in the model."})

    # Parameters that control the data
    max_length: int | None = field(
        default=-1,
        metadata={
            "help": "Longest sequence in tokens, images included. Whole trailing steps are dropped with their labels; "
            "rows that have no label left are dropped before training and counted. If `None`, nothing is cut. -1 stands "
            "for 1024 for token classification models and for `None` otherwise."
        },
    )
    packing: str = field(
        default="none",
        metadata={
            "help": "'rows' lays rows one behind another instead of padding them; 'tree' lays the rows of one tree in a "
            "batch out as one sequence, in which image, question and every shared step stand once. Loss and gradients "
            "are those of 'none'.",
            "choices": PACKINGS,
        },
    )
    max_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Longest packed sequence. If `None`, sequences are as long as the longest row or tree of the batch; with "
            "FlexAttention and FlashAttention, a batch is one sequence."
        },
    )
    label_mode: str = field(
        default="soft",
        metadata={
            "help": "'soft' trains on the labels as they are, 'hard' on 1 for labels above `hard_threshold` and 0 for "
            "others, 'smoothed' on (label * num_judged + 1) / (num_judged + 2).",
            "choices": LABEL_MODES,
        },
    )
    hard_threshold: float = field(
        default=0.0, metadata={"help": "Labels above it count as right in label mode 'hard'."}
    )
    label_weighting: str = field(
        default="none",
        metadata={
            "help": "'none' weighs all labels alike, 'num_judged' by the number of judged rollouts behind them.",
            "choices": LABEL_WEIGHTINGS,
        },
    )
    train_on_last_step_only: bool = field(
        default=False, metadata={"help": "Whether to train on the label of each row's last step alone."}
    )

    # Parameters that control token classification models
    step_separator: str = field(default="\n", metadata={"help": "What follows each step; its last token has the label."})
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Longest completion in tokens. If `None`, it is not cut."}
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Number of processes that tokenise."})

    def __post_init__(self):
        super().__post_init__()
        if self.max_tokens is not None and self.packing == "none":
            raise ValueError(f"max_tokens = {self.max_tokens}: packing is 'none'; max_length cuts rows")
        if not 0 <= self.hard_threshold < 1:
            raise ValueError(f"hard_threshold = {self.hard_threshold}: must be at least 0 and below 1")
        if self.max_length is not None and self.max_length < 1 and self.max_length != -1:
            raise ValueError(f"max_length = {self.max_length}: must be positive, or None to cut nothing")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns = True: must be False, the collator reads the rows as they are")

    @property
    def needs_num_judged(self) -> bool:
        """Whether each label must come with its number of judged rollouts."""
        return self.label_weighting == "num_judged" or self.label_mode == "smoothed"

    def longest_sequence(self, *, token_classification: bool) -> int | None:
        """
        Returns `max_length`, with -1 resolved.

        Args:
            token_classification (`bool`):
                Whether the model is a plain token classification model.
        """
        if self.max_length == -1:
            return _DEFAULT_MAX_LENGTH if token_classification else None
        return self.max_length
