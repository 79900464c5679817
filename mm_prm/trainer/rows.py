"""The rows that a trainer reads: checked one by one before training, and left out where they teach nothing."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute
from PIL import Image
from transformers.utils import logging

from ..data.features import RowError
from ..models import ProcessRewardProcessor

logger = logging.get_logger(__name__)

_COLUMNS = ("prompt", "completions", "labels")
_READ_AT_ONCE = 1000


class RowView:
    """
    The rows of a dataset that a trainer uses, each with its number in the whole dataset as `row_index`.

    Args:
        rows (`datasets.Dataset` or `Sequence[Mapping[str, Any]]`):
            The whole dataset.
        indices (`Sequence[int]`):
            Numbers of the rows to use.
    """

    def __init__(self, rows: datasets.Dataset | Sequence[Mapping[str, Any]], indices: Sequence[int]):
        self.rows = rows
        self.indices = list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        # Reading a batch at once is several times faster for Arrow tables
        numbers = [self.indices[index] for index in indices]
        if isinstance(self.rows, datasets.Dataset):
            rows = self.rows.__getitems__(numbers)
        else:
            rows = [dict(self.rows[number]) for number in numbers]
        return [{**row, "row_index": number} for row, number in zip(rows, numbers, strict=True)]

    def text_lengths(self) -> list[int]:
        """Characters of each row's question and steps."""
        lengths = [
            len(_question(row)) + sum(map(len, row["completions"])) for row in rows_without_images(self.rows)
        ]
        return [lengths[number] for number in self.indices]

    def trees(self) -> list[str]:
        """The tree of each row: its problem, or its question where the problem has no id."""
        trees = [row.get("problem_id") or _question(row) for row in rows_without_images(self.rows)]
        return [trees[number] for number in self.indices]


class BadRows:
    """
    Rows that cannot be used: the first one is an error, or all are left out and listed.

    Args:
        skip (`bool`):
            Whether they are left out.
    """

    def __init__(self, skip: bool):
        self.skip = skip
        self.errors: dict[int, RowError] = {}

    def refuse(self, index: int, error: RowError) -> None:
        """Raises the error of a row, or keeps its first one."""
        if not self.skip:
            raise error
        self.errors.setdefault(index, error)

    def report(self, num_rows: int, most_listed: int | None = None) -> None:
        """Logs which of how many rows are left out, and why: all of them, or the first few."""
        if not self.errors:
            return
        listed = [str(self.errors[index]) for index in sorted(self.errors)]
        more = len(listed) - len(listed[:most_listed])
        lines = "\n".join(listed[:most_listed]) + (f"\n… and {more} more" if more else "")
        logger.warning(f"{len(listed)} of {num_rows} rows are bad and are left out:\n{lines}")


def prepare_rows(
    rows: datasets.Dataset | Sequence[Mapping[str, Any]],
    processor: ProcessRewardProcessor,
    *,
    max_length: int | None = None,
    needs_num_judged: bool = False,
    skip_bad_rows: bool = False,
) -> RowView:
    """
    Checks every row and leaves out those without a label, and those that have none left within `max_length`.

    Args:
        rows (`datasets.Dataset` or `Sequence[Mapping[str, Any]]`):
            Rows with `prompt`, `completions`, `labels` and, for problems with pictures, `images`.
        processor ([`ProcessRewardProcessor`]):
            Processor that measures rows.
        max_length (`int`, *optional*):
            Longest sequence in tokens.
        needs_num_judged (`bool`, *optional*, defaults to `False`):
            Whether each label must have its number of judged rollouts.
        skip_bad_rows (`bool`, *optional*, defaults to `False`):
            Whether bad rows are left out, counted and listed.

    Raises:
        [`RowError`]: At the first bad row, naming row, field, value and what to do, unless `skip_bad_rows`.
    """
    if isinstance(rows, datasets.IterableDataset) or not hasattr(rows, "__len__"):
        raise TypeError(
            f"the dataset is a {type(rows).__name__}; rows are checked before training, so it must be a datasets.Dataset "
            "or a list of rows"
        )
    bad = BadRows(skip_bad_rows)
    check_images(rows, bad.refuse)
    if isinstance(rows, datasets.Dataset) and "images" in rows.column_names:
        # The processor decodes a picture once, however many rows of a batch show it
        rows = rows.cast_column("images", datasets.List(datasets.Image(decode=False)))
    usable, measured = [], []
    for index, row in enumerate(rows_without_images(rows)):
        try:
            _check_row(index, row, needs_num_judged)
        except RowError as error:
            bad.refuse(index, error)
        if index not in bad.errors:
            usable.append(index)
            measured.append(next((step for step, label in enumerate(row["labels"]) if label is not None), None))
    bad.report(len(rows))
    labelled = [index for index, first in zip(usable, measured, strict=True) if first is not None]
    first_steps = [first for first in measured if first is not None]
    _report(len(usable) - len(labelled), len(rows), "have no label")
    fitting = labelled
    if max_length is not None:
        view = RowView(rows, labelled)
        fitting = [
            labelled[number]
            for number, first in enumerate(first_steps)
            if _num_tokens(processor, view[number], first) <= max_length
        ]
        _report(len(labelled) - len(fitting), len(rows), f"have no label within max_length = {max_length} tokens")
    if not fitting:
        raise ValueError(f"none of the {len(rows)} rows has a label to train on or to compare with")
    return RowView(rows, fitting)


