"""From the files of a benchmark to problem rows: what all benchmarks share."""

import hashlib
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub

from ..features import PROBLEM_FEATURES, RowError
from ..images import DEFAULT_MAX_IMAGE_BYTES, DEFAULT_MAX_IMAGE_PIXELS, ImageError, read_image
from ..problem_files import ProblemFileError, read_rows, to_problem
from ..text import normalize_image_markers

_SUFFIXES = (".parquet", ".json", ".jsonl")
# Names that splits have on the Hub: a folder with one of them in it holds more than what is measured.
_SPLITS = ("train", "validation", "val", "dev", "test", "testmini")
_IMAGE_LIMITS = {"max_image_bytes": DEFAULT_MAX_IMAGE_BYTES, "max_image_pixels": DEFAULT_MAX_IMAGE_PIXELS}

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """
    One benchmark.

    Args:
        name (`str`):
            Its name here.
        hub_id (`str`):
            Its data set on the Hub.
        splits (`tuple[str, ...]`):
            Splits that are measured.
        columns (`tuple[str, ...]`):
            Columns that its rows must have; `a|b` is one of the two.
        to_row (`Callable[[Mapping], dict]`):
            A row → `id, question, answer, choices, images, source, subject`, and perhaps `tolerance`: how far a numerical
            answer may lie from the gold answer. Where steps are labelled: `question, images, steps`, and `first_error`
            or `step_labels`, and perhaps `subset`, which is the split otherwise.
        answer_rule (`str`):
            How answers are checked, for readers.
        license (`str`):
            Licence, as its card states it.
        config (`str`, *optional*):
            Configuration on the Hub.
        files (`tuple[str, ...]`, *optional*, defaults to `()`):
            Files to take from the Hub where `load_dataset` cannot read the repository.
        paper (`Mapping[str, float]`, *optional*):
            Figures of the MM-PRM paper in percent, to compare with.
    """

    name: str
    hub_id: str
    splits: tuple[str, ...]
    columns: tuple[str, ...]
    to_row: Callable[[Row], dict[str, Any]]
    answer_rule: str
    license: str
    config: str | None = None
    files: tuple[str, ...] = ()
    paper: Mapping[str, float] = field(default_factory=dict)


@dataclass
class LoadedBenchmark:
    """
    The rows of a benchmark.

    Args:
        benchmark ([`Benchmark`]):
            What it is.
        problems (`datasets.Dataset`):
            Problem rows. Those of solutions with labelled steps have no gold answer.
        tolerances (`dict[str, float]`):
            For some problems, how far a numerical answer may lie from the gold answer.
        solutions (`list[dict]`):
            Where steps are labelled: `problem_id, steps, subset`, and `first_error` or `step_labels`.
        left_out (`list[dict[str, str]]`):
            `id` and `reason` of each row that could not be used.
    """

    benchmark: Benchmark
    problems: datasets.Dataset
    tolerances: dict[str, float]
    solutions: list[dict[str, Any]]
    left_out: list[dict[str, str]]


def load_rows(benchmark: Benchmark, path: str | None, *, on_bad_row: str, limit: int | None) -> LoadedBenchmark:
    """See [`load_benchmark`]."""
    problems: dict[str, dict[str, Any]] = {}
    tolerances: dict[str, float] = {}
    solutions: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []
    source = _HubSource(benchmark) if path is None else _LocalSource(benchmark, Path(path).expanduser())
    for split in benchmark.splits:
        for number, (place, row) in enumerate(source.rows(split)):
            if number == limit:
                break
            if number == 0:
                _check_columns(benchmark, row, f"{benchmark.name}: {place}")
            try:
                fields = benchmark.to_row(row)
                fields["images"] = [source.image(image) for image in fields["images"]]
                if "steps" in fields:
                    problem = _problem_of_solution(fields, benchmark, place, source.root)
                    solutions.append(_solution(fields, problem["id"], split, place))
                    problems.setdefault(problem["id"], problem)
                    continue
                tolerance = fields.pop("tolerance", None)
                problem = to_problem(fields, place, "", image_root=str(source.root), **_IMAGE_LIMITS)
                if problem["id"] in problems:
                    raise RowError("problem", f"row {place}", "id", problem["id"], "used by an earlier row already")
                problems[problem["id"]] = problem
                if tolerance is not None:
                    tolerances[problem["id"]] = tolerance
            except (RowError, ImageError) as error:
                if on_bad_row == "raise":
                    raise
                left_out.append({"id": f"row {place}", "reason": str(error)})
    if not problems:
        raise ProblemFileError(f"{benchmark.name}: there are no rows that can be used in {source.name}")
    table = datasets.Dataset.from_list(list(problems.values()), features=PROBLEM_FEATURES)
    return LoadedBenchmark(benchmark, table, tolerances, solutions, left_out)


def _check_columns(benchmark: Benchmark, row: Row, place: str) -> None:
    for column in benchmark.columns:
        if not any(name in row for name in column.split("|")):
            named = " or ".join(map(repr, column.split("|")))
            raise ProblemFileError(f"{place}: column {named} is missing; there are {', '.join(row)}")


