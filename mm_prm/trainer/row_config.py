"""What the configurations of all trainers share."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from transformers.utils import is_torch_bf16_gpu_available

if TYPE_CHECKING:
    from trl.trainer.base_config import _BaseConfig as _Base
else:  # a dataclass brings all fields of its bases, whose defaults would go over those of the configuration beside it
    _Base = object

ON_BAD_ROW = ("raise", "skip")


@dataclass
class RowTrainerConfig(_Base):
    """
    Settings of a trainer that freezes parts of a vision-language model, and checks its rows before training. Stands before
    one of TRL's configurations among the bases.
    """

    # Settings with a few values, and these values
    _choices: ClassVar[tuple[tuple[str, tuple[str, ...]], ...]] = (("on_bad_row", ON_BAD_ROW),)

    freeze_vision_tower: bool = field(default=True, metadata={"help": "Whether to leave the vision tower as it is."})
    freeze_connector: bool = field(
        default=False,
        metadata={"help": "Whether to leave what stands between vision tower and language model as it is."},
    )
    freeze_language_model: bool = field(
        default=False, metadata={"help": "Whether to leave the language model as it is, head included."}
    )
    on_bad_row: str = field(
        default="raise",
        metadata={"help": "At a row that cannot be used: stop, or leave it out.", "choices": ON_BAD_ROW},
    )

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        super().__post_init__()
        # Without an accelerator there is nothing to pin memory for, and torch warns at each epoch
        self.dataloader_pin_memory = self.dataloader_pin_memory and self.device.type != "cpu"
        for name, choices in self._choices:
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be one of {', '.join(choices)}")

    def __getstate__(self) -> dict[str, Any]:
        # training_args.bin is pushed with the model
        return self.__dict__ | {"hub_token": None}
