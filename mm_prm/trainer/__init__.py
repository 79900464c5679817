"""Training of process reward models, in the shape of TRL's trainers."""

from .collator import DataCollatorForProcessReward
from .metrics import step_metrics
from .prm_config import PRMConfig
from .prm_trainer import PRMTrainer, compute_step_metrics
from .token_classification import compute_accuracy

__all__ = [
    "DataCollatorForProcessReward",
    "PRMConfig",
    "PRMTrainer",
    "compute_accuracy",
    "compute_step_metrics",
    "step_metrics",
]