class _HubSource:
    """Rows as the Hub has them."""

    root = Path("/nonexistent")  # pictures are embedded, or in an archive

    def __init__(self, benchmark: Benchmark):
        self.benchmark, self.name = benchmark, benchmark.hub_id
        self.archive: _Archive | None = None

    def rows(self, split: str) -> Iterator[tuple[str, Row]]:
        benchmark = self.benchmark
        if benchmark.files:
            files = [
                huggingface_hub.hf_hub_download(benchmark.hub_id, file, repo_type="dataset")
                for file in benchmark.files
            ]
            self.archive = next((_Archive(Path(file)) for file in files if file.endswith(".zip")), None)
            yield from read_rows(next(file for file in files if not file.endswith(".zip")))
        else:
            dataset = datasets.load_dataset(benchmark.hub_id, benchmark.config, split=split)
            yield from _dataset_rows(dataset, f"{benchmark.hub_id}, {split}")

    def image(self, image: Any) -> Any:
        return image if self.archive is None else self.archive.image(image)


class _LocalSource:
    """Rows of a local copy: a file, or a folder whose files open with the names of the splits."""

    def __init__(self, benchmark: Benchmark, path: Path):
        if not path.exists():
            raise ProblemFileError(f"{path}: there is no such file or folder")
        self.benchmark, self.path, self.name = benchmark, path, str(path)
        self.root = path if path.is_dir() else path.parent
        self.archive = _Archive(self.root / "images.zip") if (self.root / "images.zip").is_file() else None

    def rows(self, split: str) -> Iterator[tuple[str, Row]]:
        files = [self.path]
        if self.path.is_dir():
            files = sorted(file for file in self.path.iterdir() if file.suffix in _SUFFIXES)
            if any(_opens_with(file, *_SPLITS, *self.benchmark.splits) for file in files):
                files = [file for file in files if _opens_with(file, split)]
        elif len(self.benchmark.splits) > 1 and not _opens_with(self.path, split):
            return
        for file in files:
            if file.suffix == ".parquet":
                yield from _dataset_rows(datasets.Dataset.from_parquet(str(file)), file.name)
            else:
                yield from read_rows(str(file))

    def image(self, image: Any) -> Any:
        return self.archive.image(image) if self.archive is not None and isinstance(image, str) else image


def _opens_with(file: Path, *splits: str) -> bool:
    """Whether the name of a file opens with the name of a split: `test-00000-of-00001`, but not `testmini`."""
    return re.match(rf"({'|'.join(map(re.escape, splits))})(?![A-Za-z0-9])", file.name) is not None


class _Archive:
    """Pictures in a zip file, found by their path or by its end."""

    def __init__(self, path: Path):
        self.path, self.file = path, zipfile.ZipFile(path)
        self.names = self.file.namelist()

    def image(self, path: str) -> dict[str, Any]:
        found = path if path in self.names else [name for name in self.names if name.endswith(f"/{path}")]
        if isinstance(found, list):
            if len(found) != 1:
                reason = (
                    f"is in {self.path.name} {len(found)} times, which holds for example {', '.join(self.names[:3])}"
                )
                raise ImageError(path, path, reason)
            found = found[0]
        if self.file.getinfo(found).file_size > DEFAULT_MAX_IMAGE_BYTES:
            raise ImageError(path, path, "is larger than any picture should be")
        return {"bytes": self.file.read(found), "path": path}


def _dataset_rows(dataset: datasets.Dataset, name: str) -> Iterator[tuple[str, Row]]:
    number = 0
    for batch in dataset.with_format("arrow").iter(batch_size=16):  # pictures stay as they are stored
        for row in batch.to_pylist():
            yield f"{number} of {name}", row
            number += 1


def _problem_of_solution(fields: Row, benchmark: Benchmark, place: str, root: Path) -> dict[str, Any]:
    """The problem of a solution whose steps are labelled; solutions of one problem get the same id."""
    if not isinstance(fields["question"], str) or not fields["question"].strip():
        raise RowError("problem", f"row {place}", "question", fields["question"], "must be text")
    images = fields["images"]
    digest = hashlib.sha256(fields["question"].encode())
    for image in images:
        digest.update(repr(image).encode())
    problem_id = f"{benchmark.name}-{digest.hexdigest()[:16]}"
    question, order = normalize_image_markers(fields["question"].strip(), len(images))
    return {
        "id": problem_id,
        "images": [read_image(problem_id, images[index], root) for index in order],
        "question": question,
        "answer": "",
        "choices": [],
        "answer_type": "",
        "source": benchmark.hub_id,
        "subject": "",
    }


def _solution(fields: Row, problem_id: str, split: str, place: str) -> dict[str, Any]:
    steps: Sequence[Any] = fields["steps"]
    if not isinstance(steps, list) or not steps or not all(isinstance(step, str) and step.strip() for step in steps):
        raise RowError("pool", f"row {place}", "steps", steps, "must be a list of steps, none of them empty")
    solution = {
        "problem_id": problem_id,
        "steps": [step.strip() for step in steps],
        "subset": fields.get("subset", split),
    }
    if "first_error" in fields:
        first_error = fields["first_error"]
        if not isinstance(first_error, int) or not -1 <= first_error < len(steps):
            advice = f"must be -1 or the index of one of the {len(steps)} steps"
            raise RowError("pool", f"row {place}", "first_error", first_error, advice)
        return solution | {"first_error": first_error}
    labels = fields["step_labels"]
    if not isinstance(labels, list) or len(labels) != len(steps) or not set(labels) <= {-1, 0, 1}:
        raise RowError(
            "pool", f"row {place}", "step_labels", labels, f"must be 1, 0 or -1 for each of {len(steps)} steps"
        )
    return solution | {"step_labels": labels}
