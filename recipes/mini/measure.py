"""Measures the study's PRMs on held-out problems, and writes the tables.

    python recipes/mini/measure.py candidates --directory outputs/mini --policy mini-policy
    python recipes/mini/measure.py score --directory outputs/mini --name soft --model outputs/mini/prm/soft
    python recipes/mini/measure.py table --directory outputs/mini --output recipes/mini
    python recipes/mini/measure.py compare --directory outputs/mini --name tree --against none

`candidates` samples 16 solutions for each problem of the splits validation, test and test_ood, and the greedy one.
`score` gives every step a score, and once more on the test split with each problem's picture replaced by that of the
next problem of its type. `compare` sets two models side by side on the same candidates. `table` and `compare` need no GPU. What ships is chosen on the validation split, by `min`, which was fixed
beforehand; all figures of the tables are those of the test splits.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from mm_prm.annotation import RolloutRequest
from mm_prm.data import mini
from mm_prm.data.mini_check import UnparsableStep, check_steps
from mm_prm.embedded import model_path
from mm_prm.inference import AGGREGATORS, Scorer, build_pools
from mm_prm.judges import RulesJudge
from mm_prm.metrics.best_of_n.best_of_n import BestOfN
from mm_prm.metrics.best_of_n.estimates import best_of_n_curve, bootstrap_means, difference, estimate
from mm_prm.metrics.steps import auc, best_wrong_step_threshold, within_problem_auc, wrong_step_f1
from mm_prm.models import AutoModelForProcessReward, ProcessRewardProcessor

NUM_CANDIDATES = 16
HEADLINE = "min"
SPLITS = {"validation": 500, "test": 1000, "test_ood": 1000}


def candidates(directory: Path, policy_name: str, scale: float) -> None:
    """Writes `candidates/SPLIT.json`: pools without scores, log-probabilities, and the greedy solution's verdict."""
    from mm_prm.policies.transformers import TransformersPolicy

    def policy(temperature: float) -> TransformersPolicy:
        return TransformersPolicy.from_pretrained(
            model_path(policy_name), temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=128, batch_size=512
        )

    (directory / "candidates").mkdir(parents=True, exist_ok=True)
    judge, sampling, greedy = RulesJudge(), policy(1.0), policy(0.0)
    for split, number in SPLITS.items():
        problems = list(mini.generate_problems(split, int(number * scale)))
        requests = [
            RolloutRequest(problem["id"], (), NUM_CANDIDATES, 1000 * index) for index, problem in enumerate(problems)
        ]
        generations = sampling.generate(list(zip(problems, requests, strict=True)))
        single = [RolloutRequest(problem["id"], (), 1, 0) for problem in problems]
        best = greedy.generate(list(zip(problems, single, strict=True)))
        pools = build_pools(problems, [[list(r.steps) for r in g.rollouts] for g in generations], judge)
        for pool, problem, generation, one in zip(pools, problems, generations, best, strict=True):
            pool["logprobs"] = [rollout.logprob for rollout in generation.rollouts]
            pool["num_tokens"] = [rollout.num_tokens for rollout in generation.rollouts]
            pool["greedy_correct"] = judge.judge(problem, one.rollouts[0].steps).verdict == "right"
        (directory / "candidates" / f"{split}.json").write_text(json.dumps(pools))
        print(f"{split}: pass@1 {np.mean([np.mean(pool['correct']) for pool in pools]):.3f}", flush=True)


def score(directory: Path, name: str, model: str) -> None:
    """Writes `scores/NAME.json`: step scores by split, `test_swapped` among them."""
    path = model_path(model)
    # as it ships: weights in bfloat16, computed in float32
    reward_model = AutoModelForProcessReward.from_pretrained(path, dtype=torch.bfloat16).float()
    reward_model.to("cuda" if torch.cuda.is_available() else "cpu")
    processor = ProcessRewardProcessor.from_pretrained(path)
    scorer = Scorer(reward_model, processor, max_tokens=65536 if torch.cuda.is_available() else 4096)
    scores = {}
    for split in (*SPLITS, "test_swapped"):
        pools = json.loads((directory / "candidates" / f"{split.removesuffix('_swapped')}.json").read_text())
        problems = [mini.problem_from_id(pool["problem_id"]).row() for pool in pools]
        if split == "test_swapped":
            swap_pictures(problems)
        scores[split] = scorer.score(problems, [pool["candidates"] for pool in pools])
        print(f"{name}: {split} scored", flush=True)
    (directory / "scores").mkdir(exist_ok=True)
    rounded = {split: [[[round(s, 5) for s in c] for c in p] for p in rows] for split, rows in scores.items()}
    (directory / "scores" / f"{name}.json").write_text(json.dumps(rounded))


