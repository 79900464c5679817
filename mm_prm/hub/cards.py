"""The cards that models and data sets carry on the Hub: the templates of `hub_cards`, filled with real values.

Nothing here asks the network. Metadata are written by `huggingface_hub`, names that come from elsewhere are escaped
where they stand in the text, and every figure of the text also stands in the metadata.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from importlib.util import find_spec
from typing import Any, Literal

import yaml
from huggingface_hub import (
    DatasetCard,
    DatasetCardData,
    EvalResult,
    ModelCard,
    ModelCardData,
    RepoCard,
    SpaceCardData,
)

ModelKind = Literal["process-reward-model", "policy"]

CITATION = """\
@article{du2025mmprm,
  title={MM-PRM: Enhancing Multimodal Mathematical Reasoning with Scalable Step-Level Supervision},
  author={Lingxiao Du and Fanqing Meng and Zongkai Liu and Zhixiang Zhou and Ping Luo and Qiaosheng Zhang and Wenqi Shao},
  journal={arXiv preprint arXiv:2505.13427},
  year={2025}
}"""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~$&])")
_SIZE_CATEGORIES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}


def model_card(
    model_name: str,
    kind: ModelKind = "process-reward-model",
    *,
    model_id: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    license: str | None = None,
    tags: Sequence[str] = (),
    reads_images: bool = True,
    step_format: str = "paragraphs",
    description: str = "",
    usage: str | None = None,
    training: str = "",
    settings: Mapping[str, Any] | None = None,
    evaluation: str = "",
    eval_results: Sequence[EvalResult] = (),
    limits: Sequence[str] = (),
    step_token_id: int | None = None,
) -> ModelCard:
    """
    Render the card of a process reward model or of a policy.

    `description`, `training`, `evaluation` and `limits` are Markdown and go in as they are; all else is escaped.

    Args:
        model_name (`str`):
            Name of the model: the card's title, and the model's name in the `model-index`.
        kind (`str`, *optional*, defaults to `"process-reward-model"`):
            `"process-reward-model"` or `"policy"`.
        model_id (`str`, *optional*):
            Hub repository or folder that the code on the card loads. Defaults to `model_name`.
        base_model (`str`, *optional*):
            Model that training started from. An id `owner/name` of the Hub goes into the metadata, too.
        datasets (`Sequence[str]`, *optional*, defaults to `()`):
            Data sets it was trained on. Ids `owner/name` of the Hub go into the metadata, too.
        license (`str`, *optional*):
            Licence, as the Hub spells it (`"apache-2.0"`).
        tags (`Sequence[str]`, *optional*, defaults to `()`):
            Tags beside `mm-prm` and the kind.
        reads_images (`bool`, *optional*, defaults to `True`):
            Whether problems may have pictures.
        step_format (`str`, *optional*, defaults to `"paragraphs"`):
            How a policy writes its steps: `"paragraphs"`, `"tags"` or `"numbered"`.
        description (`str`, *optional*, defaults to `""`):
            What a reader should know first.
        usage (`str`, *optional*):
            Python code to show in place of the general example.
        training (`str`, *optional*, defaults to `""`):
            How it was trained.
        settings (`Mapping[str, Any]`, *optional*):
            Settings of the training, shown as YAML.
        evaluation (`str`, *optional*, defaults to `""`):
            How it was evaluated.
        eval_results (`Sequence[EvalResult]`, *optional*, defaults to `()`):
            Figures for the `model-index` and the card's table, as [`eval_result`] and [`best_of_n_results`] make them.
        limits (`Sequence[str]`, *optional*, defaults to `()`):
            What the model cannot do, beside what holds for all of its kind.
        step_token_id (`int`, *optional*):
            Id of the step token, to show how vLLM serves the model.

    Returns:
        [`~huggingface_hub.ModelCard`]: The card; `card.save("README.md")` writes it.
    """
    without_images = "text-generation" if kind == "policy" else "token-classification"
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="image-text-to-text" if reads_images else without_images,
        tags=["mm-prm", kind, *tags],
        base_model=base_model if base_model and _HUB_ID.fullmatch(base_model) else None,
        datasets=[name for name in datasets if _HUB_ID.fullmatch(name)] or None,
        model_name=model_name if eval_results else None,  # the Hub reads it in the `model-index` only
        eval_results=list(eval_results) or None,
    )
    return ModelCard.from_template(
        data,
        template_str=_read_template("model_card.md.jinja"),
        title=_text(model_name),
        is_policy=kind == "policy",
        model_id=model_id or model_name,
        base=_reference(base_model) if base_model else None,
        trained_on=", ".join(_reference(name, "datasets/") for name in datasets),
        licence=_text(license) if license else None,
        reads_images=reads_images,
        step_format=step_format,
        description=description,
        usage_block=_code_block(usage, "python") if usage else None,
        training=training,
        settings_block=_yaml_block(settings) if settings else None,
        evaluation=evaluation,
        metrics_table=_metrics_table(eval_results),
        limits=limits,
        step_token_id=step_token_id,
        citation=CITATION,
    )


def dataset_card(
    dataset_name: str,
    trees: Iterable[Mapping[str, Any]],
    *,
    data_files: Mapping[str, str],
    num_rows: Mapping[str, int] | None = None,
    dataset_id: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    description: str = "",
    usage: str | None = None,
    annotation: str = "",
    limits: Sequence[str] = (),
) -> DatasetCard:
    """
    Render the card of annotated trees and what belongs to them. Their number, cost and settings are read from the trees.

    `description`, `annotation` and `limits` are Markdown and go in as they are; all else is escaped.

    Args:
        dataset_name (`str`):
            Name of the data set, the card's title.
        trees (`Iterable[Mapping[str, Any]]`):
            All of its tree rows, if it has any.
        data_files (`Mapping[str, str]`):
            Files of each configuration (`{"trees": "trees.parquet"}`), so that `load_dataset` finds them.
        num_rows (`Mapping[str, int]`, *optional*):
            Number of rows of each configuration.
        dataset_id (`str`, *optional*):
            Hub repository or folder that the code on the card loads. Defaults to `dataset_name`.
        license (`str`, *optional*):
            Licence, as the Hub spells it (`"apache-2.0"`).
        tags (`Sequence[str]`, *optional*, defaults to `()`):
            Tags beside `mm-prm` and `process-supervision`.
        description (`str`, *optional*, defaults to `""`):
            What a reader should know first.
        usage (`str`, *optional*):
            Python code to show in place of the general example.
        annotation (`str`, *optional*, defaults to `""`):
            How the trees were made.
        limits (`Sequence[str]`, *optional*, defaults to `()`):
            What the data are not good for, beside what holds for all such trees.

    Returns:
        [`~huggingface_hub.DatasetCard`]: The card; `card.save("README.md")` writes it.
    """
    facts, settings = _tree_facts(trees)
    largest = max([facts["trees"], *(num_rows or {}).values()])
    data = DatasetCardData(
        license=license,
        pretty_name=dataset_name,
        annotations_creators=["machine-generated"],
        task_categories=["image-text-to-text"],
        size_categories=[next((name for size, name in _SIZE_CATEGORIES.items() if largest < size), "n>1M")],
        tags=list(dict.fromkeys(["mm-prm", "process-supervision", *tags])),
        configs=[{"config_name": name, "data_files": path} for name, path in data_files.items()],
    )
    return DatasetCard.from_template(
        data,
        template_str=_read_template("dataset_card.md.jinja"),
        title=_text(dataset_name),
        dataset_id=dataset_id or dataset_name,
        config_name="trees" if "trees" in data_files else next(iter(data_files)),
        configs=num_rows or {},
        licence=_text(license) if license else None,
        description=description,
        usage_block=_code_block(usage, "python") if usage else None,
        facts=facts if facts["trees"] else None,
        annotation=annotation,
        settings_blocks=[_yaml_block(each) for each in settings],
        limits=limits,
        citation=CITATION,
    )


def metric_card(name: str, texts: tuple[str, str], *, repo_id: str) -> RepoCard:
    """
    Render the card of a metric's Space.

    Args:
        name (`str`):
            Name of the metric.
        texts (`tuple[str, str]`):
            What it says of itself, and of its arguments and results.
        repo_id (`str`):
            Hub repository that the code on the card loads.
    """
    description, arguments = texts
    data = SpaceCardData(
        title=name, sdk="static", license="apache-2.0", tags=["mm-prm", "evaluate", "metric"], pinned=False
    )
    return RepoCard.from_template(
        data,
        template_str=_read_template("metric_card.md.jinja"),
        title=_text(name),
        description=description.strip(),
        repo_id=repo_id,
        arguments_block=_code_block(arguments, "text"),
        citation=CITATION,
    )


def eval_result(
    metric_name: str,
    estimate: Mapping[str, float] | float,
    *,
    dataset_type: str,
    dataset_name: str,
    dataset_split: str,
    metric_type: str = "accuracy",
) -> EvalResult:
    """
    One figure for a model card.

    Args:
        metric_name (`str`):
            Name of the figure for readers.
        estimate (`Mapping[str, float]` or `float`):
            `{"value", "low", "high"}`, where low and high are the ends of the 95 % interval, or a number that has none.
        dataset_type (`str`):
            Id of the data set.
        dataset_name (`str`):
            Name of the data set for readers.
        dataset_split (`str`):
            Its split.
        metric_type (`str`, *optional*, defaults to `"accuracy"`):
            Kind of figure, as the Hub names it.

    Returns:
        [`~huggingface_hub.EvalResult`]: The figure; its `metric_args` hold the interval.
    """
    numbers = estimate if isinstance(estimate, Mapping) else {"value": estimate}
    for name, number in numbers.items():
        if name in ("value", "low", "high") and not math.isfinite(number):
            raise ValueError(
                f"{metric_name} on {dataset_name}, {dataset_split}: {name} = {number}; leave the figure out"
            )
    interval = None
    if "low" in numbers:
        interval = {"low": round(numbers["low"], 4), "high": round(numbers["high"], 4), "confidence": 0.95}
    return EvalResult(
        task_type="image-text-to-text",
        dataset_type=dataset_type,
        dataset_name=dataset_name,
        dataset_split=dataset_split,
        metric_type=metric_type,
        metric_name=metric_name,
        metric_value=round(numbers["value"], 4),
        metric_args=interval,
    )


def best_of_n_results(
    results: Mapping[str, Any], aggregator: str, *, dataset_type: str, dataset_name: str, dataset_split: str
) -> list[EvalResult]:
    """
    The figures of a process reward model: Best-of-N and weighted vote by one aggregator, between what they have to beat
    and the most they could reach.

    Args:
        results (`Mapping[str, Any]`):
            What the `best_of_n` metric returned.
        aggregator (`str`):
            Aggregator of the step scores, fixed before the figures were known.
        dataset_type (`str`):
            Id of the data set.
        dataset_name (`str`):
            Name of the data set for readers.
        dataset_split (`str`):
            Its split.

    Returns:
        `list[EvalResult]`
    """
    num = results["num_candidates"]
    figures = {"mean pass@1": results["pass@1"], "uninformative verifier": results["uninformative"]}
    if "majority" in results:
        figures[f"majority vote of {num}"] = results["majority"]
    figures[f"Best-of-{num} ({aggregator})"] = results["best_of_n"][aggregator]
    if aggregator in results["weighted_majority"]:
        figures[f"weighted vote of {num} ({aggregator})"] = results["weighted_majority"][aggregator]
    figures[f"oracle of {num}"] = results["oracle"]
    return [
        eval_result(name, estimate, dataset_type=dataset_type, dataset_name=dataset_name, dataset_split=dataset_split)
        for name, estimate in figures.items()
    ]


def _read_template(name: str) -> str:
    # In a checkout that is on the path without being installed, the package lies where the checkout has it
    package = "mm_prm.hub_cards" if find_spec("mm_prm.hub_cards") else "hub_cards"
    return files(package).joinpath(name).read_text(encoding="utf-8")


def _text(value: str) -> str:
    """A value as one line of plain text in Markdown, HTML and a table's cell."""
    return _MARKDOWN.sub(r"\\\1", " ".join(value.split()))


