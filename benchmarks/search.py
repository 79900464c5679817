"""
    python benchmarks/search.py

OmegaPRM's search of one tree without a policy: answers come from a table that the first turn fills. Selection from
heaps against one that looks at every (node, wrong rollout) pair and adds up the visits of all nodes for each of them, as
the formula is written, over few searches; then the heaps alone over many.
"""

import math
import random
from dataclasses import replace
from functools import cache

from timing import compare, make_parser, report

from mm_prm.annotation.config import AnnotationConfig
from mm_prm.annotation.omegaprm import OmegaPRM
from mm_prm.annotation.protocols import Rollout
from mm_prm.annotation.tree import Node

NUM_STEPS = 8


class ExhaustiveOmegaPRM(OmegaPRM):
    """Selects by the formula: Q + U of every pair, with the sum of visits taken for each."""

    def _enter_pool(self, node: Node) -> None:
        """Nothing is kept ready."""

    def _select(self) -> bool:
        best = None
        for node_id, rollouts in self._wrong.items():
            node = self._tree.nodes[node_id]
            for negative_quality, text, _ in rollouts:
                visits = sum(other.visits for other in self._tree.nodes)
                score = negative_quality - self._config.c_puct * math.sqrt(visits) / (1 + node.visits)
                pair = (score, text, node_id, negative_quality)
                best = pair if best is None else min(best, pair)
        self._nodes_by_visits = {}
        if best is not None:
            _, text, node_id, negative_quality = best
            self._nodes_by_visits[self._tree.nodes[node_id].visits] = [(negative_quality, text, node_id)]
        return super()._select()


@cache
def write(prefix: tuple[str, ...], seed: int) -> tuple[Rollout, str]:
    """A rollout that takes a wrong step now and then, after which it ends wrong."""
    rng = random.Random(f"{seed} {prefix}")
    right = not any(step.startswith("wrong") for step in prefix)
    steps = []
    for _ in range(len(prefix), NUM_STEPS):
        right = right and rng.random() > 0.15
        steps.append(f"{'right' if right else 'wrong'} {rng.getrandbits(40):x}")
    return Rollout(tuple(steps), "finished", 40), "right" if right else "wrong"


def grow(search: OmegaPRM) -> dict:
    while not search.done:
        for request in search.requests():
            written = [write(request.prefix, request.seed + number) for number in range(request.num_rollouts)]
            search.receive(request, *zip(*written, strict=True))
    return search.to_row()


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--num_searches", type=int, default=2000)
    parser.add_argument("--num_exhaustive_searches", type=int, default=200, help="for the comparison (default: 200)")
    args = parser.parse_args()
    config = AnnotationConfig(max_search_count=args.num_searches, rollout_budget=10**9)
    short = replace(config, max_search_count=args.num_exhaustive_searches)
    if grow(OmegaPRM("tree", short)) != grow(ExhaustiveOmegaPRM("tree", short)):
        raise AssertionError("the two selections grow different trees")
    tables = [
        compare(
            args,
            {
                "every pair": lambda: grow(ExhaustiveOmegaPRM("tree", short)),
                "heaps": lambda: grow(OmegaPRM("tree", short)),
            },
            short.max_search_count,
            "searches",
            f"{short.max_search_count} searches",
        ),
        compare(
            args,
            {"heaps": lambda: grow(OmegaPRM("tree", config))},
            config.max_search_count,
            "searches",
            f"{config.max_search_count} searches",
        ),
    ]
    report(args, tables)


if __name__ == "__main__":
    main()
