"""Trains the mini policy with GRPO: the process reward model, the judge, or both give the rewards.

    python recipes/mini/grpo.py --rewards none --output_dir outputs/grpo/none
    python recipes/mini/grpo.py --rewards process --output_dir outputs/grpo/process
    python recipes/mini/grpo.py --rewards outcome --output_dir outputs/grpo/outcome
    python recipes/mini/grpo.py --rewards both --output_dir outputs/grpo/both
    python recipes/mini/grpo.py --rewards process --aggregator sum_logit --output_dir outputs/grpo/sum_logit
    python recipes/mini/grpo.py --table outputs/grpo/{none,process,outcome,both,sum_logit}/grpo.json

Each run trains on problems of the split `annotation` and then measures on held-out problems of the splits `test` and
`test_ood` (question types, and wordings with a wrong method, that neither this training nor the reward model's has seen):
pass@1, the share of samples whose every step is right, which the mini world knows, and the process reward. A reward that
rises while the truth does not is reward hacking. The table compares each run with the first, with intervals over the same
problems. On one CPU core a step of 64 completions takes about 10 seconds. For a GPU (not run yet):
`--completions 512 --steps 200 --problems 1000`.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import GRPOConfig, GRPOTrainer

from mm_prm.annotation import RolloutRequest
from mm_prm.annotation.protocols import sample_seed
from mm_prm.data import PROBLEM_FEATURES, mini
from mm_prm.data.mini_check import UnparsableStep, check_steps
from mm_prm.embedded import model_path
from mm_prm.inference import AGGREGATORS, Scorer
from mm_prm.judges import RulesJudge
from mm_prm.metrics.best_of_n.estimates import bootstrap_means, difference, estimate
from mm_prm.models import batch_vision_attention
from mm_prm.policies.transformers import TransformersPolicy
from mm_prm.rl import OutcomeReward, ProcessReward, add_prompts

# --- settings --------------------------------------------------------------------------------------------------------

GROUP = 8  # completions of a problem
LEARNING_RATE = 2e-4
MAX_TOKENS = 96  # of a completion; the longest of 1,200 right solutions has 90
HELD_OUT = ("test", "test_ood")
HEADLINE = "min"  # aggregator of the process reward that is measured, whatever the training's
SAMPLES = 8  # of each held-out problem, at T = 1
WEIGHTS = {"process": [1.0, 0.0], "outcome": [0.0, 1.0], "both": [1.0, 1.0]}


# --- training --------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace, model: Any, processor: Any, scorer: Scorer) -> list[dict[str, Any]]:
    """Trains `model` in place; returns TRL's log. Both rewards are logged in each run, whatever their weights."""
    problems = Dataset.from_list(
        list(mini.generate_problems("annotation", args.steps * args.completions // GROUP, start=10_000 * args.seed)),
        features=PROBLEM_FEATURES,
    )
    trainer = GRPOTrainer(
        model=model,
        processing_class=processor,
        reward_funcs=[ProcessReward(scorer, args.aggregator), OutcomeReward(RulesJudge())],
        args=GRPOConfig(
            output_dir=args.output_dir,
            reward_weights=WEIGHTS[args.rewards],
            multi_objective_aggregation="normalize_then_sum",  # a reward of None counts for nothing
            num_generations=GROUP,
            per_device_train_batch_size=args.completions // int(os.environ.get("WORLD_SIZE", "1")),
            max_completion_length=MAX_TOKENS,
            mask_truncated_completions=True,
            temperature=1.0,
            top_k=0,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=5,
            beta=0.0,
            max_steps=args.steps,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=False,
            gradient_checkpointing=False,
            seed=args.seed,
        ),
        train_dataset=add_prompts(problems, processor),
    )
    trainer.train()
    trainer.save_model()
    return trainer.state.log_history


# --- evaluation ------------------------------------------------------------------------------------------------------


def measure(
    args: argparse.Namespace, split: str, model: Any, processor: Any, scorer: Scorer
) -> dict[str, list[float]]:
    """For each held-out problem the share of samples that are right, their reward, and the share with no wrong step."""
    problems = list(mini.generate_problems(split, args.problems))
    policy = TransformersPolicy(model, processor, max_new_tokens=MAX_TOKENS, top_k=0, top_p=1.0)
    requests = [RolloutRequest(row["id"], (), SAMPLES, sample_seed("grpo", row["id"])) for row in problems]
    generations = policy.generate(list(zip(problems, requests, strict=True)))
    solutions = [[rollout.steps for rollout in generation.rollouts] for generation in generations]
    judge = RulesJudge()
    scores = scorer.score(problems, solutions)
    return {
        "pass@1": [
            float(np.mean([judge.judge(row, steps).verdict == "right" for steps in each]))
            for row, each in zip(problems, solutions, strict=True)
        ],
        "process reward": [
            float(np.mean([AGGREGATORS[HEADLINE](steps) if steps else 0.0 for steps in each])) for each in scores
        ],
        "all steps right": [
            float(np.mean([all_right(row["id"], steps) for steps in each]))
            for row, each in zip(problems, solutions, strict=True)
        ],
        "steps": [float(np.mean([len(steps) for steps in each])) for each in solutions],
    }


def all_right(problem_id: str, steps: Sequence[str]) -> bool:
    """Whether every step is right, as the mini world knows; what is not in its language is not."""
    try:
        return bool(steps) and all(check_steps(mini.problem_from_id(problem_id), steps))
    except UnparsableStep:
        return False


# --- command line ----------------------------------------------------------------------------------------------------


def table(paths: Sequence[Path]) -> str:
    """The runs' figures as a Markdown table: means over problems with 95 % intervals, differences from the first run paired."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    heads = ["rewards", "aggregator", "steps", "seed"]
    rows = [[str(run[name]) for name in heads] for run in runs]
    for split in HELD_OUT:
        for figure, scale in (("pass@1", 100), ("all steps right", 100), ("process reward", 1), ("steps", 1)):
            values = np.array([run["held out"][split][figure] for run in runs], dtype=float).T * scale
            means = bootstrap_means(values)
            heads += [f"{split}: {figure}", "gain"]
            for number, row in enumerate(rows):
                row.append(cell(estimate(values[:, number], means[:, number])))
                gains = values[:, number] - values[:, 0], means[:, number] - means[:, 0]
                row.append(cell(difference(*gains)) if number else "")
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows))


def cell(figure: dict[str, float]) -> str:
    return "{value:.3g} [{low:.3g}, {high:.3g}]".format(**figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", choices=["none", *WEIGHTS])
    parser.add_argument("--aggregator", choices=AGGREGATORS, default="min")
    parser.add_argument("--output_dir")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--completions", type=int, default=64, help="of a step, a multiple of 8")
    parser.add_argument("--problems", type=int, default=200, help="held-out problems of each split")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--table", type=Path, nargs="+", help="grpo.json of runs; prints their table and does nothing else"
    )
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
        return
    if not (args.rewards and args.output_dir):
        parser.error("a run needs --rewards and --output_dir")

    device = PartialState().device
    scorer = Scorer.from_pretrained(model_path("mini-prm"), device=device)
    model: Any = AutoModelForImageTextToText.from_pretrained(model_path("mini-policy"), dtype=torch.float32).to(device)
    batch_vision_attention(model)
    model.model.visual.requires_grad_(False)  # it reads the pictures already
    processor = AutoProcessor.from_pretrained(model_path("mini-policy"))
    if args.rewards == "none":
        args.steps, log = 0, []
    else:
        log = train(args, model, processor, scorer)
    if not PartialState().is_main_process:
        return
    held_out = {split: measure(args, split, model, processor, scorer) for split in HELD_OUT}
    names = ("rewards", "aggregator", "steps", "completions", "problems", "seed")
    results = {name: vars(args)[name] for name in names} | {"log": log, "held out": held_out}
    path = Path(args.output_dir, "grpo.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results), encoding="utf-8")
    print(table([path]))


if __name__ == "__main__":
    main()