def swap_pictures(problems: list[dict]) -> None:
    """Gives each problem the pictures of the next problem of its type, in place."""
    by_type: dict[str, list[dict]] = {}
    for problem in problems:
        by_type.setdefault(problem["subject"], []).append(problem)
    for group in by_type.values():
        pictures = [problem["images"] for problem in group]
        for problem, images in zip(group, pictures[1:] + pictures[:1], strict=True):
            problem["images"] = images


# --- tables ----------------------------------------------------------------------------------------------------------


def best_of_n(pools: list[dict], scores: list) -> dict:
    """The metric of `mm_prm.metrics.best_of_n` on one split."""
    return BestOfN().compute(
        correct=[pool["correct"] for pool in pools],
        step_scores=scores,
        answers=[pool["answers"] for pool in pools],
        candidates=[pool["candidates"] for pool in pools],
    )


def one_score(pools: list[dict], values: list[list[float]]) -> dict:
    """Best-of-N by one number a candidate, beside pass@1 and majority."""
    correct = [[bool(c) for c in pool["correct"]] for pool in pools]
    sizes = [len(correct[0])]
    chosen = np.array([best_of_n_curve(c, v, sizes)[0] for c, v in zip(correct, values, strict=True)])
    return estimate(chosen, bootstrap_means(chosen))


def exact_labels(pools: list[dict]) -> list[list[list[bool] | None]]:
    """Exact step correctness; `None` for a candidate outside the language of the world."""

    def check(problem: mini.MiniProblem, steps: list[str]) -> list[bool] | None:
        try:
            return check_steps(problem, steps)
        except UnparsableStep:
            return None

    return [[check(mini.problem_from_id(pool["problem_id"]), steps) for steps in pool["candidates"]] for pool in pools]


def step_figures(pools: list[dict], scores: list, exact: list, threshold: float | None) -> dict:
    """AUC within problems and over all, and F1 of wrong steps, each distinct solution of a problem once."""
    labels, values, problems = [], [], []
    for pool, pool_scores, pool_exact in zip(pools, scores, exact, strict=True):
        seen = set()
        for steps, step_scores, correct in zip(pool["candidates"], pool_scores, pool_exact, strict=True):
            if correct is None or tuple(steps) in seen:
                continue
            seen.add(tuple(steps))
            labels += [float(value) for value in correct]
            values += step_scores
            problems += [pool["problem_id"]] * len(correct)
    best = best_wrong_step_threshold(labels, values)[0]
    aucs = within_problem_auc(labels, values, problems)
    return {
        "within_problem_auc": aucs["within_problem_auc"],
        "auc": aucs["auc"],
        "wrong_step_f1_at_0.5": wrong_step_f1(labels, values),
        "wrong_step_f1": wrong_step_f1(labels, values, best if threshold is None else threshold),
        "threshold": best if threshold is None else threshold,
    }


def label_quality(trees: list[dict]) -> dict:
    """Monte Carlo labels of measured prefixes against exact correctness of their last step."""
    labels, values = [], []
    for tree in trees:
        problem = mini.problem_from_id(tree["problem_id"])
        prefixes: dict[int, list[str]] = {}
        for node in tree["nodes"]:
            parent = prefixes.get(node["parent_id"], [])
            prefixes[node["node_id"]] = [*parent, *node["steps"]]
            if node["steps"] and node["num_judged"]:
                try:
                    labels.append(check_steps(problem, prefixes[node["node_id"]])[-1])
                except UnparsableStep:
                    continue
                values.append(node["num_right"] / node["num_judged"])
    agree = np.mean([(value > 0) == label for value, label in zip(values, labels, strict=True)])
    return {"labels": len(labels), "auc": auc([float(v) for v in labels], values), "right_if_above_0": float(agree)}


