"""
What both strategies share: the measured prefixes of one problem, the seeds and the budget of its requests, its row.

No I/O happens here: requests go out as plain data and judged rollouts come back.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mm_prm.annotation.adaptive import ROLLOUTS_AT_ONCE, is_decided, most_rollouts
from mm_prm.annotation.config import MAX_ROLLOUTS_PER_REQUEST, AnnotationConfig
from mm_prm.annotation.protocols import Rollout, RolloutRequest, VerdictValue

Steps = tuple[str, ...]

# Sample i of a request draws from seed + i, so a request owns a block of seeds; blocks of one size never overlap.
_SEED_BLOCK_BITS = MAX_ROLLOUTS_PER_REQUEST.bit_length() - 1


@dataclass
class Cost:
    """
    What a tree cost.

    Args:
        rollouts (`int`):
            Rollouts sampled.
        prompt_tokens (`int`):
            Tokens of the prompts, each request counted once.
        generated_tokens (`int`):
            Tokens generated.
        judge_calls (`int`):
            Solutions shown to the judge. Rollouts without a final answer are not, and equal rollouts of a request once.
        judge_cache_hits (`int`):
            Those of them whose verdict came out of a cache.
        seconds (`float`):
            This tree's share of the time: at every moment the trees that grow share it evenly.
    """

    rollouts: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    judge_calls: int = 0
    judge_cache_hits: int = 0
    seconds: float = 0.0


@dataclass
class Node:
    """
    A prefix of steps and the rollouts sampled from it.

    Args:
        node_id (`int`):
            Position in the order of measurement.
        parent_id (`int`):
            Node that the search came from; -1 at the root.
        prefix (`tuple[str, ...]`):
            All steps from the root.
        rollouts (`list[Rollout]`):
            Continuations sampled from the prefix.
        verdicts (`list[str]`):
            Their verdicts, one each.
        num_right (`int`):
            Rollouts judged right.
        num_judged (`int`):
            Rollouts that the judge could tell.
        visits (`int`):
            How often a wrong rollout of this node was selected.
    """

    node_id: int
    parent_id: int
    prefix: Steps
    rollouts: list[Rollout] = field(default_factory=list)
    verdicts: list[VerdictValue] = field(default_factory=list)
    num_right: int = 0
    num_judged: int = 0
    visits: int = 0


class SearchTree:
    """
    The measured prefixes of one problem.

    Args:
        problem_id (`str`):
            Problem that the tree belongs to.
        config ([`AnnotationConfig`]):
            Settings of the run.
    """

    def __init__(self, problem_id: str, config: AnnotationConfig):
        self.problem_id = problem_id
        self.config = config
        self.nodes: list[Node] = []
        self.num_requested = 0
        self._by_prefix: dict[Steps, Node] = {}
        # Right and judged rollouts that pass through a prefix, wherever they began; counted where somebody looks at it.
        self._passing: dict[Steps, list[int]] = {}
        self._outstanding: dict[int, RolloutRequest] = {}
        self._num_requests = 0
        self._seed_blocks: set[int] = set()

    @property
    def waiting(self) -> bool:
        """Whether a request has not been answered yet."""
        return bool(self._outstanding)

    def affords(self, num_rollouts: int) -> bool:
        """Whether the budget covers so many rollouts more."""
        return self.num_requested + num_rollouts <= self.config.rollout_budget

    def find(self, prefix: Steps) -> Node | None:
        """The node that measured exactly this prefix."""
        return self._by_prefix.get(prefix)

    def ask_for_value(self, prefix: Steps) -> RolloutRequest | None:
        """The next request for the value of a prefix; none where the value is decided, or the budget at its end."""
        config = self.config
        num_rollouts = config.num_rollouts
        if config.adaptive_rollouts:
            node = self.find(prefix)
            there = len(node.rollouts) if node is not None else 0
            num_right, num_judged = self._passing.get(prefix, (0, 0))
            most = most_rollouts(num_rollouts)
            if there >= most or (there and is_decided(num_right, num_judged, num_rollouts)):
                return None
            num_rollouts = min(ROLLOUTS_AT_ONCE, most - there)
        elif prefix in self._by_prefix and not config.ancestor_compatible:
            return None
        if not config.ancestor_compatible and not self.affords(num_rollouts):
            return None
        return self.ask(prefix, num_rollouts)

    def ask(self, prefix: Steps, num_rollouts: int) -> RolloutRequest:
        """Make a request out of a prefix; its rollouts count against the budget from now on."""
        seed = self._next_seed(prefix)
        request = RolloutRequest(self.problem_id, prefix, num_rollouts, seed)
        self._outstanding[seed] = request
        self.num_requested += num_rollouts
        return request

    def _next_seed(self, prefix: Steps) -> int:
        """A 63-bit seed whose block no other request of this tree has."""
        attempt = 0
        while True:
            identity = [self.config.seed, self.problem_id, prefix, self._num_requests, attempt]
            digest = hashlib.blake2b(json.dumps(identity).encode(), digest_size=8).digest()
            block = int.from_bytes(digest) >> (1 + _SEED_BLOCK_BITS)
            if block not in self._seed_blocks:
                self._seed_blocks.add(block)
                self._num_requests += 1
                return block << _SEED_BLOCK_BITS
            attempt += 1

    def receive(
        self,
        request: RolloutRequest,
        rollouts: Sequence[Rollout],
        verdicts: Sequence[VerdictValue],
        parent_id: int = -1,
    ) -> Node:
        """Turn the answer to a request into a node. `parent_id` is the node that the search came from."""
        if self._outstanding.get(request.seed) != request:
            raise ValueError(f"problem {self.problem_id!r}: nobody waits for an answer to {request}")
        if not len(rollouts) == len(verdicts) == request.num_rollouts:
            raise ValueError(
                f"problem {self.problem_id!r}: {request.num_rollouts} rollouts were asked for, but "
                f"{len(rollouts)} rollouts and {len(verdicts)} verdicts came back"
            )
        for number, rollout in enumerate(rollouts):
            if any(not step or step.isspace() or step[0].isspace() or step[-1].isspace() for step in rollout.steps):
                raise ValueError(
                    f"problem {self.problem_id!r}: rollout {number} has the steps {rollout.steps!r}: a step is "
                    "stripped and not empty"
                )
        del self._outstanding[request.seed]
        node = self.find(request.prefix) if self.config.adaptive_rollouts else None
        if node is None:
            node = self._add(Node(len(self.nodes), parent_id, request.prefix))
        node.rollouts += rollouts
        node.verdicts += verdicts
        node.num_right += sum(verdict == "right" for verdict in verdicts)
        if self.config.ancestor_compatible:
            node.num_judged += len(verdicts)
        else:
            node.num_judged += sum(verdict != "unknown" for verdict in verdicts)
        if self.config.adaptive_rollouts:
            self._count_passing(request.prefix, rollouts, verdicts)
        return node

    def _count_passing(self, prefix: Steps, rollouts: Sequence[Rollout], verdicts: Sequence[VerdictValue]) -> None:
        for rollout, verdict in zip(rollouts, verdicts, strict=True):
            if verdict != "unknown":
                for length in range(len(rollout.steps)):  # a whole solution is measured by its verdict
                    counts = self._passing.setdefault(prefix + rollout.steps[:length], [0, 0])
                    counts[0] += verdict == "right"
                    counts[1] += 1

    def add_answer(self, parent_id: int, prefix: Steps, right: bool) -> Node:
        """Add a whole solution, whose value is its verdict. Only the ancestor's trees have such nodes."""
        return self._add(Node(len(self.nodes), parent_id, prefix, num_right=int(right), num_judged=1))

    def _add(self, node: Node) -> Node:
        self.nodes.append(node)
        self._by_prefix.setdefault(node.prefix, node)
        return node

    def to_row(self, cost: Cost | None = None) -> dict[str, Any]:
        """
        The row of this tree, with the columns of `mm_prm.data.features.TREE_FEATURES`.

        Args:
            cost ([`Cost`], *optional*):
                What the tree cost; without it, only the rollouts are counted.
        """
        row = unfinished_row(self.problem_id, self.config, "complete", "", cost or Cost(rollouts=self.num_requested))
        if self.config.ancestor_compatible:
            linked = [(node, self.nodes[node.parent_id] if node.parent_id >= 0 else None) for node in self.nodes]
        else:
            linked = self._linked_by_prefix()
        new_ids = {node.node_id: number for number, (node, _) in enumerate(linked)}
        for node, parent in linked:
            row["nodes"].append(
                {
                    "node_id": new_ids[node.node_id],
                    "parent_id": -1 if parent is None else new_ids[parent.node_id],
                    "steps": list(node.prefix[len(parent.prefix) if parent else 0 :]),
                    "num_right": node.num_right,
                    "num_judged": node.num_judged,
                    "visits": node.visits,
                    "kind": "root" if parent is None else "measured",
                }
            )
            for rollout, verdict in zip(node.rollouts, node.verdicts, strict=True):
                row["rollouts"].append(
                    {
                        "node_id": new_ids[node.node_id],
                        "steps": list(rollout.steps),
                        "verdict": verdict,
                        "status": rollout.status,
                    }
                )
        return row

    def _linked_by_prefix(self) -> list[tuple[Node, Node | None]]:
        """Each node with its parent, the longest measured prefix of its own; parents come first."""
        linked: list[tuple[Node, Node | None]] = []
        # Not in the order of measurement, which for flat annotation is the order in which answers happened to come.
        for node in sorted(self.nodes, key=lambda node: (len(node.prefix), node.prefix)):
            shorter = (self.find(node.prefix[:length]) for length in range(len(node.prefix) - 1, -1, -1))
            linked.append((node, next((parent for parent in shorter if parent is not None), None)))
        return linked


def unfinished_row(
    problem_id: str, config: AnnotationConfig, status: str, reason: str, cost: Cost | None = None
) -> dict[str, Any]:
    """A tree row without nodes: what is left of a problem that was skipped or failed."""
    return {
        "problem_id": problem_id,
        "nodes": [],
        "rollouts": [],
        "strategy": config.strategy,
        "settings": json.dumps(config.tree_settings()),
        "cost": asdict(cost or Cost()),
        "status": status,
        "reason": reason,
    }
