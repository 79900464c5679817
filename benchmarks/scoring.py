"""
    python benchmarks/scoring.py

Scores the candidates of mini problems: `Scorer` with what candidates share computed once, and with whole candidates in
large batches, against batches of 4 whole candidates of one problem. The weights are those of an untrained process
reward model; the time does not depend on them.
"""

from timing import compare, make_parser, report

from mm_prm.data.mini import problem
from mm_prm.embedded import model_path
from mm_prm.inference import Scorer
from mm_prm.models import create_process_reward_model

CANDIDATES_AT_ONCE = 4


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="mini-policy", help="embedded model, folder or Hub repository")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--num_problems", type=int, default=16)
    parser.add_argument("--num_candidates", type=int, default=16)
    args = parser.parse_args()
    model, processor = create_process_reward_model(model_path(args.model), dtype=args.dtype)
    model.to(args.device)
    problems = [problem("test", number) for number in range(args.num_problems)]
    rows = [one.row() for one in problems]
    candidates = []
    for one in problems:
        solutions = [one.solution(method, reads_first) for method in one.rates for reads_first in (False, True)]
        # A solution that occurs twice is scored once, so each gets an answer of its own.
        candidates.append(
            [
                [*solutions[number % len(solutions)][:-1], f"The answer is {number}."]
                for number in range(args.num_candidates)
            ]
        )
    shared = Scorer(model, processor)
    whole = Scorer(model, processor, share_prefix=False)

    def score_few_at_once() -> list[list[list[float]]]:
        return [
            [
                scores
                for start in range(0, args.num_candidates, CANDIDATES_AT_ONCE)
                for scores in whole.score([row], [solutions[start : start + CANDIDATES_AT_ONCE]])[0]
            ]
            for row, solutions in zip(rows, candidates, strict=True)
        ]

    variants = {
        f"whole, {CANDIDATES_AT_ONCE} at once": score_few_at_once,
        "whole, large batches": lambda: whole.score(rows, candidates),
        "shared prefix": lambda: shared.score(rows, candidates),
    }
    table = compare(args, variants, args.num_problems * args.num_candidates, "candidates")
    scores = [[step for solutions in run() for steps in solutions for step in steps] for run in variants.values()]
    differences = [abs(new - old) for others in scores[1:] for new, old in zip(others, scores[0], strict=True)]
    table["largest_difference"] = max(differences)
    print(f"largest difference of the scores: {max(differences):.1e}")
    report(args, [table])


if __name__ == "__main__":
    main()