def table(directory: Path, output: Path) -> None:
    """Writes `results.json` and `RESULTS.md`."""
    pools = {split: json.loads((directory / "candidates" / f"{split}.json").read_text()) for split in SPLITS}
    exact = {split: exact_labels(pools[split]) for split in SPLITS}
    models = {path.stem: json.loads(path.read_text()) for path in sorted((directory / "scores").glob("*.json"))}
    results: dict = {"models": {}, "num_candidates": NUM_CANDIDATES}
    for name, scores in models.items():
        on_validation = best_of_n(pools["validation"], scores["validation"])
        threshold = step_figures(pools["validation"], scores["validation"], exact["validation"], None)["threshold"]
        swapped = best_of_n(pools["test"], scores["test_swapped"])["best_of_n"]
        results["models"][name] = {
            "validation": {key: value["value"] for key, value in on_validation["best_of_n"].items()},
            "test": best_of_n(pools["test"], scores["test"]),
            "test_ood": best_of_n(pools["test_ood"], scores["test_ood"]),
            "test_swapped": swapped[HEADLINE],
            "steps": step_figures(pools["test"], scores["test"], exact["test"], threshold),
            "swapping_costs": _paired(pools["test"], scores["test"], scores["test_swapped"]),
        }
    for split in SPLITS:
        greedy = np.array([float(pool["greedy_correct"]) for pool in pools[split]])
        results[split] = {
            "num_problems": len(pools[split]),
            "greedy": estimate(greedy, bootstrap_means(greedy)),
            "logprob": one_score(pools[split], [pool["logprobs"] for pool in pools[split]]),
            "mean_logprob": one_score(
                pools[split],
                [[a / b for a, b in zip(p["logprobs"], p["num_tokens"], strict=True)] for p in pools[split]],
            ),
            "unparsable": float(np.mean([c is None for row in exact[split] for c in row])),
        }
    results["annotation"] = json.loads((directory / "rows" / "report.json").read_text())
    for strategy in ("omegaprm", "flat"):
        shards = sorted(map(str, (directory / "trees").glob(f"{strategy}.*.parquet")))
        results["annotation"][strategy]["against_exact"] = label_quality(Dataset.from_parquet(shards).to_list())
    results["shipped"] = max(
        (name for name in models if name not in ("outcome", "scratch")),
        key=lambda name: results["models"][name]["validation"][HEADLINE],
    )
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (output / "RESULTS.md").write_text(markdown(results))
    print((output / "RESULTS.md").read_text())


def _paired(pools: list[dict], scores: list, others: list) -> dict:
    """What Best-of-N by the headline aggregator loses with the other scores; paired over problems."""
    lost = _chosen(pools, scores, HEADLINE) - _chosen(pools, others, HEADLINE)
    return difference(lost, bootstrap_means(lost))


def _chosen(pools: list[dict], scores: list, aggregator: str) -> np.ndarray:
    """For each problem, whether the candidate with the best score is right."""
    aggregate = AGGREGATORS[aggregator]
    return np.array(
        [
            best_of_n_curve([bool(c) for c in pool["correct"]], [aggregate(c) for c in row], [len(row)])[0]
            for pool, row in zip(pools, scores, strict=True)
        ]
    )


def compare(directory: Path, name: str, against: str) -> None:
    """Writes `NAME_against_OTHER.json`: Best-of-N with the scores of both models, and the difference, paired over problems."""
    scores = {model: json.loads((directory / "scores" / f"{model}.json").read_text()) for model in (name, against)}
    results: dict = {}
    for split in SPLITS:
        pools = json.loads((directory / "candidates" / f"{split}.json").read_text())
        results[split] = {"num_problems": len(pools)}
        for aggregator in (HEADLINE, "last"):
            chosen = {model: _chosen(pools, scores[model][split], aggregator) for model in (name, against)}
            gained = chosen[name] - chosen[against]
            results[split][aggregator] = {
                **{model: estimate(values, bootstrap_means(values)) for model, values in chosen.items()},
                "difference": difference(gained, bootstrap_means(gained)),
            }
            cells = results[split][aggregator]
            print(
                f"{split}, {len(pools)} problems, Best-of-{NUM_CANDIDATES} by {aggregator}: {name} {_cell(cells[name])}, "
                f"{against} {_cell(cells[against])}, difference {_cell(cells['difference'])}"
            )
    (directory / f"{name}_against_{against}.json").write_text(json.dumps(results, indent=1) + "\n")


def _cell(entry: dict) -> str:
    return f"{100 * entry['value']:.1f} ({100 * entry['low']:.1f}–{100 * entry['high']:.1f})"


