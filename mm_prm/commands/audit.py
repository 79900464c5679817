"""`mm-prm audit`: how good are the labels of trees?

mm-prm audit --trees trees.parquet --plot audit.png
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mm_prm.commands import InputError, reading_input
from mm_prm.commands.judge_settings import JudgeSettings
from mm_prm.commands.policy_settings import PolicySettings
from mm_prm.settings import parse_settings

if TYPE_CHECKING:
    import numpy as np

    from mm_prm.annotation.audit import Label

# Labels measured anew where the settings do not say how many.
_LABELS_MEASURED = 256


@dataclass
class AuditSettings(PolicySettings, JudgeSettings):
    """
    Which labels are held against what.

    Args:
        trees (`str`):
            Trees: a folder, a .parquet or .jsonl file as `mm-prm annotate` writes them, or its journal (.sqlite).
        reference (`str`, *optional*):
            What labels are held against: `exact` correctness, which the mini world knows, or fresh `rollouts` by policy
            and judge, which should be those of the annotation. Exact for trees of the mini world if not given.
        problems (`str`, *optional*):
            Problems of the trees, for fresh rollouts; those of the mini world are made from their ids.
        image_root (`str`, *optional*):
            Folder within which image paths of the problems lie. The file's own folder if not given.
        step_values (`str`, *optional*, defaults to `"pooled"`):
            Which rollouts make a label, as in `mm-prm rows`: all that pass through the step, or those measured from it.
        right_threshold (`float`, *optional*, defaults to `0.0`):
            A label above this value says that the step is right, and so does a value of fresh rollouts.
        num_labels (`int`, *optional*):
            Audit a random choice of so many labels; all if not given, 256 against fresh rollouts.
        fresh_rollouts (`int`, *optional*, defaults to `64`):
            Fresh rollouts for each label.
        num_resamples (`int`, *optional*, defaults to `1000`):
            Bootstrap resamples of problems.
        seed (`int`, *optional*, defaults to `0`):
            Seed of all choices and of the fresh rollouts.
        plot (`str`, *optional*):
            Draw the audit there (.png, .svg or .pdf).
        output_json (`str`, *optional*):
            Write the figures there, too.
    """

    trees: str
    reference: Literal["exact", "rollouts"] | None = None
    problems: str | None = None
    image_root: str | None = None
    step_values: Literal["pooled", "measured"] = "pooled"
    right_threshold: float = 0.0
    num_labels: int | None = None
    fresh_rollouts: int = 64
    num_resamples: int = 1000
    seed: int = 0
    plot: str | None = None
    output_json: str | None = None

    def __post_init__(self) -> None:
        for name in ("num_labels", "fresh_rollouts", "num_resamples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: give a number above 0")
        if not 0 <= self.right_threshold < 1:
            raise ValueError(f"right_threshold = {self.right_threshold}: give a number from 0 up to, not including, 1")


def main(args: Sequence[str], prog: str) -> int:
    """Run the command; returns its exit status."""
    return run(parse_settings(AuditSettings, args, prog=prog, description="Measure how good labels are."))


def run(settings: AuditSettings) -> int:
    """Audit, and print the figures."""
    import json

    from mm_prm.annotation.audit import exact_correctness, sample_labels, tree_labels
    from mm_prm.annotation.label_quality import label_quality
    from mm_prm.commands.files import read_trees, write_json
    from mm_prm.data.features import validate_rows

    plot = _check_plot(settings.plot)
    with reading_input(settings.trees):
        trees = list(read_trees(settings.trees))
        validate_rows("tree", trees)
        labels = tree_labels(trees, settings.step_values)
        if not labels:
            raise ValueError("there is no label in the trees")
        is_mini = all(tree["problem_id"].startswith("mini-") for tree in trees)
    reference = settings.reference or ("exact" if is_mini else "rollouts")
    if reference == "exact" and not is_mini:
        raise InputError("reference: 'exact': only the mini world knows exactly; use 'rollouts'")
    num_labels = settings.num_labels or (len(labels) if reference == "exact" else _LABELS_MEASURED)
    labels = sample_labels(labels, num_labels, settings.seed)
    find = _problem_finder(settings, labels, is_mini)
    if reference == "exact":
        with reading_input("reference 'exact'"):
            values = exact_correctness(labels)
    else:
        values = _fresh_values(settings, labels, find)
        policies = {json.loads(tree["settings"]).get("policy", "") for tree in trees}
        if not all(_samples_alike(policy, settings.policy_identity()) for policy in policies):
            print(
                "the policy or its sampling is not that of the trees: the labels are held against another policy's values",
                file=sys.stderr,
            )
    with reading_input(settings.trees):
        quality = label_quality(
            labels,
            values,
            right_threshold=settings.right_threshold,
            num_resamples=settings.num_resamples,
            seed=settings.seed,
        )
    report = {
        "reference": reference,
        "fresh_rollouts": settings.fresh_rollouts if reference == "rollouts" else None,
        "step_values": settings.step_values,
        "trees": len(trees),
        **quality,
    }
    write_json(settings.output_json, report)
    print_report(report)
    if plot is not None:
        from mm_prm.report.label_quality import plot_label_quality

        print(f"plot: {plot_label_quality(report, plot)}")
    return 0


def _check_plot(name: str | None) -> Path | None:
    if name is None:
        return None
    path = Path(name).expanduser()
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"plot: {path}: give a name that ends in .png, .svg or .pdf")
    with reading_input("plot"):
        path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _samples_alike(one: str, other: str) -> bool:
    """Whether two identities of policies have one checkpoint and one way to sample from it."""
    import json

    def sampling(identity: str) -> Any:
        parts = json.loads(identity)
        return parts.get("checkpoint"), {**parts["settings"], "dtype": None}

    try:
        return sampling(one) == sampling(other)
    except (ValueError, KeyError, AttributeError):  # a policy of the user's own describes itself as it likes
        return one == other


def _problem_finder(
    settings: AuditSettings, labels: "Sequence[Label]", is_mini: bool
) -> Callable[[str], Mapping[str, Any]]:
    from functools import lru_cache

    from mm_prm.data import load_problems
    from mm_prm.data.mini import problem_from_id

    if settings.problems is not None:
        with reading_input(settings.problems):
            problems, _ = load_problems(settings.problems, image_root=settings.image_root, on_bad_row="skip")
            places = {problem_id: place for place, problem_id in enumerate(problems["id"])}
            missing = sorted({label.problem_id for label in labels} - set(places))
            if missing:
                raise ValueError(f"{len(missing)} problems of the trees are not there, {missing[0]!r} for one")
    elif not is_mini:
        raise InputError("problems: are needed for fresh rollouts: give those that were annotated")

    @lru_cache(maxsize=256)
    def find(problem_id: str) -> Mapping[str, Any]:
        return problem_from_id(problem_id).row() if settings.problems is None else problems[places[problem_id]]

    return find


def _fresh_values(
    settings: AuditSettings, labels: "Sequence[Label]", find: Callable[[str], Mapping[str, Any]]
) -> "np.ndarray":
    from mm_prm.annotation.audit import fresh_values
    from mm_prm.chat_client import ChatServerError
    from mm_prm.commands.progress import ProgressBar

    with reading_input("policy"):
        settings.check_policy()
    with reading_input("judge"):
        settings.check_judge()
    policy = settings.open_policy()
    with reading_input("judge"):
        judge = settings.open_judge()
    try:
        with ProgressBar("audit", len(labels)) as bar:
            return fresh_values(
                labels,
                find,
                policy,
                judge,
                num_rollouts=settings.fresh_rollouts,
                seed=settings.seed,
                # Rules are quick, and hold Python's lock; a language model wants many requests at once.
                judge_concurrency=1 if settings.judge == "rules" else settings.judge_max_concurrency,
                on_progress=bar.update,
            )
    except ChatServerError as error:
        raise InputError(str(error)) from error


def print_report(report: Mapping[str, Any]) -> None:
    """Print the figures of an audit."""
    against = "exact correctness" if report["reference"] == "exact" else f"{report['fresh_rollouts']} fresh rollouts"
    left_out = f", {report['left_out']} without a reference" if report["left_out"] else ""
    print(
        f"{report['labels']} {report['step_values']} labels of {report['problems']} problems against {against}{left_out}"
    )
    print(f"right if above {report['right_threshold']}; 95 % intervals by bootstrap over problems\n")
    for name, title in (
        ("share_right", "right by the reference"),
        ("auc", "AUC"),
        ("auc_within_problems", "AUC within problems"),
        ("disagreement", "on the wrong side"),
        ("mean_absolute_error", "mean absolute error"),
        ("mean_squared_error", "mean squared error"),
        ("expected_calibration_error", "expected calibration error"),
    ):
        print(f"{title:<27}{_estimate(report[name])}")
    print(f"\n{'label':<12}{'labels':>8}  mean label  reference")
    for row in report["calibration"]:
        place = f"{row['from']:.1f} to {row['to']:.1f}"
        print(f"{place:<12}{row['labels']:>8}  {row['mean_label']:<10.3f}  {_estimate(row['mean_reference'])}")
    for table, column, title in (
        ("by_depth", "depth", "steps"),
        ("by_num_judged", "num_judged", "judged"),
        ("at_fewer_rollouts", "rollouts", "rollouts"),
    ):
        aucs = table == "at_fewer_rollouts"
        print(
            f"\n{title:<12}{'labels':>8}  {'on the wrong side':<21}{'mean squared error':<21}{'AUC' * aucs}".rstrip()
        )
        for row in report[table]:
            auc = _estimate(row["auc"]) if aucs else ""
            error = f"{_estimate(row['disagreement']):<21}{_estimate(row['mean_squared_error']):<21}"
            print(f"{row[column]:<12}{row['labels']:>8}  {error}{auc}".rstrip())
    if report["judge"] is not None:
        judge = report["judge"]
        print(
            f"\njudge of steps on {judge['labels']} labels: AUC {_estimate(judge['auc'])}, on the wrong side "
            f"{_estimate(judge['disagreement'])}"
        )
        print(
            f"it agrees with {_estimate(judge['consensus'])} of them; on the wrong side are "
            f"{_estimate(judge['monte_carlo']['disagreement'])} of all, and "
            f"{_estimate(judge['monte_carlo_in_consensus']['disagreement'])} of those with consensus"
        )


def _estimate(estimate: Mapping[str, float] | None) -> str:
    if estimate is None:
        return "-"
    return f"{estimate['value']:.3f} ({estimate['low']:.3f}-{estimate['high']:.3f})"
