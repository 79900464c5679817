"""The stages that compute: annotation, training, sampling of candidates, scoring.

Each takes up what an earlier run with the same input has left in the output folder.
"""

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging

from mm_prm.annotation import AnnotationConfig, Progress, RolloutRequest, annotate
from mm_prm.annotation.identity import checkpoint_digest, describe
from mm_prm.commands.progress import ProgressBar
from mm_prm.data import RowConfig, mini, trees_to_rows
from mm_prm.embedded import embedded_path
from mm_prm.inference import Scorer, build_pools
from mm_prm.judges import RulesJudge
from mm_prm.models import create_process_reward_model
from mm_prm.policies.transformers import TransformersPolicy
from mm_prm.quickstart.config import QuickstartConfig
from mm_prm.quickstart.kept import key_of, read_kept, write_kept
from mm_prm.settings import write_settings
from mm_prm.trainer import PRMConfig, PRMTrainer

Row = Mapping[str, Any]

# The shipped trees are of the first problems of the split; those annotated live are none of them.
FIRST_LIVE_PROBLEM = 1_000_000
# The policy is sampled as it is: cutting its distribution (top-p, top-k) would hide the rarer wrong methods, which the
# verifier has to know.
POLICY_SETTINGS: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "max_new_tokens": 128,
    "dtype": "float32",
}
# Batches that stay in a processor's caches are the fastest on it.
_POLICY_BATCH_SIZE = 128
_PROBLEMS_PER_CALL = 25
# Beside a checkpoint and no part of it
_KEPT = ".quickstart.json"


@dataclass
class _Start:
    """What training started from, for the model's card."""

    model: str = "mini-policy"


