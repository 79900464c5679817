"""
    python benchmarks/adaptive.py

What adaptive rollouts save, and what they do to labels: two OmegaPRM searches of the same mini problems, with 16 rollouts a
prefix and with `adaptive_rollouts`, and the error of each one's labels against 256 fresh rollouts of the same prefix. A
label is what `mm-prm rows` makes of it: all judged rollouts of the tree that pass through the prefix. Intervals are
bootstrapped over problems, in pairs.
"""

import argparse
import json
import random
from pathlib import Path
from statistics import mean

from mm_prm.annotation import AnnotationConfig, annotate
from mm_prm.annotation.protocols import RolloutRequest
from mm_prm.data.mini import generate_problems
from mm_prm.data.rows import step_counts
from mm_prm.embedded import model_path
from mm_prm.judges import RulesJudge
from mm_prm.policies.transformers import TransformersPolicy

_BOOTSTRAPS = 2000
_REFERENCE_SEED = 2**62


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_problems", type=int, default=40)
    parser.add_argument("--rollout_budget", type=int, default=160)
    parser.add_argument("--reference", type=int, default=256, help="fresh rollouts of each labelled prefix")
    parser.add_argument("--labels", type=int, default=4, help="labels of a tree that are checked, drawn at random")
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--device", default=None)
    parser.add_argument("--output_json", type=Path)
    args = parser.parse_args()
    policy = TransformersPolicy.from_pretrained(
        model_path("mini-policy"), device=args.device, batch_size=args.batch_size, max_new_tokens=192
    )
    judge = RulesJudge()
    problems = {problem["id"]: problem for problem in generate_problems("annotation", args.num_problems, 50_000)}
    trees, checked = {}, {}
    for name in ("fixed", "adaptive"):
        config = AnnotationConfig(rollout_budget=args.rollout_budget, adaptive_rollouts=name == "adaptive")
        trees[name] = {tree["problem_id"]: tree for tree in annotate(problems.values(), policy, judge, config)}
        checked[name] = {key: _labels(tree, args.labels) for key, tree in trees[name].items()}
    prefixes = sorted({(key, prefix) for of_name in checked.values() for key, of in of_name.items() for prefix in of})
    values = _reference(policy, judge, problems, prefixes, args.reference)

    errors = {
        name: {key: [abs(label - values[key, prefix]) for prefix, label in of.items()] for key, of in of_name.items()}
        for name, of_name in checked.items()
    }
    # The rollouts of the problem itself are the same for both and label no step.
    rollouts = {name: {key: tree["cost"]["rollouts"] - 16 for key, tree in of.items()} for name, of in trees.items()}
    nodes = {name: {key: len(tree["nodes"]) - 1 for key, tree in of.items()} for name, of in trees.items()}

    def error(keys: list[str], name: str) -> float:
        return mean([error for key in keys for error in errors[name][key]])

    def cost(keys: list[str], name: str) -> float:
        return sum(rollouts[name][key] for key in keys) / sum(nodes[name][key] for key in keys)

    useful = [key for key in problems if all(errors[name][key] for name in errors)]
    results = {
        "problems": len(useful),
        "checked labels": {name: sum(len(errors[name][key]) for key in useful) for name in errors},
        "rollouts a label, fixed": _interval(useful, lambda keys: cost(keys, "fixed")),
        "rollouts a label, adaptive": _interval(useful, lambda keys: cost(keys, "adaptive")),
        "times fewer": _interval(useful, lambda keys: cost(keys, "fixed") / cost(keys, "adaptive")),
        "mean absolute error, fixed": _interval(useful, lambda keys: error(keys, "fixed")),
        "mean absolute error, adaptive": _interval(useful, lambda keys: error(keys, "adaptive")),
        "error, adaptive - fixed": _interval(useful, lambda keys: error(keys, "adaptive") - error(keys, "fixed")),
    }
    for name, value in results.items():
        shown = f"{value[0]:.4f} [{value[1]:.4f}, {value[2]:.4f}]" if isinstance(value, tuple) else value
        print(f"{name:32} {shown}")
    if args.output_json:
        settings = {name: str(value) for name, value in vars(args).items()}
        args.output_json.write_text(json.dumps({"settings": settings, **results}, indent=2) + "\n")


def _labels(tree: dict, most: int) -> dict[tuple[str, ...], float]:
    """Some of the labels at measured prefixes."""
    counts = step_counts(tree, "pooled")
    prefixes: dict[int, tuple[str, ...]] = {-1: ()}
    for node in tree["nodes"]:
        prefixes[node["node_id"]] = prefixes[node["parent_id"]] + tuple(node["steps"])
    measured = [prefixes[node["node_id"]] for node in tree["nodes"][1:] if prefixes[node["node_id"]] in counts]
    chosen = random.Random(tree["problem_id"]).sample(measured, min(most, len(measured)))
    return {prefix: counts[prefix][0] / counts[prefix][1] for prefix in chosen}


def _reference(policy, judge, problems, prefixes, num_rollouts) -> dict[tuple[str, tuple[str, ...]], float]:
    values = {}
    for number, (key, prefix) in enumerate(prefixes):
        request = RolloutRequest(key, prefix, num_rollouts, _REFERENCE_SEED + number * 4096)
        (generation,) = policy.generate([(problems[key], request)])
        verdicts = [
            judge.judge(problems[key], [*prefix, *rollout.steps]).verdict
            for rollout in generation.rollouts
            if rollout.status == "finished"
        ]
        judged = [verdict == "right" for verdict in verdicts if verdict != "unknown"]
        values[key, prefix] = sum(judged) / max(1, len(judged))
    return values


def _interval(keys: list[str], statistic) -> tuple[float, float, float]:
    draw = random.Random(0)
    drawn = sorted(statistic(draw.choices(keys, k=len(keys))) for _ in range(_BOOTSTRAPS))
    return statistic(keys), drawn[int(0.025 * _BOOTSTRAPS)], drawn[int(0.975 * _BOOTSTRAPS)]


if __name__ == "__main__":
    main()
