"""Reinforcement learning: a process reward model and a judge as reward functions of TRL's trainers."""

from .prompts import add_prompts
from .rewards import OutcomeReward, ProcessReward

__all__ = ["OutcomeReward", "ProcessReward", "add_prompts"]