def markdown(results: dict) -> str:
    """The tables, in percent with 95 % intervals."""
    shipped = results["shipped"]
    main = results["models"][shipped]
    lines = [
        "# The mini study: results",
        "",
        "Written by `recipes/mini/run.sh` (`recipes/mini/measure.py table`); the figures behind it are in `results.json`.",
        f"Policy `mini-policy`, N = {NUM_CANDIDATES} candidates at T = 1. Percent, 95 % intervals by bootstrap over problems,",
        f"differences paired. Headline aggregator, fixed beforehand: `{HEADLINE}`. What ships as `mini-prm` was chosen on the",
        f"validation split: **{shipped}**.",
        "",
        "## Methods",
        "",
        "| | test | out of domain |",
        "|---|---|---|",
    ]
    splits = ("test", "test_ood")

    def row(label: str, entries: list[dict]) -> None:
        lines.append(f"| {label} | " + " | ".join(_cell(entry) for entry in entries) + " |")

    row("mean pass@1", [main[split]["pass@1"] for split in splits])
    row("greedy", [results[split]["greedy"] for split in splits])
    row("uninformative verifier", [main[split]["uninformative"] for split in splits])
    row("majority vote", [main[split]["majority"] for split in splits])
    row("policy's log-probability", [results[split]["logprob"] for split in splits])
    row("policy's log-probability a token", [results[split]["mean_logprob"] for split in splits])
    if "outcome" in results["models"]:
        row("outcome model (`last`)", [results["models"]["outcome"][split]["best_of_n"]["last"] for split in splits])
    for aggregator in main["test"]["best_of_n"]:
        row(f"mini-prm, `{aggregator}`", [main[split]["best_of_n"][aggregator] for split in splits])
    for aggregator in main["test"]["weighted_majority"]:
        row(
            f"weighted majority, `{aggregator}`",
            [main[split]["weighted_majority"][aggregator] for split in splits],
        )
    row("oracle", [main[split]["oracle"] for split in splits])
    headline = {split: main[split]["best_of_n"][HEADLINE] for split in splits}
    lines += ["", f"`{HEADLINE}` minus pass@1: {_cell(headline['test']['minus_pass@1'])} (test), "
              f"{_cell(headline['test_ood']['minus_pass@1'])} (out of domain); minus majority: "
              f"{_cell(headline['test']['minus_majority'])} (test), {_cell(headline['test_ood']['minus_majority'])} (out of domain).",
              f"Pictures swapped between problems of a type: {_cell(main['test_swapped'])}, a loss of {_cell(main['swapping_costs'])}.",
              "", "## Over N, test split", ""]  # fmt: skip
    sizes = list(headline["test"]["by_n"])
    lines += ["| | " + " | ".join(f"N = {n}" for n in sizes) + " |", "|---|" + "---|" * len(sizes)]
    for label, entry in (
        (f"mini-prm, `{HEADLINE}`", headline["test"]),
        ("majority vote", main["test"]["majority"]),
        ("oracle", main["test"]["oracle"]),
    ):
        row(label, [entry["by_n"][n] for n in sizes])
    lines += [
        "",
        "## Ablations",
        "",
        f"Best-of-{NUM_CANDIDATES} by `{HEADLINE}` and `last`; step scores against exact step correctness on the test split; F1 of",
        "wrong steps at 0.5 and at the best threshold of the validation split.",
        "",
        "| trained with | validation, min | test, min | test, last | out of domain, min | AUC within problems | AUC | F1 at 0.5 | F1 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, model in results["models"].items():
        steps = model["steps"]
        lines.append(
            f"| {name} | {100 * model['validation'][HEADLINE]:.1f} | {_cell(model['test']['best_of_n'][HEADLINE])} | "
            f"{_cell(model['test']['best_of_n']['last'])} | {_cell(model['test_ood']['best_of_n'][HEADLINE])} | "
            f"{steps['within_problem_auc']:.3f} | {steps['auc']:.3f} | {steps['wrong_step_f1_at_0.5']:.3f} | {steps['wrong_step_f1']:.3f} |"
        )
    lines += ["", "## Annotation", "", "| | trees kept | rollouts | rows | labels | Monte Carlo value against exact correctness: AUC | value > 0 agrees |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for strategy in ("omegaprm", "flat"):
        report = results["annotation"][strategy]
        quality = report["against_exact"]
        lines.append(
            f"| {strategy} | {report['trees_kept']} of {report['trees']} | {report['rollouts']} | {report['rows']} | "
            f"{report['labels']} | {quality['auc']:.3f} | {100 * quality['right_if_above_0']:.1f} % |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("candidates", "score", "table", "compare"))
    parser.add_argument("--directory", type=Path, default=Path("outputs/mini"))
    parser.add_argument("--policy", default="mini-policy")
    parser.add_argument("--name")
    parser.add_argument("--model")
    parser.add_argument("--against", help="name of the scores to compare with")
    parser.add_argument("--output", type=Path, default=Path("recipes/mini"))
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of each split's problems, to try the script out"
    )
    args = parser.parse_args()
    if args.stage == "candidates":
        candidates(args.directory, args.policy, args.scale)
    elif args.stage == "score":
        score(args.directory, args.name, args.model)
    elif args.stage == "compare":
        compare(args.directory, args.name, args.against)
    else:
        table(args.directory, args.output)


if __name__ == "__main__":
    main()
