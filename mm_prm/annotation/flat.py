"""
Flat annotation, as VisualPRM (arXiv 2503.10291) does it: rollouts from every step prefix of a few sampled solutions.

The same rows, seeds and budget as [`OmegaPRM`], so that the two can be compared at equal rollouts.
"""

from collections.abc import Sequence
from typing import Any

from mm_prm.annotation.config import AnnotationConfig
from mm_prm.annotation.protocols import Rollout, RolloutRequest, VerdictValue
from mm_prm.annotation.tree import Cost, Node, SearchTree, Steps


class FlatRollouts:
    """
    The flat annotation of one problem.

    `flat_num_solutions` solutions are sampled; they also measure the root. Of the distinct ones, in the order of their
    seeds, right and wrong are taken in turn, as many of one kind as of the other and at most
    `flat_solutions_per_verdict` of each. Every proper step prefix of these gets `num_rollouts` rollouts, once where
    solutions share it. The final step needs none: its label is the solution's verdict, which is among the row's
    rollouts. Where the budget ends, the later prefixes of the last solutions stay without label.

    A problem whose solutions are all right, or all wrong, ends with its root, as an OmegaPRM search does: there is no
    step between right and wrong to be found.

    Args:
        problem_id (`str`):
            Problem to be annotated.
        config ([`AnnotationConfig`]):
            Settings of the run.
    """

    def __init__(self, problem_id: str, config: AnnotationConfig):
        self._config = config
        self._tree = SearchTree(problem_id, config)
        self._ready = [self._tree.ask((), config.flat_num_solutions)]
        self._measured: dict[Steps, RolloutRequest] = {}  # prefixes with their first requests

    @property
    def done(self) -> bool:
        """Whether there is nothing left to ask and nothing to wait for."""
        return not self._ready and not self._tree.waiting

    def requests(self) -> list[RolloutRequest]:
        """All requests that can be sent now: the root's at first, all others once it has been answered."""
        ready, self._ready = self._ready, []
        return ready

    def receive(self, request: RolloutRequest, rollouts: Sequence[Rollout], verdicts: Sequence[VerdictValue]) -> None:
        """
        Take back a request's rollouts; requests may be answered in any order.

        Args:
            request ([`RolloutRequest`]):
                A request that [`FlatRollouts.requests`] handed out.
            rollouts (`Sequence[Rollout]`):
                What the policy wrote.
            verdicts (`Sequence[str]`):
                What the judge says about each of them: `"right"`, `"wrong"` or `"unknown"`.
        """
        node = self._tree.receive(request, rollouts, verdicts)
        if not request.prefix:
            self._ready = self._measure_prefixes(node)
        elif self._config.adaptive_rollouts and not self._tree.waiting:
            # All prefixes have their answers of this round, so that which came first makes no difference.
            asked = (self._tree.ask_for_value(prefix) for prefix in self._measured)
            self._ready = [request for request in asked if request is not None]

    def to_row(self, cost: Cost | None = None) -> dict[str, Any]:
        """The tree's row, with the columns of `mm_prm.data.features.TREE_FEATURES`."""
        return self._tree.to_row(cost)

    def _measure_prefixes(self, root: Node) -> list[RolloutRequest]:
        requests = self._measured
        for solution in self._chosen_solutions(root):
            for length in range(1, len(solution)):
                prefix = solution[:length]
                if prefix in requests:
                    continue
                request = self._tree.ask_for_value(prefix)
                if request is None:
                    return list(requests.values())
                requests[prefix] = request
        return list(requests.values())

    def _chosen_solutions(self, root: Node) -> list[Steps]:
        """Right and wrong solutions in turn, right first."""
        solutions: dict[str, dict[Steps, None]] = {"right": {}, "wrong": {}, "unknown": {}}
        for rollout, verdict in zip(root.rollouts, root.verdicts, strict=True):
            solutions[verdict][rollout.steps] = None
        limit = self._config.flat_solutions_per_verdict
        pairs = list(zip(solutions["right"], solutions["wrong"], strict=False))[:limit]
        return [solution for pair in pairs for solution in pair]