def _reference(name: str, kind: str = "") -> str:
    return f"[{_text(name)}](https://huggingface.co/{kind}{name})" if _HUB_ID.fullmatch(name) else _text(name)


def _code_block(code: str, language: str) -> str:
    """A fenced block whose fence is longer than any that the code holds."""
    longest = max(map(len, re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code.strip()}\n{fence}"


def _yaml_block(settings: Mapping[str, Any]) -> str:
    return _code_block(yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True), "yaml")


def _metrics_table(eval_results: Sequence[EvalResult]) -> str:
    """One line a metric, one column a data set's split; empty without figures."""
    cells: dict[str, dict[str, str]] = {}
    for result in eval_results:
        column = ", ".join(_text(part) for part in (result.dataset_name, result.dataset_split) if part)
        cell = f"{result.metric_value:.3f}"
        if result.metric_args:
            cell += f" ({result.metric_args['low']:.3f}–{result.metric_args['high']:.3f})"
        cells.setdefault(_text(result.metric_name or result.metric_type), {})[column] = cell
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    if not columns:
        return ""
    lines = ["", *columns], ["---"] * (len(columns) + 1)
    rows = [[name, *(row.get(column, "") for column in columns)] for name, row in cells.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in [*lines, *rows])


def _tree_facts(trees: Iterable[Mapping[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Counts over all trees, and the distinct settings they were grown with."""
    counts: Counter[str] = Counter()
    settings: dict[str, None] = {}
    seconds = 0.0
    for tree in trees:
        settings[tree["settings"]] = None
        counts["trees"] += 1
        counts["complete"] += tree["status"] == "complete"
        counts["prefixes"] += sum(node["num_judged"] > 0 for node in tree["nodes"])
        counts.update(rollout["verdict"] for rollout in tree["rollouts"])
        for name in ("rollouts", "prompt_tokens", "generated_tokens", "judge_calls"):
            counts[name] += tree["cost"][name]
        seconds += tree["cost"]["seconds"]
    # The identities of policy and judge are JSON within JSON
    parsed = [{name: _unpack(value) for name, value in json.loads(each).items()} for each in settings]
    names = ("trees", "complete", "prefixes", "rollouts", "right", "wrong", "unknown")
    costs = ("prompt_tokens", "generated_tokens", "judge_calls")
    return {name: counts[name] for name in (*names, *costs)} | {"seconds": round(seconds)}, parsed


def _unpack(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) and value.startswith("{") else value
