"""What scorers share that hand whole solutions to somebody else: each solution once, its tokens, one score a step."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
from PIL import Image

Steps = tuple[str, ...]


def distinct_solutions(
    problems: Sequence[Mapping[str, Any]], candidates: Sequence[Sequence[Sequence[str]]]
) -> list[list[Steps]]:
    """
    Lists the solutions of each problem that have steps, each once.

    Args:
        problems (`Sequence[Mapping[str, Any]]`):
            Problem rows.
        candidates (`Sequence[Sequence[Sequence[str]]]`):
            For each problem the steps of each candidate.
    """
    if len(problems) != len(candidates):
        raise ValueError(f"{len(problems)} problems and {len(candidates)} lists of candidates; give one list each")
    for problem, solutions in zip(problems, candidates, strict=True):
        for number, steps in enumerate(solutions):
            if isinstance(steps, str):  # its letters would be taken for steps
                raise ValueError(
                    f"problem {problem.get('id')!r}: candidates[{number}] = {steps!r:.80}: must be the list of its steps"
                )
    return [list(dict.fromkeys(tuple(steps) for steps in solutions if steps)) for solutions in candidates]


def scores_of_candidates(
    scores: Sequence[Mapping[Steps, Sequence[float]]], candidates: Sequence[Sequence[Sequence[str]]]
) -> list[list[list[float]]]:
    """
    Gives every candidate the scores of its solution; `[]` to a candidate without steps.

    Args:
        scores (`Sequence[Mapping[tuple[str, ...], Sequence[float]]]`):
            For each problem the scores of its distinct solutions.
        candidates (`Sequence[Sequence[Sequence[str]]]`):
            For each problem the steps of each candidate.
    """
    return [
        [list(known[tuple(steps)]) if steps else [] for steps in solutions]
        for known, solutions in zip(scores, candidates, strict=True)
    ]


def rgb_images(problem: Mapping[str, Any]) -> list[Image.Image]:
    """The images of a problem in RGB, as every image processor takes them."""
    decoded = (
        image if isinstance(image, Image.Image) else datasets.Image().decode_example(image)
        for image in problem["images"]
    )
    return [image.convert("RGB") for image in decoded]


def check_token_ids(problem: Mapping[str, Any], expected: Sequence[int], found: Sequence[int], source: str) -> None:
    """
    Refuses an engine that reads a solution in other tokens than the model was trained with.

    Args:
        problem (`Mapping[str, Any]`):
            Problem row.
        expected (`Sequence[int]`):
            Token ids by the model's own processor.
        found (`Sequence[int]`):
            Token ids by the engine.
        source (`str`):
            What the engine is called in the message.
    """
    if list(found) == list(expected):
        return
    first = next(
        (place for place, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b),
        min(len(expected), len(found)),
    )
    raise ValueError(
        f"{source}: problem {problem['id']!r} becomes other tokens than by the model's processor ({len(found)} against "
        f"{len(expected)}, the first difference at token {first}): it has another model, chat template or image settings"
    )


def right_probabilities(problem: Mapping[str, Any], steps: Steps, rows: Any, source: str) -> list[float]:
    """
    Reads what an engine returned for a solution, and refuses what is not one pair of probabilities a step.

    Args:
        problem (`Mapping[str, Any]`):
            Problem row.
        steps (`tuple[str, ...]`):
            The solution.
        rows (`Any`):
            One row [P(wrong), P(right)] for each step, as nested lists.
        source (`str`):
            What the engine is called in the message.

    Returns:
        `list[float]`: P(right) of each step.
    """
    where = f"{source}: problem {problem['id']!r}"
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == 2 for row in rows):
        raise ValueError(
            f"{where}: expected one pair [wrong, right] a step, got {rows!s:.80}; start the engine as `mm-prm serve` does"
        )
    if len(rows) != len(steps):
        raise ValueError(
            f"{where}: {len(steps)} steps got {len(rows)} scores; the engine has to pool at the step token "
            "(tok_pooling_type STEP with the model's step_tag_id), as `mm-prm serve` starts it"
        )
    for number, row in enumerate(rows):
        if not (all(0 <= value <= 1 for value in row) and abs(sum(row) - 1) < 0.01):
            raise ValueError(f"{where}: step {number}: {row} are not the probabilities of wrong and right")
    return [row[1] for row in rows]
