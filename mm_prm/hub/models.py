"""What goes to the Hub with a model: its checkpoint, and a card filled with real values."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard

from mm_prm.settings import without_secrets

from .cards import best_of_n_results, eval_result, model_card
from .upload import TAG, Upload

# What belongs to a checkpoint. Optimizer states, logs and pickles do not travel.
_SUFFIXES = (".json", ".safetensors", ".jinja", ".txt", ".model", ".py")
_NOT_SENT = ("trainer_state.json",)
_BESIDE_THE_POINT = ("output_dir", "output_json", "report_to", "logging_steps", "save_strategy", "run_name")


def model_upload(
    source: str | Path,
    repo_id: str,
    *,
    license: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    eval_results: Sequence[EvalResult] = (),
    description: str = "",
    limits: Sequence[str] = (),
) -> Upload:
    """
    Put together what a process reward model's repository holds.

    A card that stands in the folder and has the tag `mm-prm` goes as it is, unless something is given here that belongs on
    the card. Otherwise one is written from config.json, the
    settings of the training (`settings.yaml`, which `mm-prm train` writes) and what is given here.

    Args:
        source (`str` or `Path`):
            Folder of the checkpoint, or of a PEFT adapter.
        repo_id (`str`):
            The repository, `owner/name`.
        license (`str`, *optional*):
            Licence, as the Hub spells it.
        base_model (`str`, *optional*):
            Model that training started from; read from the settings or the adapter if not given.
        datasets (`Sequence[str]`, *optional*, defaults to `()`):
            Data sets that it was trained on.
        eval_results (`Sequence[EvalResult]`, *optional*, defaults to `()`):
            Figures for the `model-index`, see [`eval_results_of`].
        description (`str`, *optional*, defaults to `""`):
            What a reader should know first, in Markdown.
        limits (`Sequence[str]`, *optional*, defaults to `()`):
            What the model cannot do.

    Returns:
        [`Upload`]
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder; give the folder of a checkpoint")
    files: dict[str, Path | bytes] = {
        file.name: file
        for file in sorted(folder.iterdir())
        if file.is_file() and file.suffix in _SUFFIXES and not file.name.startswith(".") and file.name not in _NOT_SENT
    }
    is_adapter = "adapter_config.json" in files
    if not is_adapter and "config.json" not in files:
        raise ValueError(f"{folder}: holds no config.json; give the folder of a checkpoint")
    if not any(name.endswith(".safetensors") for name in files):
        raise ValueError(f"{folder}: holds no .safetensors file; save the model with `save_pretrained`")
    card = folder / "README.md"
    is_given = any((license, base_model, datasets, eval_results, description, limits))
    if not is_given and card.is_file() and TAG in (ModelCard.load(card, ignore_metadata_errors=True).data.tags or []):
        files["README.md"] = card
    else:
        config = json.loads((folder / ("adapter_config.json" if is_adapter else "config.json")).read_text("utf-8"))
        settings = _settings(folder / "settings.yaml")
        files["README.md"] = str(
            model_card(
                repo_id.split("/")[-1],
                model_id=repo_id,
                base_model=base_model or config.get("base_model_name_or_path") or _hub_name(settings.get("model")),
                datasets=datasets,
                license=license,
                reads_images=is_adapter or "vision_config" in config,
                description=description,
                settings=settings,
                eval_results=eval_results,
                limits=limits,
                step_token_id=config.get("step_token_id"),
            )
        ).encode()
    return Upload(repo_id, "model", files, f"Push {repo_id.split('/')[-1]} with mm-prm")