class Stages:
    """
    The stages of one run.

    Args:
        config ([`QuickstartConfig`]):
            Settings of the run.
    """

    def __init__(self, config: QuickstartConfig):
        self.config = config
        self.folder = Path(config.output_dir).expanduser() / "stages"
        self.judge = RulesJudge()
        self.reused: list[str] = []

    @cached_property
    def policy(self) -> TransformersPolicy:
        """The embedded policy, opened when something is first sampled."""
        path = str(embedded_path("mini_policy"))
        return TransformersPolicy.from_pretrained(path, device="cpu", batch_size=_POLICY_BATCH_SIZE, **POLICY_SETTINGS)

    @cached_property
    def policy_identity(self) -> str:
        """What the policy is, with its settings."""
        return describe(TransformersPolicy, embedded_path("mini_policy"), POLICY_SETTINGS)

    def annotate(self) -> list[dict[str, Any]]:
        """Grow trees for problems that nobody has annotated before, all of them at once."""
        config = self.config
        settings = AnnotationConfig(
            num_rollouts=config.num_rollouts,
            rollout_budget=config.rollout_budget,
            seed=config.seed,
            trees_in_flight=config.num_problems,
        )
        problems = mini.generate_problems("annotation", config.num_problems, FIRST_LIVE_PROBLEM)
        progress = Progress()
        with _one_thread(), ProgressBar("rollouts", config.num_problems * config.rollout_budget) as bar:

            def show(now: Progress) -> None:
                nonlocal progress
                progress = now
                free = now.trees_from_journal * config.rollout_budget
                bar.update(now.rollouts + free, free, f"{now.trees_done} trees finished")

            trees = list(
                annotate(
                    problems,
                    lambda: self.policy,
                    self.judge,
                    settings,
                    self.folder / "trees.journal.sqlite",
                    show,
                    policy_identity=self.policy_identity,
                    judge_identity=describe(RulesJudge, None, {}),
                )
            )
            # Trees may end before their budget does
            free = progress.trees_from_journal * config.rollout_budget
            bar.update(bar.total, free, f"{progress.trees_done} trees finished")
        if progress.trees_from_journal == config.num_problems:
            self.reused.append("annotate")
        return sorted(trees, key=lambda tree: tree["problem_id"])

    def make_rows(self, trees: Sequence[Row]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Turn the live and the shipped trees into rows, with each problem's question and pictures."""
        shipped = pyarrow.parquet.read_table(embedded_path("mini_trees.parquet")).to_pylist()
        rows, report = trees_to_rows([*trees, *shipped], RowConfig(seed=self.config.seed))
        problems = {row["problem_id"]: mini.problem_from_id(row["problem_id"]).row() for row in rows}
        for row in rows:
            problem = problems[row["problem_id"]]
            row |= {"prompt": problem["question"], "images": problem["images"]}
        return rows, report

    def untrained(self) -> Path:
        """The policy as a process reward model with untrained reward tokens."""
        folder = self.folder / "prm_before"
        key = key_of(self.policy_identity, self.config.seed)
        if read_kept(folder / _KEPT, key) is None:
            model, processor = create_process_reward_model(
                embedded_path("mini_policy"), seed=self.config.seed, dtype=torch.float32
            )
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            write_kept(folder / _KEPT, key, {})
        return folder

    def train(self, rows: Sequence[Row], untrained: Path) -> tuple[Path, dict[str, Any]]:
        """Train a process reward model on the rows; returns its folder, and what is to be told of the training."""
        config = self.config
        folder = self.folder / "prm_after"
        settings: dict[str, Any] = {
            "max_steps": config.train_steps,
            "per_device_train_batch_size": config.train_batch_size,
            "packing": "tree",
            "label_mode": "hard",
            "learning_rate": config.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": max(1, config.train_steps // 10),
            "adam_beta2": 0.98,
            "weight_decay": 0.01,
            "seed": config.seed,
        }
        texts = [[row["problem_id"], row["completions"], row["labels"]] for row in rows]
        key = key_of(self.policy_identity, settings, texts)
        kept = read_kept(folder / _KEPT, key)
        if kept is not None:
            self.reused.append("train")
            return folder, kept
        arguments = PRMConfig(
            str(folder),
            **settings,
            gradient_checkpointing=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = PRMTrainer(str(untrained), arguments, train_dataset=list(rows))
        trainer.remove_callback(PrinterCallback)
        with _one_thread(), ProgressBar("steps", config.train_steps) as bar:
            trainer.add_callback(_ShowSteps(bar))
            trainer.train()
        trainer.save_model()
        write_settings(folder, (_Start(), arguments))
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        result = {"steps": config.train_steps, "rows": config.train_steps * config.train_batch_size, "losses": losses}
        write_kept(folder / _KEPT, key, result)
        return folder, result

    def sample(self, problems: Sequence[Row]) -> tuple[list[dict[str, Any]], list[bool]]:
        """Candidate pools of held-out problems, and whether the greedy solution of each is right."""
        config = self.config
        path = self.folder / "candidates.json"
        key = key_of(self.policy_identity, [_identity(row) for row in problems], config.num_candidates, config.seed)
        kept = read_kept(path, key)
        if kept is not None:
            self.reused.append("sample")
            return kept["pools"], kept["greedy_correct"]
        # The same model, which takes the most probable token
        greedy_policy = TransformersPolicy(
            self.policy.model,
            self.policy.prompts.processor,
            temperature=0.0,
            max_new_tokens=POLICY_SETTINGS["max_new_tokens"],
            batch_size=_POLICY_BATCH_SIZE,
        )
        pools: list[dict[str, Any]] = []
        greedy_correct = []
        with _one_thread(), ProgressBar("problems", len(problems)) as bar:
            for start in range(0, len(problems), _PROBLEMS_PER_CALL):
                some = problems[start : start + _PROBLEMS_PER_CALL]
                requests = [
                    RolloutRequest(row["id"], (), config.num_candidates, _seed(config.seed, row["id"])) for row in some
                ]
                generations = self.policy.generate(list(zip(some, requests, strict=True)))
                candidates = [[list(rollout.steps) for rollout in each.rollouts] for each in generations]
                pools += build_pools(some, candidates, self.judge)
                one_each = [RolloutRequest(row["id"], (), 1, 0) for row in some]
                for row, each in zip(some, greedy_policy.generate(list(zip(some, one_each, strict=True))), strict=True):
                    greedy_correct.append(self.judge.judge(row, each.rollouts[0].steps).verdict == "right")
                bar.update(len(pools))
        write_kept(path, key, {"pools": pools, "greedy_correct": greedy_correct})
        return pools, greedy_correct

    def score(self, name: str, model: Path, problems: Sequence[Row], pools: Sequence[Row]) -> list[list[list[float]]]:
        """Step scores of all candidates by one process reward model."""
        path = self.folder / f"scores_{name}.json"
        candidates = [pool["candidates"] for pool in pools]
        key = key_of(checkpoint_digest(model), [_identity(row) for row in problems], candidates)
        scores = read_kept(path, key)
        if scores is not None:
            self.reused.append(f"score {name}")
            return scores
        scorer = Scorer.from_pretrained(model, dtype=torch.float32, device="cpu")
        distinct = sum(len({tuple(steps) for steps in solutions if steps}) for solutions in candidates)
        with _one_thread(), ProgressBar("solutions", distinct) as bar:
            scores = scorer.score(problems, candidates, lambda done, _: bar.update(done))
        write_kept(path, key, scores)
        return scores


class _ShowSteps(TrainerCallback):
    """Moves a progress bar with the training."""

    def __init__(self, bar: ProgressBar):
        self.bar = bar
        self.loss = ""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.loss = f"loss {float(logs['loss']):.3f}"

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step, note=self.loss)


def _identity(problem: Row) -> list[Any]:
    pictures = [hashlib.sha256(image.tobytes()).hexdigest() for image in problem["images"]]
    return [problem["id"], problem["question"], problem["answer"], problem["choices"], pictures]


def _seed(seed: int, problem_id: str) -> int:
    """Seed of the first of a problem's candidates; the others follow it, far from those of other problems."""
    digest = hashlib.blake2b(f"{seed} {problem_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 13 << 12


@contextmanager
def _one_thread() -> Iterator[None]:
    """
    Without threads inside of an operation: a small model leaves them little to share, and where another program keeps a
    core busy, threads that wait for each other at every operation make it several times slower.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without the bars of transformers for a file of 10 MB, and without its notes to those who write trainers."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
