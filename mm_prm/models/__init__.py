"""Process reward models: any vision-language model, unconverted, with a step token and two reward tokens."""

from .auto import AutoModelForProcessReward, is_process_reward_config
from .creating import create_process_reward_model, prepare_model_for_process_reward
from .flex import use_flex_attention
from .modeling import ProcessRewardMixin, ProcessRewardOutput, process_reward_loss
from .packable import packing_obstacle
from .packing import TreePacker
from .pipeline import ProcessRewardPipeline
from .positions import PositionPrecomputer
from .prefix_trees import fill, pack_rows
from .processing import ProcessRewardProcessor
from .vision import batch_vision_attention

__all__ = [
    "AutoModelForProcessReward",
    "PositionPrecomputer",
    "ProcessRewardMixin",
    "ProcessRewardOutput",
    "ProcessRewardPipeline",
    "ProcessRewardProcessor",
    "TreePacker",
    "batch_vision_attention",
    "create_process_reward_model",
    "fill",
    "is_process_reward_config",
    "pack_rows",
    "packing_obstacle",
    "prepare_model_for_process_reward",
    "process_reward_loss",
    "use_flex_attention",
]
