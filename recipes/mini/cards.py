"""Writes the cards of the embedded models and trees.

    python recipes/mini/cards.py

Figures come from `results.json` (written by `measure.py table`), settings from `annotate.yaml`, `train.yaml` and what
`run.sh` adds to them for the run that ships, counts from the files themselves.
"""

import argparse
import json
import math
import shlex
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet
import yaml
from huggingface_hub import DatasetCard, EvalResult, ModelCard
from safetensors import safe_open

import mm_prm.embedded
from mm_prm.data import RowConfig
from mm_prm.data.mini_types import question_types
from mm_prm.hub import best_of_n_results, dataset_card, eval_result, model_card

HERE = Path(__file__).parent
HEADLINE = "min"
SPLITS = ("test", "test_ood")
WORLD = {"dataset_type": "mini", "dataset_name": "mini world"}
# The defaults of train_policy.py
POLICY_SETTINGS = {
    "perception_steps": 500,
    "steps": 2600,
    "batch_size": 512,
    "learning_rate": 1.5e-3,
}
# Where things lie, how many are computed at once, what is logged: none of it changes the model
_BESIDE_THE_POINT = (
    "logging_steps",
    "model",
    "output",
    "output_dir",
    "policy_batch_size",
    "problems",
    "report_to",
    "rows",
    "save_strategy",
    "trees_in_flight",
)
_EVALUATION = """\
On {test:,} held-out problems of the split `test` and {test_ood:,} of `test_ood`, which holds question types and wrong methods that
the policy knows and that annotation and process reward model never saw. {num_candidates} candidates a problem, sampled from
`mini-policy` at temperature 1. Intervals are by bootstrap over problems."""
_WORLD_ONLY = (
    "It knows nothing but the mini world: questions of `mm_prm.data.mini` about its pictures of 112 × 112 pixels. It is "
    "there to see mm-prm at work without a network or a GPU."
)


def policy_card(results: dict[str, Any], folder: Path) -> ModelCard:
    """The card of `mini-policy`."""
    steps, perception_steps, batch_size = (POLICY_SETTINGS[key] for key in ("steps", "perception_steps", "batch_size"))
    types = question_types().values()
    num_misled = sum(max(each.rates, key=each.rates.__getitem__) != "right" for each in types)
    return model_card(
        "mini-policy",
        "policy",
        license="apache-2.0",
        tags=["mini"],
        description=f"A stock Qwen2.5-VL class with {_num_parameters(folder):,} parameters, trained from scratch on problems "
        "of the mini world, which `mm_prm.data.mini` makes. It comes with mm-prm.\n\n"
        f"**It is made to have misconceptions.** Beside right solutions, its training data show three wrong methods for each "
        "question type (drops a term, wrong operation, halves twice, reads the neighbouring bar, …), and a further one in the "
        f"wording of the split `test_ood`. Their rates are made up (`mm_prm.data.mini_types`): for {num_misled} of the "
        f"{len(types)} types a wrong method is shown more often than the right one. So the policy errs by whole steps, and "
        "there is something for a process reward model to find.",
        usage="""
from mm_prm.annotation import RolloutRequest
from mm_prm.data import mini
from mm_prm.embedded import model_path
from mm_prm.policies.transformers import TransformersPolicy

policy = TransformersPolicy.from_pretrained(model_path("mini-policy"), top_k=0, top_p=1.0, max_new_tokens=128)
problem = mini.problem("test", 0).row()
[generation] = policy.generate([(problem, RolloutRequest(problem["id"], (), num_rollouts=16, seed=0))])
for rollout in generation.rollouts:
    print(rollout.steps)
""",
        training=f"By `recipes/mini/train_policy.py`, on one H200 GPU in about 4 minutes: {perception_steps:,} steps of "
        f"{batch_size:,} pictures in which the vision tower learns to name the characters it sees (its head is thrown away), "
        f"then {steps:,} steps of {batch_size:,} solutions, cross-entropy on the solutions' tokens. Everything is drawn on the "
        "fly from the split `policy`, which shares no problem with the others.",
        settings=POLICY_SETTINGS,
        evaluation=_evaluation(results),
        eval_results=_policy_results(results),
        limits=[
            _WORLD_ONLY,
            "Its wrong methods, and how often it follows them, say nothing about the errors of people or of other models.",
        ],
    )


