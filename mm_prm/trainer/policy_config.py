"""`PolicyConfig`: the settings of [`PolicyTrainer`]."""

from dataclasses import dataclass, field

from trl import SFTConfig

from ..policies.steps import STEP_FORMATS
from .row_config import RowTrainerConfig


@dataclass
class PolicyConfig(RowTrainerConfig, SFTConfig):
    r"""
    Configuration class for the [`PolicyTrainer`].

    This class includes only the parameters that [`~trl.SFTConfig`] does not have. For the others, please refer to its
    documentation and to that of [`~transformers.TrainingArguments`]. Note that default values in this class may differ
    from those.

    Parameters:
        > Parameters that control the model

        freeze_vision_tower (`bool`, *optional*, defaults to `True`):
            Whether to leave the vision tower as it is, with its connector where the architecture counts it to the tower
            (Qwen-VL).
        freeze_connector (`bool`, *optional*, defaults to `False`):
            Whether to leave what stands between vision tower and language model as it is.
        freeze_language_model (`bool`, *optional*, defaults to `False`):
            Whether to leave the language model as it is, its embeddings and its head included.

        > Parameters that control the data

        step_format (`str`, *optional*, defaults to `"tags"`):
            How the policy learns to write its steps: `"tags"` (`<step>…</step>`, the last one `<answer>…</answer>`),
            `"paragraphs"` (blank lines between steps) or `"numbered"` (`Step 1: …`, `†Answer: …`). A policy is asked for
            rollouts with the same one (`--policy_step_format`).
        on_bad_row (`str`, *optional*, defaults to `"raise"`):
            At a row that cannot be used, `"raise"` names it and stops before training, `"skip"` leaves it out, and counts
            and lists those left out.
        max_length (`int`, *optional*):
            Longest sequence in tokens, images included. Rows that are longer are bad rows: nothing is cut, neither image
            tokens nor the answer. If `None`, rows of any length are trained on.

    > [!NOTE]
    > These parameters have default values different from [`~trl.SFTConfig`]:
    > - `max_length`: Defaults to `None` instead of `1024`.
    > - `bf16`: Defaults to `True` on a GPU that has it if `fp16` is not set, instead of always.
    > - `remove_unused_columns`: Defaults to `False`, because texts are made of the rows when their batch is formed.
    """

    _choices = (("step_format", STEP_FORMATS), *RowTrainerConfig._choices)

    # Parameters whose default values are overridden from SFTConfig
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest sequence in tokens, images included. Rows that are longer are bad rows: nothing is cut. If "
            "`None`, rows of any length are trained on."
        },
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay false: texts are made of the rows when their batch is formed."}
    )

    # Parameters that control the data
    step_format: str = field(
        default="tags",
        metadata={
            "help": "How the policy learns to write its steps: 'tags' (`<step>…</step>`, the last one "
            "`<answer>…</answer>`), 'paragraphs' (blank lines between steps) or 'numbered' (`Step 1: …`).",
            "choices": STEP_FORMATS,
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length = {self.max_length}: must be positive, or None for rows of any length")
        for name, needed in (
            ("remove_unused_columns", "texts are made of the rows when their batch is formed"),
            ("packing", "a batch holds pictures, which TRL does not pack"),
            ("padding_free", "a batch holds pictures, which TRL pads"),
            ("assistant_only_loss", "the loss is that of the solution already"),
        ):
            if getattr(self, name):
                raise ValueError(f"{name} = True: must be False, {needed}")
        if self.completion_only_loss is False:
            raise ValueError("completion_only_loss = False: the policy learns to write solutions, not problems")
