"""Annotation as a stage of `datasets`: `problems.map(MCTSAnnotator(...), batched=True)`."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import multiprocess
from datasets import Features

from mm_prm.annotation.annotator import Annotation
from mm_prm.annotation.config import AnnotationConfig
from mm_prm.annotation.identity import describe
from mm_prm.annotation.protocols import Judge, Policy
from mm_prm.data.features import TREE_FEATURES


class MCTSAnnotator:
    r"""
    Adds the columns of a tree to each problem.

    A thin view of [`annotate`], with the same journal: what the command line has annotated, `map` takes from the
    journal, and the other way round; a setting that is left out is the same as its default. It pickles as its settings,
    and opens policy, judge and journal only when it meets a problem that needs them, so its fingerprint follows from the
    settings alone and `datasets` finds the result of an earlier run. The trees of one batch grow together: keep `batch_size` at `trees_in_flight` or above.

    Args:
        policy (`str` or `os.PathLike`):
            Checkpoint of the policy: a local folder, a name on the Hub, or `"mini-policy"` for the embedded one.
        config ([`AnnotationConfig`], *optional*):
            Settings of the annotation.
        journal (`str` or `os.PathLike`, *optional*):
            Journal in which finished trees are kept.
        policy_settings (`Mapping`, *optional*):
            Further arguments of `open_policy`, values that JSON can hold. They are part of the journal's key, except
            those that say only where and how fast, as `device` and `batch_size`.
        judge_settings (`Mapping`, *optional*):
            Arguments of `open_judge`, values that JSON can hold; part of the journal's key, too.
        open_policy (`Callable`, *optional*, defaults to `TransformersPolicy.from_pretrained`):
            Importable function that opens the policy: `open_policy(policy, **policy_settings)`.
        open_judge (`Callable`, *optional*, defaults to `RulesJudge`):
            Importable function or class that opens the judge: `open_judge(**judge_settings)`.

    Example:

    ```python
    >>> annotator = MCTSAnnotator("mini-policy", AnnotationConfig(rollout_budget=80), journal="trees.journal.sqlite")
    >>> trees = problems.map(
    ...     annotator, batched=True, remove_columns=problems.column_names, features=annotator.features
    ... )
    ```
    """

    features: Features = TREE_FEATURES

    def __init__(
        self,
        policy: str | os.PathLike[str],
        config: AnnotationConfig | None = None,
        journal: str | os.PathLike[str] | None = None,
        policy_settings: Mapping[str, Any] | None = None,
        judge_settings: Mapping[str, Any] | None = None,
        open_policy: Callable[..., Policy] | None = None,
        open_judge: Callable[..., Judge] | None = None,
    ):
        self.policy = os.fspath(policy)
        self.config = config or AnnotationConfig()
        self.journal = None if journal is None else os.fspath(journal)
        self.policy_settings = dict(policy_settings or {})
        self.judge_settings = dict(judge_settings or {})
        self.open_policy = open_policy
        self.open_judge = open_judge
        self._annotation: Annotation | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_annotation": None}

    def __call__(self, batch: Mapping[str, list]) -> dict[str, list]:
        """The tree columns of a batch of problems, one row a problem, in the order of the problems."""
        if multiprocess.parent_process() is not None:
            raise RuntimeError(
                "MCTSAnnotator runs in one process: the policy would be loaded once a process, and a journal has one "
                "writer. Leave num_proc out of `map`; `trees_in_flight` keeps the policy busy"
            )
        problems = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        if self._annotation is None:
            self._annotation = self._open()
        rows = dict(self._annotation.rows(problems, self.journal))
        return {column: [rows[index][column] for index in range(len(problems))] for column in TREE_FEATURES}

    def _open(self) -> Annotation:
        policy, open_policy, open_judge = self.policy, self.open_policy, self.open_judge
        policy_settings = self.policy_settings
        packages: tuple[str, ...] = ()
        if open_policy is None:
            from mm_prm.embedded import model_path
            from mm_prm.policies.settings import default_dtype
            from mm_prm.policies.transformers import TransformersPolicy

            policy, open_policy = model_path(policy), TransformersPolicy.from_pretrained
            dtype = policy_settings.get("dtype") or default_dtype(policy_settings.get("device"))
            policy_settings = {**policy_settings, "dtype": dtype}
        if open_judge is None:
            from mm_prm.judges.rules import RulesJudge

            open_judge, packages = RulesJudge, RulesJudge.packages
        return Annotation(
            partial(open_policy, policy, **policy_settings),
            partial(open_judge, **self.judge_settings),
            self.config,
            policy_identity=describe(open_policy, policy, policy_settings),
            judge_identity=describe(open_judge, None, self.judge_settings, packages),
        )