def prm_card(results: dict[str, Any], folder: Path) -> ModelCard:
    """The card of `mini-prm`."""
    rows, training = run_settings(results["shipped"])
    strategies = {"flat": ["flat"], "both": ["omegaprm", "flat"]}.get(rows, ["omegaprm"])
    annotation = _settings(HERE / "annotate.yaml") | {"strategy": " and ".join(strategies)}
    if "flat" not in strategies:
        annotation = {name: value for name, value in annotation.items() if not name.startswith("flat_")}
    costs = [results["annotation"][strategy] for strategy in strategies]
    parts = costs if rows == "both" else [results["annotation"][rows]]
    counts = {name: sum(part[name] for part in parts) for name in ("rows", "labels", "trees", "trees_kept")}
    counts["trees_dropped"] = sum((Counter(part["trees_dropped"]) for part in parts), Counter())
    began = str(training.get("model", "")).rpartition("/prm/")[2]
    start = f"It went on from the run `{began}`. " if began in results["models"] else ""
    labels = "soft labels (Monte Carlo values)" if training["label_mode"] == "soft" else "hard labels (value above 0)"
    dropped = ", ".join(f"{number:,} {reason}" for reason, number in counts["trees_dropped"].items())
    return model_card(
        "mini-prm",
        base_model="mini-policy",
        license="apache-2.0",
        tags=["mini"],
        description=f"A stock Qwen2.5-VL class with {_num_parameters(folder):,} parameters that scores the solutions of "
        "`mini-policy` to problems of the mini world, which `mm_prm.data.mini` makes. It comes with mm-prm.",
        usage="""
from mm_prm.data import mini
from mm_prm.embedded import model_path
from mm_prm.inference import Scorer

scorer = Scorer.from_pretrained(model_path("mini-prm"))
problem = mini.problem("test", 0)
solutions = [problem.solution(method) for method in problem.answers]  # by the right method, and by each wrong one
scores = scorer.score([problem.row()], [solutions])[0]  # for each solution one number in [0, 1] for each step
best = max(range(len(solutions)), key=lambda number: min(scores[number]))
""",
        training=f"All weights but those of the vision tower, no adapter, on {labels}: {counts['rows']:,} stepwise rows with "
        f"{counts['labels']:,} labels, from {counts['trees_kept']:,} of {counts['trees']:,} trees (left out: "
        f"{dropped or 'none'}). The annotation (`{annotation['strategy']}`) took {annotation['num_rollouts']} rollouts from each prefix and "
        f"at most {annotation['rollout_budget']} a problem, {sum(cost['rollouts'] for cost in costs):,} in all, sampled from `mini-policy` as "
        f"it is. {' '.join(_label_quality(cost) for cost in costs)} {start}".rstrip(),
        settings={"annotation": annotation, "rows": asdict(RowConfig()), "training": training},
        evaluation=f"{_evaluation(results)} Best-of-N picks the candidate whose lowest step score is highest (`{HEADLINE}`, "
        f"fixed beforehand); which training run ships was chosen on the validation split.\n\n{_comparisons(results)}",
        eval_results=_prm_results(results),
        limits=[
            _WORLD_ONLY,
            "It was trained on the wrong methods of `mini-policy`. What it does on question types and methods that it never "
            "saw is in the column `test_ood`.",
        ],
    )


def trees_card(results: dict[str, Any], path: Path) -> DatasetCard:
    """The card of the embedded trees."""
    trees = pyarrow.parquet.read_table(path).to_pylist()
    annotation = results["annotation"]["omegaprm"]
    return dataset_card(
        "mini-trees",
        trees,
        data_files={"trees": path.name},
        license="apache-2.0",
        tags=["mini"],
        description="OmegaPRM trees of `mini-policy` on problems of the mini world. They come with mm-prm, without pictures: "
        "`mm_prm.data.mini` draws them again from the problems' ids.",
        usage="""
from datasets import Dataset
from mm_prm.data import join_problems, load_problems, trees_to_rows
from mm_prm.embedded import embedded_path

trees = Dataset.from_parquet(str(embedded_path("mini_trees.parquet")))
rows, counts = trees_to_rows(trees)  # stepwise rows: completions (the steps), labels (one for each step, or None)
problems, _ = load_problems(f"mini:annotation:{len(trees)}")  # draws the pictures
training_rows = join_problems(rows, problems)
""",
        annotation=f"The first {len(trees):,} of the {annotation['trees']:,} trees of the mini study, by `mm-prm annotate` with "
        "`recipes/mini/annotate.yaml`, on one H200 GPU that eight processes shared (the seconds are summed over them). "
        f"{_label_quality(annotation)}",
        limits=[
            "The policy's errors are made up. Nothing says that what they teach carries over to other policies or problems."
        ],
    )


