"""The settings of the quickstart."""

from dataclasses import dataclass, fields


@dataclass
class QuickstartConfig:
    """
    How large the quickstart is, and where it goes. The defaults take under five minutes on two CPU cores.

    Args:
        output_dir (`str`, *optional*, defaults to `"outputs/quickstart"`):
            Folder for `report.html`, `curve.png`, `results.json` and what a second run takes up again.
        num_problems (`int`, *optional*, defaults to `40`):
            Problems that are annotated live.
        num_rollouts (`int`, *optional*, defaults to `8`):
            Rollouts sampled from each measured prefix.
        rollout_budget (`int`, *optional*, defaults to `80`):
            Most rollouts that one problem may cost.
        train_steps (`int`, *optional*, defaults to `80`):
            Optimizer steps of the live training; about a minute and a half.
        train_batch_size (`int`, *optional*, defaults to `48`):
            Rows of a step, of about a dozen trees.
        learning_rate (`float`, *optional*, defaults to `6e-4`):
            Highest learning rate of the live training.
        num_eval_problems (`int`, *optional*, defaults to `100`):
            Held-out problems that the verifiers are measured on.
        num_candidates (`int`, *optional*, defaults to `16`):
            Candidates sampled for each of them.
        seed (`int`, *optional*, defaults to `0`):
            Seed of all sampling and of the training.
    """

    output_dir: str = "outputs/quickstart"
    num_problems: int = 40
    num_rollouts: int = 8
    rollout_budget: int = 80
    train_steps: int = 80
    train_batch_size: int = 48
    learning_rate: float = 6e-4
    num_eval_problems: int = 100
    num_candidates: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("output_dir", "seed") and value <= 0:
                raise ValueError(f"{field.name} = {value}: give a number above 0")
        if self.rollout_budget < self.num_rollouts:
            raise ValueError(
                f"rollout_budget = {self.rollout_budget}: does not cover the {self.num_rollouts} rollouts of the root; "
                "raise it or lower num_rollouts"
            )
