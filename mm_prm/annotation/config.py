"""The settings of annotation: one flat dataclass for the command line, YAML files and Python alike."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from mm_prm.annotation.adaptive import ROLLOUTS_AT_ONCE

# A request owns that many consecutive seeds; a power of two.
MAX_ROLLOUTS_PER_REQUEST = 4096

_COMMON = ("strategy", "num_rollouts", "adaptive_rollouts", "rollout_budget", "seed")
_STRATEGY_FIELDS = {
    "omegaprm": ("max_search_count", "c_puct", "alpha", "beta", "length_scale", "ancestor_compatible"),
    "flat": ("flat_num_solutions", "flat_solutions_per_verdict"),
}


@dataclass(frozen=True)
class AnnotationConfig:
    r"""
    How trees are grown.

    The defaults are those of MM-PRM (arXiv 2505.13427). Settings of the other strategy are ignored.

    Parameters:
        > Parameters that control both strategies

        strategy (`str`, *optional*, defaults to `"omegaprm"`):
            `"omegaprm"` searches for the first wrong step of wrong rollouts; `"flat"` samples solutions and measures
            every step prefix of a few of them, as VisualPRM does.
        num_rollouts (`int`, *optional*, defaults to `16`):
            Rollouts sampled from each measured prefix.
        adaptive_rollouts (`bool`, *optional*, defaults to `False`):
            Sample 4 rollouts from a prefix, and more only while its label is undecided: up to 5/4 of `num_rollouts` for
            labels between 0 and 1, a few for the others. See [`mm_prm.annotation.adaptive`] for the test and its error
            bounds. The rollouts of the problem itself are always all sampled: among them the search finds its start.
        rollout_budget (`int`, *optional*, defaults to `1000`):
            Most rollouts that one problem may cost; never exceeded, so a tree ends when the next request would.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the run. Each request's seed follows from it, the problem, the prefix and the request's number.

        > Parameters that control OmegaPRM

        max_search_count (`int`, *optional*, defaults to `200`):
            Most wrong rollouts of a problem that are searched.
        c_puct (`float`, *optional*, defaults to `0.125`):
            Weight of exploration, `c_puct * sqrt(sum of visits) / (1 + visits)`.
        alpha (`float`, *optional*, defaults to `0.5`):
            Base of `alpha ** (1 - mc_value)`: prefers prefixes that often come right, where a wrong rollout surprises.
        beta (`float`, *optional*, defaults to `0.9`):
            Base of `beta ** (words / length_scale)`: prefers short rollouts.
        length_scale (`float`, *optional*, defaults to `2000.0`):
            Number of words by which a rollout's preference falls to `beta`.
        ancestor_compatible (`bool`, *optional*, defaults to `False`):
            Reproduce MM-PRM's own search, with its defects; see [`OmegaPRM`] for the differences. For comparison only.

        > Parameters that control flat annotation

        flat_num_solutions (`int`, *optional*, defaults to `16`):
            Solutions sampled from the problem itself. They are also the rollouts that measure the root.
        flat_solutions_per_verdict (`int`, *optional*, defaults to `2`):
            Most right solutions, and most wrong solutions, whose step prefixes are measured. As many of one kind as
            of the other are taken.

        > Parameters that control the schedule

        trees_in_flight (`int`, *optional*, defaults to `64`):
            Trees that grow at the same time and share the policy's batches: another begins whenever fewer than that
            have requests at the policy. Trees that wait for the judge come on top, at most three times as many. Does
            not change any tree.
    """

    strategy: Literal["omegaprm", "flat"] = field(
        default="omegaprm",
        metadata={"help": "Search for the first wrong step (`omegaprm`) or measure every prefix (`flat`)."},
    )
    num_rollouts: int = field(default=16, metadata={"help": "Rollouts sampled from each measured prefix."})
    adaptive_rollouts: bool = field(
        default=False,
        metadata={"help": "Sample 4 rollouts from a prefix, and more only while its label is undecided."},
    )
    rollout_budget: int = field(default=1000, metadata={"help": "Most rollouts that one problem may cost."})
    seed: int = field(default=0, metadata={"help": "Seed of the run."})
    max_search_count: int = field(default=200, metadata={"help": "Most wrong rollouts of a problem searched."})
    c_puct: float = field(default=0.125, metadata={"help": "Weight of exploration in the selection score."})
    alpha: float = field(default=0.5, metadata={"help": "Base of the preference for prefixes that often come right."})
    beta: float = field(default=0.9, metadata={"help": "Base of the preference for short rollouts."})
    length_scale: float = field(
        default=2000.0, metadata={"help": "Number of words by which the preference for a rollout falls to `beta`."}
    )
    ancestor_compatible: bool = field(
        default=False, metadata={"help": "Reproduce MM-PRM's own search, with its defects, for comparison."}
    )
    flat_num_solutions: int = field(
        default=16, metadata={"help": "Solutions sampled from each problem by the `flat` strategy."}
    )
    flat_solutions_per_verdict: int = field(
        default=2, metadata={"help": "Most right and most wrong solutions that the `flat` strategy measures."}
    )
    trees_in_flight: int = field(
        default=64, metadata={"help": "Trees that grow at the same time and share the policy's batches."}
    )

    def __post_init__(self) -> None:
        if self.strategy not in _STRATEGY_FIELDS:
            raise ValueError(f"strategy = {self.strategy!r}: use one of {', '.join(map(repr, _STRATEGY_FIELDS))}")
        for name in ("num_rollouts", "flat_num_solutions", "flat_solutions_per_verdict", "trees_in_flight"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be at least 1")
        for name in ("num_rollouts", "flat_num_solutions"):
            if getattr(self, name) > MAX_ROLLOUTS_PER_REQUEST:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must not exceed {MAX_ROLLOUTS_PER_REQUEST}")
        if self.adaptive_rollouts and self.ancestor_compatible:
            raise ValueError("adaptive_rollouts: the ancestor's search has none; leave ancestor_compatible out")
        if self.adaptive_rollouts and self.num_rollouts < 2 * ROLLOUTS_AT_ONCE:
            raise ValueError(
                f"adaptive_rollouts: starts with {ROLLOUTS_AT_ONCE} rollouts; num_rollouts = {self.num_rollouts!r} "
                f"must be at least {2 * ROLLOUTS_AT_ONCE}"
            )
        if self.max_search_count < 0:
            raise ValueError(f"max_search_count = {self.max_search_count!r}: must not be negative")
        if self.c_puct < 0:
            raise ValueError(f"c_puct = {self.c_puct!r}: must not be negative")
        for name in ("alpha", "beta"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must lie above 0 and not above 1")
        if self.length_scale <= 0:
            raise ValueError(f"length_scale = {self.length_scale!r}: must be positive")
        root_rollouts = self.num_rollouts if self.strategy == "omegaprm" else self.flat_num_solutions
        if self.rollout_budget < root_rollouts:
            raise ValueError(
                f"rollout_budget = {self.rollout_budget!r}: does not cover the {root_rollouts} rollouts of the root; "
                f"raise it or lower {'num_rollouts' if self.strategy == 'omegaprm' else 'flat_num_solutions'}"
            )

    def tree_settings(self) -> dict[str, Any]:
        """The settings that change a tree under the chosen strategy, for the tree's row and the journal's key."""
        values = dataclasses.asdict(self)
        return {name: values[name] for name in (*_COMMON, *_STRATEGY_FIELDS[self.strategy])}
