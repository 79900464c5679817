"""`mm-prm train-policy`: solutions in, a policy that writes its solutions in steps out.

mm-prm train-policy --config policy.yaml
accelerate launch --config_file recipes/accelerate/gpus.yaml -m mm_prm.train_policy --config policy.yaml
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from mm_prm.commands import InputError, reading_input
from mm_prm.commands.train import AdapterSettings, open_adapter, train_and_save
from mm_prm.settings import parse_settings

if TYPE_CHECKING:
    import datasets

    from mm_prm.trainer import PolicyConfig

_MOST_LISTED = 20


@dataclass
class TrainPolicySettings:
    """
    What a policy is trained from.

    Args:
        solutions (`str`):
            Rows of `completions` (the steps of a solution, the last of which states the answer) with `problem_id`, as
            `mm-prm write-steps` writes them, or with `prompt` (the question) and, in a parquet file or a folder,
            `images`: a folder, a .parquet, .jsonl or .json file. Or mini:SPLIT:NUMBER[:START], the right solutions of
            problems of the mini world.
        model (`str`, *optional*, defaults to `"mini-policy"`):
            Model to start from: a folder, a Hub repository or mini-policy.
        problems (`str`, *optional*):
            Problems of the rows, for their questions and images; see `mm-prm annotate`.
        eval_solutions (`str`, *optional*):
            Rows to evaluate on.
        eval_problems (`str`, *optional*):
            Problems of the rows to evaluate on. Those of the training rows if not given.
        image_root (`str`, *optional*):
            Folder within which image paths of the problems lie. The file's own folder if not given.
        output_json (`str`, *optional*):
            Write the metrics there, too.
    """

    solutions: str
    model: str = "mini-policy"
    problems: str | None = None
    eval_solutions: str | None = None
    eval_problems: str | None = None
    image_root: str | None = None
    output_json: str | None = None


def main(args: Sequence[str], prog: str) -> int:
    """Run the command; returns its exit status."""
    from mm_prm.trainer import PolicyConfig

    settings, config, adapter = parse_settings(
        (TrainPolicySettings, PolicyConfig, AdapterSettings),
        args,
        prog=prog,
        description="Fine-tune a policy on solutions that are written in steps.",
    )
    return run(settings, config, adapter)


def run(settings: TrainPolicySettings, config: "PolicyConfig", adapter: AdapterSettings) -> int:
    """Train, save the model and print the metrics."""
    from transformers.trainer_utils import IntervalStrategy

    from mm_prm.embedded import model_path
    from mm_prm.trainer import PolicyTrainer

    rows = _read(settings.solutions, settings.problems, settings, config.on_bad_row)
    eval_rows = None
    if settings.eval_solutions is not None:
        problems = settings.eval_problems or settings.problems
        eval_rows = _read(settings.eval_solutions, problems, settings, config.on_bad_row)
    elif config.eval_strategy != "no":
        raise InputError(f"eval_strategy: {IntervalStrategy(config.eval_strategy).value} needs eval_solutions")
    with reading_input("model"):
        model = model_path(settings.model)
    with reading_input("", settings.model):  # of rows as of models: the message says which
        trainer = PolicyTrainer(
            model, config, train_dataset=rows, eval_dataset=eval_rows, peft_config=open_adapter(adapter)
        )
    status = train_and_save(trainer, (settings, config, adapter), settings.output_json)
    if trainer.is_world_process_zero() and config.step_format != "paragraphs":
        print(f"it writes its steps as {config.step_format}: --policy_step_format {config.step_format}")
    return status


def _read(
    path: str, problems_path: str | None, settings: TrainPolicySettings, on_bad_row: str
) -> "datasets.Dataset | list[dict[str, Any]]":
    """Read rows, and join their problems' questions and images."""
    from mm_prm.commands.files import columns_of, read_table
    from mm_prm.data import load_problems

    if path.startswith("mini:"):
        return _mini_solutions(path)
    rows = read_table(path)
    if "images" in columns_of(rows):
        return rows
    if problems_path is None:
        print(
            f"train-policy: {path} has no images and `problems` is not given: no picture will be seen", file=sys.stderr
        )
        return rows
    with reading_input(problems_path):
        problems, _ = load_problems(
            problems_path, image_root=settings.image_root, on_bad_row=cast("Literal['raise', 'skip']", on_bad_row)
        )
    with reading_input(path):
        return _join(rows, problems, path, skip_bad_rows=on_bad_row == "skip")


def _mini_solutions(path: str) -> "datasets.Dataset":
    import datasets

    from mm_prm.data import load_problems, mini
    from mm_prm.data.text import question_text

    with reading_input(path):
        problems, _ = load_problems(path)
    texts = problems.select_columns(["id", "question", "choices"])
    columns: dict[str, list[Any]] = {
        "prompt": [question_text(problem) for problem in texts],
        "completions": [mini.problem_from_id(problem["id"]).solution("right") for problem in texts],
    }
    rows = problems.select_columns(["id", "images"]).rename_column("id", "problem_id")
    return datasets.concatenate_datasets([rows, datasets.Dataset.from_dict(columns)], axis=1)


def _join(
    rows: "datasets.Dataset | list[dict[str, Any]]", problems: "datasets.Dataset", path: str, *, skip_bad_rows: bool
) -> "datasets.Dataset":
    """Give rows their problems' questions and images; name bad rows, or leave them out."""
    import datasets

    from mm_prm.data import RowError, join_problems
    from mm_prm.data.text import question_text

    questions = {row["id"]: question_text(row) for row in problems.select_columns(["id", "question", "choices"])}
    good: dict[str, list[Any]] = {"problem_id": [], "prompt": [], "completions": []}
    bad = []
    for number, row in enumerate(rows):
        try:
            problem_id = _problem_of(number, row, questions)
        except RowError as error:
            if not skip_bad_rows:
                raise
            bad.append(f"{path}: {error}")
            continue
        for column, value in zip(good, (problem_id, questions[problem_id], row["completions"]), strict=True):
            good[column].append(value)
    for message in bad[:_MOST_LISTED]:
        print(f"train-policy: {message}", file=sys.stderr)
    if bad:
        print(f"train-policy: {len(bad)} of {len(rows)} rows are bad and are left out", file=sys.stderr)
    if not good["problem_id"]:
        raise ValueError(f"none of the {len(rows)} rows can be trained on")
    return join_problems(datasets.Dataset.from_dict(good), problems)


def _problem_of(number: int, row: Any, questions: Mapping[str, str]) -> str:
    """The problem of a row, whose fields are checked."""
    from mm_prm.data import RowError
    from mm_prm.trainer.policy_rows import check_solution

    problem_id = row.get("problem_id") if isinstance(row, Mapping) else None
    if not isinstance(problem_id, str) or problem_id not in questions:
        raise RowError("solution", f"row {number}", "problem_id", problem_id, "there is no such problem")
    question = questions[problem_id]
    check_solution(number, {**row, "prompt": question})
    if row.get("prompt") not in (None, "", question):
        advice = f"the question of problem {problem_id!r} reads otherwise"
        raise RowError("solution", f"row {number} ({problem_id!r})", "prompt", row["prompt"], advice)
    return problem_id
