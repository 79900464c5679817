"""The rows that a policy learns from: checked one by one before training, and made texts when their batch is formed."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import pyarrow.compute
from transformers import ProcessorMixin

from ..data.features import RowError
from ..data.text import clean_step
from ..policies.prompts import PromptBuilder
from ..policies.questions import decoded_images
from .rows import BadRows, check_images, check_prompt, rows_without_images, to_problem

_FEATURES = datasets.Features(
    {
        "problem_id": datasets.Value("string"),
        "prompt": datasets.Value("string"),
        "images": datasets.List(datasets.Image()),
        "completions": datasets.List(datasets.Value("string")),
    }
)
_MOST_LISTED = 20


def prepare_solutions(
    rows: datasets.Dataset | Sequence[Mapping[str, Any]],
    prompts: PromptBuilder,
    *,
    max_length: int | None = None,
    skip_bad_rows: bool = False,
) -> datasets.Dataset:
    """
    Checks every row, and gives those that can be used in the form that TRL's trainer takes.

    Args:
        rows (`datasets.Dataset` or `Sequence[Mapping[str, Any]]`):
            Rows with `prompt` (the question), `completions` (the steps) and, for problems with pictures, `images`.
        prompts ([`~mm_prm.policies.prompts.PromptBuilder`]):
            What makes the policy's prompts.
        max_length (`int`, *optional*):
            Longest sequence in tokens, images included.
        skip_bad_rows (`bool`, *optional*, defaults to `False`):
            Whether bad rows are left out, counted and listed.

    Returns:
        `datasets.Dataset`: For a vision-language model the texts `prompt` and `completion` with `images`, for a text-only
        one `input_ids` and `labels`; made when a row is read.

    Raises:
        [`RowError`]: At the first bad row, naming row, field, value and what to do, unless `skip_bad_rows`.
    """
    bad = BadRows(skip_bad_rows)
    check_images(rows, bad.refuse)
    for index, row in enumerate(rows_without_images(rows)):
        try:
            check_solution(index, row)
        except RowError as error:
            bad.refuse(index, error)
    examples = _Examples(prompts)
    usable = [index for index in range(len(rows)) if index not in bad.errors]
    dataset = _as_dataset(rows, usable)
    # Pictures are counted, and unpacked only where the length in tokens matters
    counted = zip(rows_without_images(dataset), _image_counts(dataset), strict=True)
    for number, (row, num_images) in enumerate(counted):
        try:
            examples.check(usable[number], row, num_images)
            if max_length is not None:
                examples.check_length(usable[number], dataset[number], max_length)
        except RowError as error:
            bad.refuse(usable[number], error)
    bad.report(len(rows), _MOST_LISTED)
    if len(bad.errors) == len(rows):
        raise ValueError(f"none of the {len(rows)} rows can be trained on")
    good = [number for number, index in enumerate(usable) if index not in bad.errors]
    return dataset.select(good).with_transform(examples)


def check_solution(index: int, row: Any) -> None:
    """
    Checks the fields of a row, its images aside.

    Args:
        index (`int`):
            Number of the row, to name it.
        row (`Mapping[str, Any]`):
            The row.

    Raises:
        [`RowError`]: If the question or the steps are not there.
    """
    if not isinstance(row, Mapping):
        raise _error(index, {}, "row", row, "must be a mapping of column names to values")
    for column in ("prompt", "completions"):
        if column not in row:
            raise _error(index, row, column, None, f"there is no such column; there are {', '.join(row)}")
    wrong = check_prompt(row["prompt"])
    if wrong is not None:
        raise _error(index, row, "prompt", row["prompt"], wrong)
    steps = row["completions"]
    if not isinstance(steps, list) or not steps:
        raise _error(index, row, "completions", steps, "must be a list of steps, the last of which states the answer")
    for number, step in enumerate(steps):
        if not isinstance(step, str) or not clean_step(step):
            raise _error(index, row, f"completions[{number}]", step, "must be text that is not empty")


class _Examples:
    """Makes texts, or tokens, of rows."""

    def __init__(self, prompts: PromptBuilder):
        self.prompts = prompts
        self.reads_images = isinstance(prompts.processor, ProcessorMixin)

    def check(self, index: int, row: Mapping[str, Any], num_images: int) -> None:
        """Raises [`RowError`] where a row cannot be made an example."""
        if num_images and not self.reads_images:
            advice = f"'{self.prompts.tokenizer.name_or_path}' reads text only: use a vision-language model"
            raise _error(index, row, "images", f"{num_images} images", advice)
        try:
            self.prompts.build_example({**to_problem(row), "images": [None] * num_images}, _steps(row))
        except ValueError as error:
            raise _error(index, row, "completions", row["completions"], str(error)) from error

    def check_length(self, index: int, row: Mapping[str, Any], max_length: int) -> None:
        """Raises [`RowError`] where a row is too long."""
        problem = to_problem(row)
        prompt, _ = self.prompts.build(problem, ())
        _, completion = self.prompts.build_example(problem, _steps(row))
        length = len(prompt) + len(self._tokens(completion))
        if length > max_length:
            advice = (
                f"the row has {length} tokens with its images, more than max_length = {max_length}; nothing is cut"
            )
            raise _error(index, row, "completions", row["completions"], advice)

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        problems = [to_problem(row) for row in rows]
        texts = [self.prompts.build_example(problem, _steps(row)) for problem, row in zip(problems, rows, strict=True)]
        if self.reads_images:
            return {
                "prompt": [prompt for prompt, _ in texts],
                "completion": [completion for _, completion in texts],
                "images": [decoded_images(problem) for problem in problems],
            }
        # The prompt ends where the policy begins to write, so the two are never tokenised together
        tokens = [(self._tokens(prompt), self._tokens(completion)) for prompt, completion in texts]
        return {
            "input_ids": [prompt + completion for prompt, completion in tokens],
            "labels": [[-100] * len(prompt) + completion for prompt, completion in tokens],
        }

    def _tokens(self, text: str) -> list[int]:
        return self.prompts.tokenizer(text, add_special_tokens=False)["input_ids"]


def _steps(row: Mapping[str, Any]) -> list[str]:
    return [clean_step(step) for step in row["completions"]]


def _as_dataset(rows: datasets.Dataset | Sequence[Mapping[str, Any]], usable: Sequence[int]) -> datasets.Dataset:
    if isinstance(rows, datasets.Dataset):
        rows = rows.select_columns([column for column in rows.column_names if column in _FEATURES]).select(usable)
        if "images" in rows.column_names and rows.features["images"] != _FEATURES["images"]:  # plain structs of a file
            rows = rows.cast_column("images", _FEATURES["images"])
        return rows
    chosen = [rows[index] for index in usable]
    columns = {
        "problem_id": [row.get("problem_id") for row in chosen],
        "prompt": [to_problem(row)["question"] for row in chosen],
        "images": [row.get("images") or [] for row in chosen],
        "completions": [row["completions"] for row in chosen],
    }
    return datasets.Dataset.from_dict(columns, features=_FEATURES)


def _image_counts(dataset: datasets.Dataset) -> list[int]:
    if "images" not in dataset.column_names:
        return [0] * len(dataset)
    column = dataset.select_columns(["images"]).with_format("arrow")["images"][:]
    return pyarrow.compute.fill_null(pyarrow.compute.list_value_length(column), 0).to_pylist()


def _error(index: int, row: Mapping[str, Any], field: str, value: Any, advice: str) -> RowError:
    problem = row.get("problem_id")
    return RowError("solution", f"row {index}" + (f" ({problem!r})" if problem else ""), field, value, advice)
