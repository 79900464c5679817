"""Exact step correctness in the mini world."""

import re
from collections.abc import Sequence
from fractions import Fraction

from .mini import MiniProblem
from .mini_expressions import COMPUTE, Expression, expand

_NUMBER = r"(-?\d+(?:\.\d+)?)"
_PATTERNS = {
    "sum": re.compile(rf"{_NUMBER} \+ {_NUMBER} = {_NUMBER}\."),
    "minus": re.compile(rf"{_NUMBER} - {_NUMBER} = {_NUMBER}\."),
    "times": re.compile(rf"{_NUMBER} \* {_NUMBER} = {_NUMBER}\."),
    "half": re.compile(rf"half of {_NUMBER} is {_NUMBER}\."),
    "twice": re.compile(rf"twice {_NUMBER} is {_NUMBER}\."),
    "larger": re.compile(rf"the larger of {_NUMBER} and {_NUMBER} is {_NUMBER}\."),
    "smaller": re.compile(rf"the smaller of {_NUMBER} and {_NUMBER} is {_NUMBER}\."),
}
_FRACTION_STEP = re.compile(rf"{_NUMBER} of {_NUMBER} is (\d+)/(\d+)\.")
_OPTION_STEP = re.compile(rf"{_NUMBER} is option ([A-E])\.")
_ANSWER_STEP = re.compile(r"The answer is (.+)\.")
_READING = re.compile(r"(.+) is (\d+)")


class UnparsableStep(ValueError):
    """A step that is not in the language of the mini world."""


class _Node:
    """One operation of the right solution: what it still waits for, and its value."""

    def __init__(self, kind: str, operands: list["_Node | Fraction"]):
        self.kind, self.operands, self.done = kind, operands, False
        values: list[Fraction] = [operand.value if isinstance(operand, _Node) else operand for operand in operands]
        self.value: Fraction = sum(values, Fraction(0)) if kind == "sum" else Fraction(COMPUTE[kind](*values))
        self.pending = list(values)

    def ready(self) -> bool:
        return not self.done and all(not isinstance(operand, _Node) or operand.done for operand in self.operands)

    def accept(self, operands: list[Fraction]) -> bool:
        """Takes a step with these operands, in any order where the operation has none."""
        if not self.ready():
            return False
        if self.kind == "sum":  # any two of the terms that are left may be added next
            rest = list(self.pending)
            for operand in operands:
                if operand not in rest:
                    return False
                rest.remove(operand)
            self.pending = [*rest, sum(operands, Fraction(0))]
            self.done = len(self.pending) == 1
            return True
        ordered = self.kind in ("minus", "half", "twice", "fraction")
        self.done = operands == self.pending if ordered else sorted(operands) == sorted(self.pending)
        return self.done


def check_steps(mini_problem: MiniProblem, steps: Sequence[str]) -> list[bool]:
    """Says of every step whether the solution is still right after it.

    A step is right when it is true of the picture, its arithmetic is right and a right solution needs it: it reads a
    quantity that the question asks for, computes one of the question's operations from values already there (in any
    order that arithmetic allows), or states the gold answer. From the first wrong step on every step is wrong.

    Args:
        mini_problem ([`MiniProblem`]):
            The problem.
        steps (`Sequence[str]`):
            The steps of a solution, the last of which states the answer.

    Returns:
        `list[bool]`: one value a step.

    Raises:
        [`UnparsableStep`]: if a step is not in the language of this world.
    """
    expression = expand(mini_problem.type.expression, mini_problem.scene)
    nodes: list[_Node] = []
    needed: set[str] = set()

    def build(e: Expression) -> _Node | Fraction:
        if e[0] == "read":
            needed.add(e[1])
            return Fraction(mini_problem.scene.values[e[1]])
        if e[0] == "number":
            return Fraction(e[1])
        node = _Node(e[0], [build(part) for part in e[1:]])
        nodes.append(node)
        return node

    root = build(expression)
    gold = root.value if isinstance(root, _Node) else root
    right, result = True, []
    for step in steps:
        right = _is_right(step, mini_problem, nodes, needed, gold) and right
        result.append(right)
    return result


def _is_right(step: str, mini_problem: MiniProblem, nodes: list[_Node], needed: set[str], gold: Fraction) -> bool:
    if match := _ANSWER_STEP.fullmatch(step):
        if mini_problem.choices:
            return match[1] == mini_problem.answer
        try:
            return Fraction(match[1]) == gold
        except (ValueError, ZeroDivisionError):
            raise UnparsableStep(f"problem {mini_problem.id!r}: no number in the answer {step!r}") from None
    if match := _OPTION_STEP.fullmatch(step):
        place = "ABCDE".index(match[2])
        chosen = mini_problem.choices[place] if place < len(mini_problem.choices) else None
        return chosen == match[1] and Fraction(match[1]) == gold
    if match := _FRACTION_STEP.fullmatch(step):
        operands = [Fraction(match[1]), Fraction(match[2])]
        true = match[1] == match[3] and match[2] == match[4]
        return true and any(node.kind == "fraction" and node.accept(operands) for node in nodes)
    for kind, pattern in _PATTERNS.items():
        if match := pattern.fullmatch(step):
            *operands, value = map(Fraction, match.groups())
            true = value == (sum(operands) if kind == "sum" else COMPUTE[kind](*operands))
            return true and any(node.kind == kind and node.accept(operands) for node in nodes)
    readings = [_READING.fullmatch(part) for part in step.removesuffix(".").split(", ")]
    if not step.endswith(".") or not all(match and match[1] in mini_problem.scene.values for match in readings):
        raise UnparsableStep(f"problem {mini_problem.id!r}: cannot parse the step {step!r}")
    return all(
        match[1] in needed and mini_problem.scene.values[match[1]] == int(match[2]) for match in readings if match
    )