def run_settings(name: str) -> tuple[str, dict[str, Any]]:
    """The rows that a run of `run.sh` was trained on, and its settings."""
    for line in (HERE / "run.sh").read_text(encoding="utf-8").splitlines():
        if line.strip().startswith(f"train {name} "):
            _, _, rows, *arguments = shlex.split(line)
            names = [argument.removeprefix("--") for argument in arguments[::2]]
            given = {name: yaml.safe_load(value) for name, value in zip(names, arguments[1::2], strict=True)}
            return rows, _settings(HERE / "train.yaml") | given
    raise ValueError(f"results.json: shipped = {name!r}: run.sh has no such training run")


def _settings(path: Path) -> dict[str, Any]:
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {name: value for name, value in settings.items() if name not in _BESIDE_THE_POINT}


def _num_parameters(folder: Path) -> int:
    with safe_open(folder / "model.safetensors", "numpy") as weights:
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118


def _evaluation(results: dict[str, Any]) -> str:
    numbers = {split: results[split]["num_problems"] for split in SPLITS}
    return _EVALUATION.format(num_candidates=results["num_candidates"], **numbers)


def _policy_results(results: dict[str, Any]) -> list[EvalResult]:
    figures = []
    for split in SPLITS:
        baselines = results["models"][results["shipped"]][split]
        num = results["num_candidates"]
        for name, estimate in (
            ("mean pass@1", baselines["pass@1"]),
            ("greedy", results[split]["greedy"]),
            (f"majority vote of {num}", baselines["majority"]),
            (f"oracle of {num}", baselines["oracle"]),
        ):
            figures.append(eval_result(name, estimate, **WORLD, dataset_split=split))
    return figures


def _prm_results(results: dict[str, Any]) -> list[EvalResult]:
    model = results["models"][results["shipped"]]
    figures = []
    for split in SPLITS:
        figures += best_of_n_results(model[split], HEADLINE, **WORLD, dataset_split=split)
    for name, key, metric_type in (
        ("AUC of step scores within problems", "within_problem_auc", "roc_auc"),
        ("AUC of step scores", "auc", "roc_auc"),
        ("F1 of wrong steps, threshold of the validation split", "wrong_step_f1", "f1"),
    ):
        figures.append(eval_result(name, model["steps"][key], **WORLD, dataset_split="test", metric_type=metric_type))
    return figures


def _comparisons(results: dict[str, Any]) -> str:
    """Paired differences, in words."""
    model = results["models"][results["shipped"]]
    sentences = []
    for split in SPLITS:
        entry = model[split]["best_of_n"][HEADLINE]
        sentences.append(
            f"On `{split}`, Best-of-{results['num_candidates']} minus mean pass@1 is {_difference(entry['minus_pass@1'])}, "
            f"minus the majority vote {_difference(entry['minus_majority'])}."
        )
    lost, swapped = model["swapping_costs"], model["test_swapped"]["value"]
    sentences.append(
        f"With the pictures of `test` swapped between problems of a type it reaches {swapped:.3f}, a loss of "
        f"{lost['value']:.3f} ({lost['low']:.3f} to {lost['high']:.3f}). Step scores are compared with the exact correctness "
        "of each step, which the mini world knows. All aggregators and ablations are in `recipes/mini/RESULTS.md`."
    )
    return "\n".join(sentences)


def _difference(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:+.3f} ({estimate['low']:+.3f} to {estimate['high']:+.3f})"


def _label_quality(annotation: dict[str, Any]) -> str:
    quality = annotation["against_exact"]
    return (
        f"Against the exact correctness of the prefix's last step, the Monte Carlo values of {quality['labels']:,} prefixes "
        f"of the {annotation['trees']:,} trees have an AUC of {quality['auc']:.3f}; value > 0 agrees in "
        f"{100 * quality['right_if_above_0']:.1f} %."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    parser.add_argument("--embedded", type=Path, default=Path(mm_prm.embedded.__file__).parent)
    args = parser.parse_args()
    results = json.loads(args.results.read_text(encoding="utf-8"))
    cards: dict[Path, ModelCard | DatasetCard] = {
        args.embedded / "mini_policy": policy_card(results, args.embedded / "mini_policy"),
        args.embedded / "mini_prm": prm_card(results, args.embedded / "mini_prm"),
        args.embedded: trees_card(results, args.embedded / "mini_trees.parquet"),
    }
    for folder, card in cards.items():
        card.save(folder / "README.md")
        print(folder / "README.md")


if __name__ == "__main__":
    main()
