"""Problems in: the one function that loads problems from wherever they are."""

import json
from pathlib import Path
from typing import Any

import datasets
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.exceptions import DatasetGenerationError

from .features import PROBLEM_FEATURES
from .images import DEFAULT_MAX_IMAGE_BYTES, DEFAULT_MAX_IMAGE_PIXELS
from .mmk12 import MMK12, OnBadRow
from .problem_files import ProblemFileError


def load_problems(
    path: str | Path,
    *,
    image_root: str | Path | None = None,
    on_bad_row: OnBadRow = "raise",
    limit: int | None = None,
    max_image_bytes: int = DEFAULT_MAX_IMAGE_BYTES,
    max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS,
    cache_dir: str | Path | None = None,
) -> tuple[datasets.Dataset, list[dict[str, str]]]:
    """
    Load problems from wherever they are.

    Args:
        path (`str` or `Path`):
            A `.json`, `.jsonl` or `.parquet` file, a folder written by `Dataset.save_to_disk`, or `mini:SPLIT:NUMBER`
            (`mini:SPLIT:NUMBER:START`) for problems of the embedded mini world.
        image_root (`str` or `Path`, *optional*):
            Folder within which image paths lie. The file's own folder if not given.
        on_bad_row (`str`, *optional*, defaults to `"raise"`):
            `"raise"` an error at the first row that cannot be used, or `"skip"` such rows and list them.
        limit (`int`, *optional*):
            Load at most so many problems.
        max_image_bytes (`int`, *optional*, defaults to 50 MiB):
            Largest image file.
        max_image_pixels (`int`, *optional*, defaults to `89478485`):
            Largest picture, width times height.
        cache_dir (`str` or `Path`, *optional*):
            Where the rows are kept; the cache of `datasets` if not given.

    Returns:
        `tuple[datasets.Dataset, list[dict[str, str]]]`: The problem rows, and `id` and `reason` of each row left out.

    Raises:
        [`RowError`], [`ImageError`]: At a row that cannot be used.
        [`ProblemFileError`]: If a file is missing or broken.
    """
    settings: dict[str, Any] = {
        "on_bad_row": on_bad_row,
        "max_image_bytes": max_image_bytes,
        "max_image_pixels": max_image_pixels,
        "cache_dir": str(cache_dir) if cache_dir is not None else None,
    }
    if limit is not None:
        settings["limit"] = limit
    if str(path).startswith("mini:"):
        split, num_problems, start = _parse_mini(str(path))
        settings |= {"config_name": "mini", "mini_split": split, "num_problems": num_problems, "start": start}
    else:
        split = "train"
        files = [str(file.absolute()) for file in _files_of(Path(path).expanduser())]
        # Given as resolved files and not as patterns: a name may hold `[`, `*` or `::`.
        settings["data_files"] = DataFilesDict({split: DataFilesList(files, [()] * len(files))})
        if image_root is not None:
            settings["image_root"] = str(Path(image_root).expanduser().absolute())
    builder = MMK12(**settings)
    try:
        builder.download_and_prepare()
    except DatasetGenerationError as error:
        # Say what is wrong with the row, not that "an error occurred while generating the dataset".
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise
    skipped = builder.skipped(split)
    if not builder.info.splits[split].num_examples:  # `datasets` cannot read an empty split back
        return datasets.Dataset.from_dict({column: [] for column in PROBLEM_FEATURES}, PROBLEM_FEATURES), skipped
    dataset = builder.as_dataset(split=split)
    assert isinstance(dataset, datasets.Dataset)
    return dataset, skipped


def _parse_mini(path: str) -> tuple[str, int, int]:
    _, split, *numbers = path.split(":")
    if not split or len(numbers) not in (1, 2) or not all(number.isdecimal() for number in numbers):
        raise ValueError(f"{path!r}: write mini:SPLIT:NUMBER or mini:SPLIT:NUMBER:START, for example mini:test:100")
    return split, int(numbers[0]), int(numbers[1]) if len(numbers) == 2 else 0


def _files_of(path: Path) -> list[Path]:
    if not path.exists():
        raise ProblemFileError(f"{path}: there is no such file or folder")
    if not path.is_dir():
        return [path]
    if (path / "dataset_dict.json").exists():
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        raise ProblemFileError(f"{path}: holds the splits {', '.join(splits)}; give one of them: {path / splits[0]}")
    if not (path / "state.json").exists():
        raise ProblemFileError(f"{path}: not a folder written by `Dataset.save_to_disk`; give a file of problems")
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return [path / file["filename"] for file in state["_data_files"]]
