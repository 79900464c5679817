"""`mm-prm report`: a folder of results in, one page that a person can read out.

mm-prm report evaluation
mm-prm report folder --problems problems.json --output elsewhere
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_prm.commands import InputError, name_first, reading_input
from mm_prm.settings import parse_settings

if TYPE_CHECKING:
    import datasets

Rows = Sequence[Mapping[str, Any]]


@dataclass
class ReportSettings:
    """
    What is reported, and where the page goes. The first may be given without its name.

    Args:
        folder (`str`):
            Folder with results: what `mm-prm evaluate` wrote, or any of problems, pools and trees (each a folder, a
            .parquet or a .jsonl file) and results.json of `mm-prm best-of-n --output_json`.
        output (`str`, *optional*):
            Folder for report.html and the plots as PNG files. The folder itself if not given.
        problems (`str`, *optional*):
            Problems of the pools and trees; see `mm-prm annotate`. If not given those in the folder, or those that the
            settings beside the results name.
        pools (`str`, *optional*):
            Scored candidate pools, where they lie elsewhere or have another name.
        trees (`str`, *optional*):
            Trees, where they lie elsewhere or have another name.
        title (`str`, *optional*):
            Title of the page; model and benchmark, or the folder's name, if not given.
        aggregator (`str`, *optional*, defaults to `"min"`):
            Aggregator of the step scores for the curve and the choice among candidates, fixed before they were known.
        max_problems (`int`, *optional*, defaults to `6`):
            Most problems that are shown with their candidates.
        max_trees (`int`, *optional*, defaults to `3`):
            Most search trees that are shown.
    """

    folder: str
    output: str | None = None
    problems: str | None = None
    pools: str | None = None
    trees: str | None = None
    title: str | None = None
    aggregator: str = "min"
    max_problems: int = 6
    max_trees: int = 3

    def __post_init__(self) -> None:
        for name in ("max_problems", "max_trees"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: give 0 or more")


def main(args: Sequence[str], prog: str) -> int:
    """Run the command; returns its exit status."""
    words = name_first(args, "folder", prog)
    description = f"Write a report of results: {prog} FOLDER [settings]"
    return run(parse_settings(ReportSettings, words, prog=prog, description=description))


def run(settings: ReportSettings) -> int:
    """Read the folder, and write the page and its plots."""
    from mm_prm.inference import AGGREGATORS
    from mm_prm.report import render_report

    folder = Path(settings.folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder")
    if settings.aggregator not in AGGREGATORS:
        raise InputError(f"aggregator = {settings.aggregator!r}: use one of {', '.join(AGGREGATORS)}")
    output = folder if settings.output is None else Path(settings.output).expanduser()
    found = _read_folder(folder, settings)
    verifier = Path(found.said.get("model") or "the process reward model").name
    with reading_input(str(folder)):
        output.mkdir(parents=True, exist_ok=True)
        page = render_report(
            {verifier: found.metrics} if found.metrics else {},
            found.problems(settings.problems),
            found.pools,
            found.trees,
            solutions=found.solutions,
            step_results=found.step_metrics,
            verifier=verifier,
            aggregator=settings.aggregator,
            facts=found.facts(),
            title=settings.title or found.title(verifier),
            max_problems=settings.max_problems,
            max_trees=settings.max_trees,
            plot_folder=output,
        )
        (output / "report.html").write_text(page, encoding="utf-8")
    print(f"report: {output / 'report.html'}")
    return 0


@dataclass
class _Found:
    """What a folder holds; `said` is what the settings of the runs and their results say."""

    folder: Path
    pools: Rows
    trees: Rows
    solutions: Rows
    metrics: Mapping[str, Any] | None
    step_metrics: Mapping[str, Any] | None
    said: Mapping[str, Any]
    sources: list[Mapping[str, Any]]

    def title(self, verifier: str) -> str:
        """What the page is of."""
        return f"{verifier} on {self.said['benchmark']}" if self.said["benchmark"] else self.folder.resolve().name

    def facts(self) -> dict[str, str]:
        """What a reader should know of the run, as far as it is known."""
        facts = {name: str(self.said[name]) for name in ("benchmark", "policy", "model", "answer_rule", "judge")}
        paper = ", ".join(f"{name} {percent:.1f} %" for name, percent in self.said["paper"].items())
        left_out = len(self.said["left_out"])
        counted = {"MM-PRM paper": paper, "problems left out": str(left_out) if left_out else ""}
        counted |= {
            name.replace("_", " "): str(self.said[name] or "")
            for name in ("unknown_verdicts", "candidates_without_steps")
        }
        return {name.replace("_", " "): value for name, value in (facts | counted).items() if value}

    def problems(self, path: str | None) -> "datasets.Dataset | list[Mapping[str, Any]]":
        """Problems of the file that was given, or else of every place that the folder names."""
        import datasets

        if path is not None:
            return _problems({"problems": path})
        places: list[Mapping[str, Any]] = [
            {"problems": str(file)} for file in _files(self.folder, "problems", (".json",))
        ]
        tables = [_problems(place) for place in (*places, *self.sources)]
        return datasets.concatenate_datasets(tables) if tables else []


def _read_folder(folder: Path, settings: ReportSettings) -> _Found:
    import json

    from mm_prm.commands.files import read_table
    from mm_prm.data.features import validate_rows

    tables: dict[str, Rows] = {}
    said: dict[str, Any] = dict.fromkeys(
        ("benchmark", "policy", "model", "answer_rule", "judge", "unknown_verdicts", "candidates_without_steps"), ""
    )
    said |= {"paper": {}, "left_out": []}
    sources: list[Mapping[str, Any]] = []
    for name, given in (("pools", settings.pools), ("trees", settings.trees), ("solutions", None)):
        files = [Path(given).expanduser()] if given else _files(folder, name)
        if len(files) > 1:
            raise InputError(f"{folder}: holds {' and '.join(file.name for file in files)}; keep one of them")
        tables[name] = read_table(str(files[0])) if files else []
        if files:
            written = _settings(files[0].with_name(f"{files[0].name}.settings.yaml"))
            said |= {key: value for key, value in written.items() if key in said and value}
            sources += [written] if "problems" in written else []
    with reading_input(str(folder)):
        validate_rows("pool", tables["pools"])
        validate_rows("tree", tables["trees"])
    written = _settings(folder / "settings.yaml")
    if "benchmark" in written:
        said |= {key: value for key, value in written.items() if key in said and value}
        sources.append(written)

    metrics: Mapping[str, Any] = {}
    file = folder / "results.json"
    if file.is_file():
        with reading_input(str(file)):
            results = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(results, dict):
                raise ValueError(
                    "must be an object, as `mm-prm evaluate` or `mm-prm best-of-n --output_json` writes it"
                )
        said |= {key: value for key, value in results.items() if key in said and value}
        metrics = results.get("metrics", results)
    if not any(map(len, tables.values())) and "best_of_n" not in metrics:
        raise InputError(f"{folder}: holds none of pools, trees and solutions, and no results.json of Best-of-N")
    return _Found(
        folder=folder,
        **tables,
        metrics=_best_of_n(file, metrics, tables["pools"]),
        step_metrics=metrics if "thresholds" in metrics else None,
        said=said,
        sources=sources,
    )


def _best_of_n(file: Path, metrics: Mapping[str, Any], pools: Rows) -> Mapping[str, Any] | None:
    """The figures of results.json, so that page and terminal say the same; without it those of the pools."""
    from mm_prm.metrics.best_of_n.best_of_n import BestOfN

    if "best_of_n" in metrics:
        if len(pools) and metrics["num_problems"] != len(pools):
            raise InputError(
                f"{file}: is of {metrics['num_problems']} problems, but the pools are of {len(pools)}; remove the older"
            )
        return metrics
    if not len(pools):
        return None
    columns = {name: [pool[name] for pool in pools] for name in ("correct", "step_scores", "answers", "candidates")}
    return BestOfN().compute(**{name: values for name, values in columns.items() if any(values)})


def _files(folder: Path, name: str, further: tuple[str, ...] = ()) -> list[Path]:
    paths = (folder / f"{name}{suffix}" for suffix in ("", ".parquet", ".jsonl", *further))
    return [path for path in paths if path.exists()]


def _settings(path: Path) -> dict[str, Any]:
    """What a run wrote of its settings, empty if there is no such file."""
    import yaml

    if not path.is_file():
        return {}
    with reading_input(str(path)):
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
    return written if isinstance(written, dict) else {}


def _problems(source: Mapping[str, Any]) -> "datasets.Dataset":
    """Problems as a run named them in its settings, by benchmark or by file."""
    import logging

    from mm_prm.data import load_problems
    from mm_prm.data.benchmarks import load_benchmark

    logging.getLogger("mm_prm.data.mmk12").setLevel(logging.ERROR)  # what was left out then is left out again
    name = source.get("benchmark") or source["problems"]
    try:
        if "benchmark" in source:
            path, limit = source.get("benchmark_path"), source.get("limit")
            return load_benchmark(name, path, on_bad_row=source.get("on_bad_row", "raise"), limit=limit).problems
        return load_problems(name, image_root=source.get("image_root"), on_bad_row=source.get("on_bad_row", "skip"))[0]
    except (OSError, ValueError) as error:
        message = " ".join(str(error).split())
        raise InputError(f"{name}: {message} (--problems says where the problems are now)") from error
