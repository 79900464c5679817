"""Training of process reward models and of policies, in the shape of TRL's trainers."""

from .collator import DataCollatorForProcessReward
from .metrics import step_metrics
from .policy_config import PolicyConfig
from .policy_trainer import PolicyTrainer
from .prm_config import PRMConfig
from .prm_trainer import PRMTrainer, compute_step_metrics
from .token_classification import compute_accuracy

__all__ = [
    "DataCollatorForProcessReward",
    "PRMConfig",
    "PRMTrainer",
    "PolicyConfig",
    "PolicyTrainer",
    "compute_accuracy",
    "compute_step_metrics",
    "step_metrics",
]
