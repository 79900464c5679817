"""
    python benchmarks/guided_search.py --num_problems 200

Best-of-N, beam search and DVTS of the embedded policy under the embedded process reward model, each with the same budget
of generated tokens for a problem, on held-out problems of the mini world. Of what each found, the best score, the
majority and the weighted majority are taken. Intervals are by bootstrap over problems, and differences are paired.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from mm_prm.data.mini import generate_problems
from mm_prm.embedded import model_path
from mm_prm.inference import Scorer, SearchConfig, build_pools, search, select, vote
from mm_prm.judges import RulesJudge
from mm_prm.metrics.best_of_n.estimates import bootstrap_means, difference, estimate
from mm_prm.policies.transformers import TransformersPolicy

STRATEGIES = ("best_of_n", "beam_search", "dvts")
CHOICES = ("mean of the candidates", "majority", "best score", "weighted majority", "oracle")
BASELINE = "best_of_n, majority"
PROBLEMS_AT_ONCE = 100


def choose(pool: dict, aggregator: str) -> list[float]:
    """Accuracy of each of `CHOICES` on one problem; where nothing was found, each is wrong."""
    correct = [bool(right) for right in pool["correct"]]
    if not correct:
        return [0.0] * len(CHOICES)
    answers, scores = pool["answers"], pool["step_scores"]
    majority, weighted = vote(answers), vote(answers, scores, aggregator)
    best = select(pool["candidates"], scores, aggregator)
    return [
        float(np.mean(correct)),
        # Where no candidate has an answer, nothing is answered.
        float(any(answers) and correct[majority.index]),
        float(correct[best.index]),
        float(any(answers) and correct[weighted.index]),
        float(any(correct)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help=f"where to compute (default: {device})")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads on the CPU")
    parser.add_argument("--policy", default="mini-policy", help="embedded model, folder or Hub repository")
    parser.add_argument("--model", default="mini-prm", help="process reward model: embedded, folder or Hub repository")
    parser.add_argument("--split", default="test", help="split of the mini world (default: test)")
    parser.add_argument("--num_problems", type=int, default=50)
    parser.add_argument("--token_budgets", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--num_beams", type=int, default=16)
    parser.add_argument("--branching", type=int, default=4)
    parser.add_argument("--aggregator", default="min")
    parser.add_argument("--batch_size", type=int, default=256, help="rollouts computed at once (default: 256)")
    parser.add_argument("--num_resamples", type=int, default=2000)
    parser.add_argument("--output_json", type=Path, help="file to write the tables to as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    policy = TransformersPolicy.from_pretrained(
        model_path(args.policy), device=args.device, batch_size=args.batch_size, top_k=0, top_p=1.0
    )
    scorer = Scorer.from_pretrained(model_path(args.model), device=args.device)
    problems = list(generate_problems(args.split, args.num_problems))
    judge = RulesJudge()
    tables = []
    for budget in args.token_budgets:
        values: dict[str, list[float]] = {}
        searches = {}
        for strategy in STRATEGIES:
            config = SearchConfig(strategy, budget, args.num_beams, args.branching, args.aggregator)
            began = time.perf_counter()
            results = []
            for start in range(0, len(problems), PROBLEMS_AT_ONCE):
                results += search(problems[start : start + PROBLEMS_AT_ONCE], policy, scorer, config)
            searches[strategy] = {
                "seconds": time.perf_counter() - began,
                "candidates": float(np.mean([len(result.candidates) for result in results])),
                "problems_without_candidates": sum(not result.candidates for result in results),
                "generated_tokens": float(np.mean([result.generated_tokens for result in results])),
            }
            pools = build_pools(
                problems,
                [result.candidates for result in results],
                judge,
                [result.step_scores for result in results],
            )
            chosen = np.array([choose(pool, args.aggregator) for pool in pools])
            values |= {f"{strategy}, {name}": chosen[:, column] for column, name in enumerate(CHOICES)}
        names = list(values)
        table = np.stack([np.asarray(column) for column in values.values()], axis=1)
        means = bootstrap_means(table, args.num_resamples)
        baseline = names.index(BASELINE)
        methods = {
            name: estimate(table[:, column], means[:, column])
            | {
                f"minus {BASELINE}": difference(
                    table[:, column] - table[:, baseline], means[:, column] - means[:, baseline]
                )
            }
            for column, name in enumerate(names)
        }
        tables.append({"token_budget": budget, "searches": searches, "methods": methods})
        show(tables[-1], len(problems))
    if args.output_json is not None:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        args.output_json.write_text(json.dumps({"settings": settings, "tables": tables}, indent=2) + "\n")


def show(table: dict, num_problems: int) -> None:
    print(f"\n{num_problems} problems, {table['token_budget']} generated tokens each; in percent [95 %]")
    for name, row in table["searches"].items():
        print(
            f"{name:12} {row['candidates']:5.1f} candidates and {row['generated_tokens']:6.0f} tokens a problem, "
            f"{row['problems_without_candidates']} problems without candidates, {row['seconds']:.0f} s"
        )
    width = max(map(len, table["methods"]))
    print(f"{'':{width}}  {'accuracy':>19}  {'minus ' + BASELINE:>30}")
    for name, row in table["methods"].items():
        gap = row[f"minus {BASELINE}"]
        shown = "" if name == BASELINE else f"{spread(gap)}  p = {gap['p_value']:.3f}"
        print(f"{name:{width}}  {spread(row):>19}  {shown:>30}")


def spread(value: dict) -> str:
    return f"{100 * value['value']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


if __name__ == "__main__":
    main()
