"""
Reward functions for TRL's [`~trl.GRPOTrainer`]: what a process reward model thinks of the steps, and whether the answer
is right.

A reward of `None` is no reward: TRL leaves it out. With several reward functions it does so only under
`GRPOConfig(multi_objective_aggregation="normalize_then_sum")`; the default adds raw rewards up, and there `None` counts
as much as 0.
"""

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any

from mm_prm.annotation.protocols import Judge, VerdictValue
from mm_prm.inference import AGGREGATORS
from mm_prm.inference.guided_search import StepScorer
from mm_prm.policies.steps import STEP_FORMATS, StepFormat, parse_steps

from .prompts import problems_of

_REWARDS: dict[VerdictValue, float | None] = {"right": 1.0, "wrong": 0.0, "unknown": None}


class ProcessReward:
    """
    Rewards a completion with its aggregated step scores.

    The question, its pictures and its choices are the columns `question`, `images` and `choices` of the dataset; what it
    does not have is read from the prompt. The completions of a prompt are scored together, so that what they share is
    computed once. A completion whose steps cannot be read, or which has no scores, is rewarded with `None`.

    The process reward model stays out of the trainer's hands: it is not wrapped, sharded or saved. With several processes
    each has its own, or all ask one server.

    Args:
        scorer ([`~mm_prm.inference.Scorer`], [`~mm_prm.inference.ServedScorer`] or [`~mm_prm.inference.VLLMScorer`]):
            Gives every step its score.
        aggregator (`str`, *optional*, defaults to `"min"`):
            Makes one number of a completion's step scores: `"min"`, `"last"`, `"product"`, `"mean"`, `"max"`,
            `"sum_logprob"`, `"sum_logit"` or `"mean_odds"`. The reward is logged as `process_reward_` and this name.
        step_format (`str`, *optional*, defaults to `"paragraphs"`):
            How the policy writes its steps: `"paragraphs"`, `"tags"` or `"numbered"`, see
            [`~mm_prm.policies.steps.parse_steps`].

    Example:

    ```python
    >>> from accelerate import PartialState
    >>> from mm_prm.inference import Scorer
    >>> from mm_prm.rl import ProcessReward

    >>> # each process of `accelerate launch` scores on its own GPU
    >>> reward = ProcessReward(Scorer.from_pretrained("path/to/prm", device=PartialState().device))
    >>> rewards = reward(prompts=["What is 2 + 3?"] * 2, completions=["2 + 3 = 5", "2 + 3 = 6"])
    >>> rewards[0] > rewards[1]
    True
    ```
    """

    def __init__(self, scorer: StepScorer, aggregator: str = "min", step_format: StepFormat = "paragraphs"):
        if aggregator not in AGGREGATORS:
            raise ValueError(
                f"aggregator = {aggregator!r}: there is no such aggregator; use one of {', '.join(AGGREGATORS)}"
            )
        if isinstance(scorer, str | os.PathLike):
            raise TypeError(f"scorer = {scorer!r}: give what scores, `Scorer.from_pretrained({str(scorer)!r})`")
        self.scorer = scorer
        self.aggregator = aggregator
        self.step_format = _checked(step_format)
        self.__name__ = f"process_reward_{aggregator}"  # under which TRL logs the reward

    def __call__(self, *, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """
        Rewards completions.

        Args:
            prompts (`Sequence`):
                Prompt of each completion, as messages or as plain text.
            completions (`Sequence`):
                Completions, as messages or as plain text.
            columns:
                Other columns of the dataset, and what else TRL passes.

        Returns:
            `list[float | None]`: One reward a completion.
        """
        solutions = [_steps(completion, self.step_format) for completion in completions]
        # TRL lays the completions of a prompt side by side.
        problems: list[dict[str, Any]] = []
        candidates: list[list[tuple[str, ...]]] = []
        rows = zip(problems_of(prompts, columns), solutions, strict=True)
        for _, group in groupby(rows, key=lambda row: [row[0][name] for name in ("question", "images", "choices")]):
            members = list(group)
            problems.append(members[0][0])
            candidates.append([steps for _, steps in members])
        scores = self.scorer.score(problems, candidates)
        values = (AGGREGATORS[self.aggregator](steps) for group_scores in scores for steps in group_scores)
        return [None if value == -math.inf else value for value in values]


class OutcomeReward:
    """
    Rewards a completion with 1 if its final answer is right and with 0 if it is wrong.

    The gold answer is the dataset's column `answer`, the choices are its column `choices`. Where the judge cannot tell, the
    steps cannot be read, or the gold answer is null, the reward is `None`. It is logged as `outcome_reward`.

    Args:
        judge ([`~mm_prm.annotation.protocols.Judge`]):
            Decides: [`~mm_prm.judges.RulesJudge`], or one that asks a language model.
        step_format (`str`, *optional*, defaults to `"paragraphs"`):
            How the policy writes its steps: `"paragraphs"`, `"tags"` or `"numbered"`. The last one states the answer.
        max_concurrency (`int`, *optional*, defaults to `16`):
            Most completions that the judge is shown at once.

    Example:

    ```python
    >>> from mm_prm.judges import RulesJudge
    >>> from mm_prm.rl import OutcomeReward

    >>> reward = OutcomeReward(RulesJudge())
    >>> reward(prompts=["What is 2 + 3?"] * 2, completions=["The answer is 5.", "The answer is 6."], answer=["5"] * 2)
    [1.0, 0.0]
    ```
    """

    def __init__(self, judge: Judge, step_format: StepFormat = "paragraphs", max_concurrency: int = 16):
        if max_concurrency < 1:
            raise ValueError(f"max_concurrency: {max_concurrency!r} has to be at least 1")
        self.judge = judge
        self.step_format = _checked(step_format)
        self.max_concurrency = max_concurrency
        self.__name__ = "outcome_reward"  # under which TRL logs the reward

    def __call__(self, *, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """
        Rewards completions.

        Args:
            prompts (`Sequence`):
                Prompt of each completion, as messages or as plain text.
            completions (`Sequence`):
                Completions, as messages or as plain text.
            columns:
                Other columns of the dataset, `answer` among them, and what else TRL passes.

        Returns:
            `list[float | None]`: One reward a completion.
        """
        if "answer" not in columns:
            raise ValueError(
                "outcome_reward: the dataset has no column `answer` with the gold answers; rename the one that holds them: "
                f"`dataset.rename_column(…, 'answer')`. Passed were: {', '.join(columns) or 'no columns'}"
            )
        problems = [
            problem | {"answer": _gold(answer, row)}
            for row, (problem, answer) in enumerate(zip(problems_of(prompts, columns), columns["answer"], strict=True))
        ]
        solutions = [_steps(completion, self.step_format) for completion in completions]
        with ThreadPoolExecutor(self.max_concurrency, thread_name_prefix="outcome-reward") as threads:
            return list(threads.map(self._reward, problems, solutions))

    def _reward(self, problem: Mapping[str, Any], steps: tuple[str, ...]) -> float | None:
        if problem["answer"] is None or not steps:
            return None
        return _REWARDS[self.judge.judge(problem, steps).verdict]


def _checked(step_format: StepFormat) -> StepFormat:
    if step_format not in STEP_FORMATS:
        raise ValueError(f"step_format: {step_format!r} has to be one of {', '.join(STEP_FORMATS)}")
    return step_format


def _gold(answer: Any, row: int) -> str | None:
    if not isinstance(answer, str | None):
        raise TypeError(
            f"outcome_reward: row {row} of the batch: answer: {answer!r} is {type(answer).__name__}; gold answers are text, "
            "or null where there is none"
        )
    return answer


def _steps(completion: Any, step_format: StepFormat) -> tuple[str, ...]:
    """The steps of a completion, none where there are none to read."""
    if not isinstance(completion, str):
        if len(completion) != 1:
            raise ValueError(
                f"a completion of {len(completion)} messages ({', '.join(turn['role'] for turn in completion)}): steps are "
                "read from one assistant turn, without tools"
            )
        completion = completion[0]["content"]
    return parse_steps(completion or "", step_format)