def to_problem(row: Mapping[str, Any]) -> dict[str, Any]:
    """The problem of a row, as the processor reads it."""
    return {"id": row.get("problem_id"), "question": _question(row), "images": row.get("images") or []}


def _question(row: Mapping[str, Any]) -> str:
    """The question of a bare prompt, or of a conversation that is one user turn."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return prompt
    content = prompt[0]["content"]
    if isinstance(content, str):
        return content
    return "".join("<image>" if part["type"] == "image" else part["text"] for part in content)


def check_prompt(prompt: Any) -> str | None:
    """What is wrong with a prompt, if anything."""
    if isinstance(prompt, str):
        return None if prompt.strip() else "must be the question as text"
    if not isinstance(prompt, list) or len(prompt) != 1 or not isinstance(prompt[0], Mapping):
        return "must be the question as text, or a conversation of one user turn"
    content = prompt[0].get("content")
    if prompt[0].get("role") != "user" or not isinstance(content, (str, list)) or not content:
        return "must be one user turn, {'role': 'user', 'content': text or a list of parts}"
    for part in content if isinstance(content, list) else []:
        is_text = part.get("type") == "text" and isinstance(part.get("text"), str)
        if not is_text and part.get("type") != "image":
            return f"has a part that is neither text nor image: {part}"
    return None


def _num_tokens(processor: ProcessRewardProcessor, row: Mapping[str, Any], last_step: int) -> int:
    return processor.num_tokens(to_problem(row), row["completions"][: last_step + 1])


def _report(dropped: int, total: int, reason: str) -> None:
    if dropped:
        logger.warning(f"{dropped} of {total} rows {reason} and are left out")


def rows_without_images(rows: datasets.Dataset | Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    if isinstance(rows, datasets.Dataset):
        columns = [column for column in rows.column_names if column != "images"]
        yield from rows.select_columns(columns)
    else:
        yield from rows


def check_images(
    rows: datasets.Dataset | Sequence[Mapping[str, Any]], refuse: Callable[[int, RowError], None]
) -> None:
    """Checks that all images are there. Nothing is decoded."""

    def check(index: int, number: int, image: Any) -> None:
        try:
            _check_image(index, number, image)
        except RowError as error:
            refuse(index, error)

    if not isinstance(rows, datasets.Dataset):
        for index, row in enumerate(rows):
            for number, image in enumerate(row.get("images") or []):
                if not isinstance(image, Image.Image):
                    check(index, number, image)
    elif "images" in rows.column_names:
        start = 0
        for batch in rows.select_columns(["images"]).with_format("arrow").iter(batch_size=_READ_AT_ONCE):
            column = batch["images"].combine_chunks()
            counts = pyarrow.compute.fill_null(pyarrow.compute.list_value_length(column), 0).to_pylist()
            images = column.flatten()
            # The bytes themselves stay in Arrow
            here = images.field("bytes").is_valid().to_pylist()
            paths = images.field("path").to_pylist()
            position = 0
            for offset, count in enumerate(counts):
                for number in range(count):
                    if not here[position + number]:
                        check(start + offset, number, {"bytes": None, "path": paths[position + number]})
                position += count
            start += len(counts)


def _check_image(index: int, number: int, image: Any) -> None:
    field = f"images[{number}]"
    if not isinstance(image, Mapping) or not (image.get("bytes") or image.get("path")):
        raise RowError("training", f"row {index}", field, image, "the image is missing; give a PIL image or its file")
    if not image.get("bytes") and not Path(image["path"]).is_file():
        raise RowError("training", f"row {index}", field, image["path"], "there is no such file")


def _check_row(index: int, row: Mapping[str, Any], needs_num_judged: bool) -> None:
    def fail(field: str, value: Any, advice: str) -> None:
        problem = row.get("problem_id")
        raise RowError("training", f"row {index}" + (f" ({problem!r})" if problem else ""), field, value, advice)

    for column in (*_COLUMNS, *(["num_judged"] if needs_num_judged else [])):
        if column not in row:
            fail(column, None, f"the dataset has no such column; it has {', '.join(row)}")
    prompt, steps, labels = (row[column] for column in _COLUMNS)
    wrong = check_prompt(prompt)
    if wrong is not None:
        fail("prompt", prompt, wrong)
    if not isinstance(steps, list) or not steps:
        fail("completions", steps, "must be a list of at least one step")
    for number, step in enumerate(steps):
        if not isinstance(step, str) or not step.strip():
            fail(f"completions[{number}]", step, "must be text that is not empty")
    if not isinstance(labels, list) or len(labels) != len(steps):
        fail(
            "labels", labels, f"must hold one label for each of the {len(steps)} completions, null where there is none"
        )
    for number, label in enumerate(labels):
        if label is None:
            continue
        if not isinstance(label, (bool, int, float)) or math.isnan(label):
            fail(f"labels[{number}]", label, "must be a number in [0, 1], true, false, or null for no label")
        if not 0 <= label <= 1:
            fail(f"labels[{number}]", label, "must be in [0, 1]")
        if needs_num_judged and not (len(row["num_judged"] or []) == len(steps) and row["num_judged"][number]):
            fail("num_judged", row["num_judged"], f"must hold a positive number for step {number}, which has a label")
