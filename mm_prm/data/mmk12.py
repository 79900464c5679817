"""A `datasets` builder of problems: MM-K12's seed JSON, parquet files, and the embedded mini world.

    builder = MMK12(data_files="problems.json")
    builder.download_and_prepare()
    dataset = builder.as_dataset(split="train")

`datasets` loads no scripts by path any more, so the class is used directly; `load_problems` does so for the command
line. Paths are handled in `problem_files`, because `datasets` replaces `open` and `Path` in the module of a builder by
its own, which read remote files and understand `::` in a name as a step into an archive.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import datasets
import huggingface_hub
from datasets.data_files import DataFilesDict, DataFilesList

from .features import PROBLEM_FEATURES, RowError, validate_problem
from .images import DEFAULT_MAX_IMAGE_BYTES, DEFAULT_MAX_IMAGE_PIXELS, ImageError
from .problem_files import (
    SUFFIXES,
    ProblemFileError,
    fingerprint,
    fingerprint_of_code,
    read_rows,
    read_skipped,
    to_problem,
    write_skipped,
)

logger = logging.getLogger(__name__)

OnBadRow = Literal["raise", "skip"]


@dataclass
class MMK12Config(datasets.BuilderConfig):
    """
    What [`MMK12`] reads and what it refuses.

    Args:
        image_root (`str`, *optional*):
            Folder within which image paths lie. Each data file's own folder if not given.
        on_bad_row (`str`, *optional*, defaults to `"raise"`):
            What to do with a row that cannot be used: `"raise"` an error that names it, or `"skip"` it and keep the
            reason. A file that cannot be read at all is an error in any case.
        limit (`int`, *optional*):
            Stop after so many problems of each split.
        max_image_bytes (`int`, *optional*, defaults to 50 MiB):
            Largest image file.
        max_image_pixels (`int`, *optional*, defaults to `89478485`):
            Largest picture, width times height.
        mini_split (`str`, *optional*):
            For the configuration `"mini"`: split of the mini world.
        num_problems (`int`, *optional*, defaults to `0`):
            For the configuration `"mini"`: number of problems to draw.
        start (`int`, *optional*, defaults to `0`):
            For the configuration `"mini"`: number of the first problem.
    """

    image_root: str | None = None
    on_bad_row: OnBadRow = "raise"
    limit: int | None = None
    max_image_bytes: int = DEFAULT_MAX_IMAGE_BYTES
    max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS
    mini_split: str | None = None
    num_problems: int = 0
    start: int = 0

    def create_config_id(self, config_kwargs: dict, custom_features: datasets.Features | None = None) -> str:
        # `datasets` names its cache by the settings and by the time at which data files were changed. Neither says
        # that a picture was changed, or that the code that makes the rows was.
        if self.on_bad_row not in ("raise", "skip"):
            raise ValueError(f"on_bad_row = {self.on_bad_row!r}: use 'raise' or 'skip'")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit = {self.limit!r}: give a number above 0, or nothing for all problems")
        inputs = [fingerprint_of_code()]
        for files in (self.data_files or {}).values():
            local = [file for file in files if not _is_remote(file)]  # a remote file's version is known already
            inputs.append(fingerprint(local, self.image_root))
        return super().create_config_id({**config_kwargs, "inputs": inputs}, custom_features)


def _is_remote(file: str) -> bool:
    return "://" in file


class MMK12(datasets.GeneratorBasedBuilder):
    """
    Builder of problem rows.

    The configuration `"default"` reads `data_files`: the ancestor's seed JSON (a list, or JSON lines), parquet files
    and Arrow files. The configuration `"mini"` draws problems of the embedded mini world. All settings of
    [`MMK12Config`] are given to the builder by name. A changed data file or picture is read anew.
    """

    BUILDER_CONFIG_CLASS = MMK12Config
    BUILDER_CONFIGS = (MMK12Config(name="default"), MMK12Config(name="mini"))
    DEFAULT_CONFIG_NAME = "default"

    config: MMK12Config

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(description="Problems with pictures", features=PROBLEM_FEATURES)

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        if self.config.name == "mini":
            if self.config.mini_split is None:
                raise ValueError("the configuration 'mini' needs `mini_split`")
            return [datasets.SplitGenerator(name=self.config.mini_split, gen_kwargs={"files": None})]
        if not self.config.data_files:
            raise ValueError(f"MMK12 needs `data_files`: paths of {', '.join(SUFFIXES)} files")
        # A tuple, because `datasets` deals lists out to processes, and then nobody would see an id that occurs twice.
        return [
            datasets.SplitGenerator(
                name=split,
                gen_kwargs={"files": tuple(dl_manager.download(file) if _is_remote(file) else file for file in files)},
            )
            for split, files in self.config.data_files.items()
        ]

    def _generate_examples(self, files: tuple[str, ...] | None) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self.config
        places: dict[str, str] = {}
        self._skipped: list[dict[str, str]] = []
        for place, row, file in self._mini_rows() if files is None else self._file_rows(files):
            try:
                if file is None:
                    problem = row
                    validate_problem(problem, place)
                else:
                    problem = to_problem(
                        row,
                        place,
                        file,
                        image_root=config.image_root,
                        max_image_bytes=config.max_image_bytes,
                        max_image_pixels=config.max_image_pixels,
                    )
                name = problem["id"]
                if name in places:
                    advice = f"already used by row {places[name]}; each problem needs an id of its own"
                    raise RowError("problem", f"row {place}", "id", name, advice)
            except (RowError, ImageError) as error:
                if config.on_bad_row == "raise":
                    raise
                name = row.get("id") if isinstance(row, dict) else None
                named = isinstance(name, str | int) and str(name).strip()
                self._skipped.append({"id": str(name) if named else f"row {place}", "reason": str(error)})
                continue
            places[name] = place
            yield len(places) - 1, problem
            if len(places) == config.limit:
                break
        if not places and not self._skipped:
            raise ProblemFileError(f"{', '.join(files) if files else 'the mini world'}: holds no problems")
        for entry in self._skipped:
            logger.warning("Skipped: %s", entry["reason"])
        if self._skipped:
            logger.warning("Skipped %d problems, kept %d.", len(self._skipped), len(places))

    def _mini_rows(self) -> Iterator[tuple[str, Any, str | None]]:
        from . import mini

        config = self.config
        assert config.mini_split is not None
        rows = mini.generate_problems(config.mini_split, config.num_problems, config.start)
        for number, row in enumerate(rows):
            yield f"{number} of the mini world", row, None

    def _file_rows(self, files: tuple[str, ...]) -> Iterator[tuple[str, Any, str | None]]:
        for file in files:
            for place, row in read_rows(file):
                yield place, row, file

    def _prepare_split(self, split_generator: datasets.SplitGenerator, *args: Any, **kwargs: Any) -> None:
        # The reasons lie beside the rows, so that a run that finds the rows in the cache knows them too.
        super()._prepare_split(split_generator, *args, **kwargs)
        write_skipped(self._output_dir, split_generator.name, self._skipped)

    @classmethod
    def from_hub(
        cls, repo_id: str, *, revision: str | None = None, split: str = "train", **settings: Any
    ) -> datasets.Dataset:
        """
        Load problem rows from a repository of the Hub that `mm-prm push dataset` made, each checked.

        Args:
            repo_id (`str`):
                Data set repository with the configuration `problems`.
            revision (`str`, *optional*):
                Branch, tag or commit.
            split (`str`, *optional*, defaults to `"train"`):
                Split of the problems.
            settings:
                Settings of [`MMK12Config`].

        Returns:
            `datasets.Dataset`
        """
        files = huggingface_hub.list_repo_files(repo_id, repo_type="dataset", revision=revision)
        names = sorted(name for name in files if name.startswith(f"problems/{split}-") and name.endswith(".parquet"))
        if not names:
            raise ProblemFileError(f"{repo_id}: holds no files problems/{split}-*.parquet")
        local = [
            huggingface_hub.hf_hub_download(repo_id, name, repo_type="dataset", revision=revision) for name in names
        ]
        data_files = DataFilesDict({split: DataFilesList(local, [()] * len(local))})
        builder = cls(data_files=data_files, **settings)
        builder.download_and_prepare()
        dataset = builder.as_dataset(split=split)
        assert isinstance(dataset, datasets.Dataset)
        return dataset

    def skipped(self, split: str) -> list[dict[str, str]]:
        """
        Say which rows were left out.

        Args:
            split (`str`):
                Split, after `download_and_prepare`.

        Returns:
            `list[dict[str, str]]`: `id` (or `row 3 of problems.json`) and `reason` of each.
        """
        return read_skipped(self.cache_dir, split)