def eval_results_of(
    path: str | Path, aggregator: str = "min", dataset: str | None = None, model: str | Path | None = None
) -> list[EvalResult]:
    """
    Read the figures of a card from what `mm-prm evaluate` or `mm-prm best-of-n` wrote as JSON.

    Args:
        path (`str` or `Path`):
            The file.
        aggregator (`str`, *optional*, defaults to `"min"`):
            Aggregator of the step scores, fixed before the figures were known.
        dataset (`str`, *optional*):
            Data set that was measured. Known where `mm-prm evaluate` wrote the file and measured all of a benchmark as
            the Hub has it.
        model (`str` or `Path`, *optional*):
            Folder of the checkpoint that the card is of: figures of another one are refused. Not checked if not given.
    """
    from mm_prm.data.benchmarks import BENCHMARKS

    file = Path(path).expanduser()
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: broken JSON, line {error.lineno}: {error.msg}") from error
    if model is not None:
        _check_model(file, report if isinstance(report, Mapping) else {}, model)
    results = report.get("metrics", report) if isinstance(report, Mapping) else {}
    benchmark = BENCHMARKS.get(report.get("benchmark", "")) if isinstance(report, Mapping) else None
    if benchmark is not None and dataset is None:
        other = _not_the_benchmark(report)
        if other is not None:
            raise ValueError(
                f"{file}: {other}, so these are no figures of {benchmark.hub_id}; measure all of it as the Hub has it, or "
                "name the data set they belong to with results_dataset"
            )
        dataset = benchmark.hub_id
    if dataset is None:
        raise ValueError(f"{file}: does not say on which data set it was measured; give results_dataset")
    if benchmark is not None and dataset != benchmark.hub_id:
        benchmark = None
    place = {
        "dataset_type": dataset,
        "dataset_name": benchmark.name if benchmark else dataset.split("/")[-1],
        "dataset_split": ", ".join(benchmark.splits) if benchmark else "test",
    }
    if "best_of_n" in results:
        if aggregator not in results["best_of_n"]:
            raise ValueError(
                f"{file}: holds no aggregator {aggregator!r}; there are {', '.join(results['best_of_n'])}"
            )
        figures = best_of_n_results(results, aggregator, **place)
    elif "thresholds" in results:
        figures = _step_error_results(results["thresholds"], place)
    else:
        raise ValueError(f"{file}: holds neither `best_of_n` nor `thresholds`; give what evaluate or best-of-n wrote")
    scope = _scope(report)
    return [
        dataclasses.replace(figure, metric_name=", ".join([str(figure.metric_name), *scope])) for figure in figures
    ]


def _check_model(file: Path, report: Mapping[str, Any], model: str | Path) -> None:
    from mm_prm.annotation.identity import checkpoint_identity

    measured = report.get("model_checkpoint")
    if measured is None:
        raise ValueError(
            f"{file}: does not say which model was measured; `mm-prm evaluate` says it, and so does `mm-prm best-of-n "
            "--model MODEL`"
        )
    if measured != checkpoint_identity(Path(model).expanduser()):
        raise ValueError(
            f"{file}: was measured with {report.get('model')}, whose checkpoint is not that of {model}, or has changed "
            "since; measure the model that is pushed"
        )


def _not_the_benchmark(report: Mapping[str, Any]) -> str | None:
    """Why the figures are not those of the whole benchmark as the Hub has it, `None` if they are."""
    if not {"benchmark_path", "limit", "num_problems", "num_benchmark_problems"} <= set(report):
        return "does not say how much of the benchmark was measured"
    if report["benchmark_path"] is not None:
        return "benchmark_path was a local copy"
    if report["limit"] is not None:
        return f"limit was {report['limit']} rows of each split"
    if report.get("left_out"):
        return f"{len(report['left_out'])} rows were left out"
    if report["num_problems"] < report["num_benchmark_problems"]:
        return f"{report['num_problems']:,} of {report['num_benchmark_problems']:,} problems were measured"
    return None


def _scope(report: Mapping[str, Any]) -> list[str]:
    """What a figure is worth depends on: how many problems, and who wrote the solutions, where the file says it."""
    scope = [f"{report['num_problems']:,} problems"] if "num_problems" in report else []
    policy = report.get("policy")
    if policy is not None:
        scope.append(f"policy {Path(policy).name if _is_path(policy) else policy}")
    return scope


def _step_error_results(thresholds: Mapping[str, Any], place: dict[str, str]) -> list[EvalResult]:
    conventions = {"mean_of_subsets": "mean of subsets", "pooled": "pooled"}
    return [
        eval_result(f"F1, threshold {name}, {words}", at[convention]["f1"], metric_type="f1", **place)
        for name, at in thresholds.items()
        for convention, words in conventions.items()
        if at[convention]["f1"] is not None
    ]


def _settings(path: Path) -> dict[str, Any]:
    """What was set for the training: not what is as it always is, nor places on somebody's disk, nor secrets."""
    if not path.is_file():
        return {}
    from mm_prm.trainer import PRMConfig

    settings = without_secrets(yaml.safe_load(path.read_text(encoding="utf-8")) or {}, leave_out=_is_local)
    defaults = {field.name: field.default for field in dataclasses.fields(PRMConfig)}
    return {
        name: value
        for name, value in settings.items()
        if value not in (None, "", [], {}, defaults.get(name)) and name not in _BESIDE_THE_POINT
    }


def _is_local(name: str, value: Any) -> bool:
    return name.endswith("_dir") or _is_path(value)


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and (value.startswith(("/", "~", ".")) or Path(value).expanduser().exists())


def _hub_name(name: Any) -> str | None:
    return name if isinstance(name, str) and not _is_path(name) else None
