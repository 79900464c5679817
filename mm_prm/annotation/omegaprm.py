r"""
OmegaPRM (arXiv 2406.06592, as MM-PRM uses it): find the first wrong step of wrong rollouts by binary search.

A pure state machine: it hands out requests and takes back judged rollouts, so that it is tested without a model and
driven alone or by the hundred.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mm_prm.annotation.config import AnnotationConfig
from mm_prm.annotation.protocols import Rollout, RolloutRequest, VerdictValue
from mm_prm.annotation.tree import Cost, Node, SearchTree, Steps


@dataclass
class _Bisection:
    """The first wrong step of `start + steps` is one of `steps[left:right + 1]`, or the one after them."""

    node: Node
    start: Steps
    steps: Steps
    left: int
    right: int

    @property
    def middle(self) -> int:
        return (self.left + self.right) // 2


class OmegaPRM:
    r"""
    The search of one problem.

    The root gets `num_rollouts` rollouts. Then, again and again, the (node, wrong rollout) pair with the highest
    \\( Q + U \\) is taken out of the pool,

    $$ Q = \alpha^{1 - MC} \cdot \beta^{words / L}, \qquad U = c_{puct} \frac{\sqrt{\sum visits}}{1 + visits}, $$

    where MC and visits are the node's and words are counted in the rollout, and the rollout is searched for its first
    wrong step: a prefix that can still come right (MC > 0) moves the search to the steps after it, one that cannot
    (MC = 0) to the steps before. Each probed prefix becomes a node. A node that can come right puts its wrong
    rollouts into the pool. The search ends after `max_search_count` rollouts, when the budget does not cover another
    request, or when the pool is empty. Equal scores are told apart by the rollout's text.

    `ancestor_compatible` reproduces MM-PRM's own search. The default differs from it in these points, and only in
    these:

    1. *Unknown is not wrong.* A rollout without a verdict counts neither for nor against its prefix and is not
       searched. Where no rollout of a prefix has a verdict, the search of the rollout that led there ends. (The
       ancestor counts a rollout without an answer, or with a judge that failed, as wrong, and searches it.)
    2. *The budget holds.* No request goes out that the budget does not cover. (The ancestor looks at the budget
       between searches only and exceeds it by up to a search.)
    3. *A wrong rollout of one step is not searched*: that step is the wrong one and there is nothing to sample. (The
       ancestor spends a search and a visit on it.)
    4. *A prefix is measured once.* A search that comes to a prefix measured before takes its value. (The ancestor
       samples it again, into a second node with another label for the same steps.)
    5. *Parents are prefixes.* In the row, a node's parent is the longest measured prefix of its own, so that a
       solution's path passes every label on it; and each label belongs to the node's last step only. (The ancestor
       hangs a node below the last prefix that could come right, beside shorter ones that could not, and trains on
       one label for all the steps that the node holds.)
    6. *Whole solutions are not nodes.* They stand among the row's rollouts with their verdicts, which are the labels
       of the final steps. (The ancestor adds each right rollout as a node of value 1, and the rest of a rollout whose
       last step is the wrong one as a node of value 0. Its trees come out with those nodes, of one verdict each.)

    Selection costs the same at any size of the tree, and changes none: each search visits one node, so the sum of
    visits is the number of searches, and among nodes of equal visits U is equal, so that each stands once in a heap of
    these nodes, by the Q of its best rollout.

    Args:
        problem_id (`str`):
            Problem to be searched.
        config ([`AnnotationConfig`]):
            Settings of the run.
    """

    def __init__(self, problem_id: str, config: AnnotationConfig):
        self._config = config
        self._tree = SearchTree(problem_id, config)
        self._search_count = 0
        self._bisection: _Bisection | None = None
        # Wrong rollouts of each node by falling Q; nodes by their best one, under their number of visits.
        self._wrong: dict[int, list[tuple[float, str, Steps]]] = {}
        self._nodes_by_visits: dict[int, list[tuple[float, str, int]]] = {}
        self._next: RolloutRequest | None = self._tree.ask((), config.num_rollouts)

    @property
    def done(self) -> bool:
        """Whether there is nothing left to ask and nothing to wait for."""
        return self._next is None and not self._tree.waiting

    @property
    def search_count(self) -> int:
        """Number of wrong rollouts searched so far."""
        return self._search_count

    def requests(self) -> list[RolloutRequest]:
        """The request that can be sent now; none while its answer is awaited, or at the end."""
        request, self._next = self._next, None
        return [request] if request is not None else []

    def receive(self, request: RolloutRequest, rollouts: Sequence[Rollout], verdicts: Sequence[VerdictValue]) -> None:
        """
        Take back a request's rollouts and go on to the next request.

        Args:
            request ([`RolloutRequest`]):
                The request that [`OmegaPRM.requests`] handed out.
            rollouts (`Sequence[Rollout]`):
                What the policy wrote.
            verdicts (`Sequence[str]`):
                What the judge says about each of them: `"right"`, `"wrong"` or `"unknown"`.
        """
        bisection = self._bisection
        node = self._tree.receive(request, rollouts, verdicts, bisection.node.node_id if bisection else -1)
        if self._config.adaptive_rollouts and bisection is not None:
            self._next = self._tree.ask_for_value(node.prefix)
            if self._next is not None:
                return
        self._fill_pool(node)
        if bisection is not None:
            self._narrow(bisection, node)
        self._advance()

    def to_row(self, cost: Cost | None = None) -> dict[str, Any]:
        """The tree's row, with the columns of `mm_prm.data.features.TREE_FEATURES`."""
        return self._tree.to_row(cost)

    def _fill_pool(self, node: Node) -> None:
        compatible = self._config.ancestor_compatible
        if compatible:
            right = (r.steps for r, v in zip(node.rollouts, node.verdicts, strict=True) if v == "right")
            for steps in dict.fromkeys(right):
                self._tree.add_answer(node.node_id, node.prefix + steps, right=True)
        if node.num_right == 0:
            return
        wrong: dict[Steps, None] = {}  # each text once: searching it again would ask for the same prefixes
        for rollout, verdict in zip(node.rollouts, node.verdicts, strict=True):
            searchable = verdict != "right" if compatible else verdict == "wrong" and len(rollout.steps) > 1
            if searchable:
                wrong[rollout.steps] = None
        alpha, beta = self._config.alpha, self._config.beta
        mc_value = node.num_right / node.num_judged
        scored = []
        for steps in wrong:
            words = sum(len(step.split()) for step in steps)
            quality = alpha ** (1 - mc_value) * beta ** (words / self._config.length_scale)
            scored.append((-quality, "\n".join(steps), steps))
        if scored:
            self._wrong[node.node_id] = sorted(scored, reverse=True)
            self._enter_pool(node)

    def _enter_pool(self, node: Node) -> None:
        negative_quality, text, _ = self._wrong[node.node_id][-1]
        heapq.heappush(self._nodes_by_visits.setdefault(node.visits, []), (negative_quality, text, node.node_id))

    def _select(self) -> bool:
        """Take the pair with the highest Q + U out of the pool and begin its search."""
        config = self._config
        if self._search_count >= config.max_search_count:
            return False
        if config.ancestor_compatible and self._tree.num_requested >= config.rollout_budget:
            return False
        # Every search visits one node, so the sum of visits is the number of searches.
        exploration = config.c_puct * math.sqrt(self._search_count)
        best = None
        for visits, heap in self._nodes_by_visits.items():
            if heap:
                negative_quality, text, node_id = heap[0]
                candidate = (negative_quality - exploration / (1 + visits), text, node_id, visits)
                best = candidate if best is None else min(best, candidate)
        if best is None:
            return False
        _, _, node_id, visits = best
        heapq.heappop(self._nodes_by_visits[visits])
        node = self._tree.nodes[node_id]
        steps = self._wrong[node_id].pop()[2]
        self._search_count += 1
        node.visits += 1
        if self._wrong[node_id]:
            self._enter_pool(node)
        else:
            del self._wrong[node_id]
        self._bisection = _Bisection(node, node.prefix, steps, 0, len(steps) - 1)
        return True

    def _advance(self) -> None:
        """Go on until a prefix has to be measured or nothing is left to search."""
        config = self._config
        while self._bisection is not None or self._select():
            bisection = self._bisection
            assert bisection is not None
            if bisection.left > bisection.right:
                self._bisection = None
                continue
            if bisection.middle == len(bisection.steps) - 1:
                # All steps but the last can come right: the last one is wrong, and nothing can be sampled after it.
                if config.ancestor_compatible:
                    self._tree.add_answer(bisection.node.node_id, bisection.start + bisection.steps, right=False)
                self._bisection = None
                continue
            prefix = bisection.start + bisection.steps[: bisection.middle + 1]
            known = None if config.ancestor_compatible else self._tree.find(prefix)
            if known is None:
                self._next = self._tree.ask_for_value(prefix)
                return
            self._narrow(bisection, known)

    def _narrow(self, bisection: _Bisection, node: Node) -> None:
        """Go to the half that holds the first wrong step, by what the prefix in the middle is worth."""
        if node.num_judged == 0:
            self._bisection = None
        elif node.num_right > 0:
            bisection.node = node
            bisection.left = bisection.middle + 1
        else:
            bisection.right = bisection.middle - 1
