"""`mm-prm write-steps`: plain solutions in, the same solutions in steps out, for `mm-prm train-policy`.

mm-prm write-steps --input solutions.json --output steps.jsonl --model NAME --base_url http://127.0.0.1:8000/v1
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from mm_prm.commands import InputError, reading_input, refuse_rows
from mm_prm.settings import parse_settings

if TYPE_CHECKING:
    import datasets

    from mm_prm.annotation.journal import Journal
    from mm_prm.chat_client import ChatCompletion
    from mm_prm.policies.step_writer import StepWriter, Written

# Problem, attempts that are over, and what became of it.
_Result: TypeAlias = "tuple[str, int, Written]"

# Requests handed to the client for each that it may have under way: while answers are checked, the server has work.
_REQUESTS_AHEAD = 2


@dataclass
class WriteStepsSettings:
    """
    Which solutions are rewritten by which model, and what is accepted.

    Args:
        input (`str`):
            Rows with `solution` (plain text) and `id` or `problem_id`: a .json, .jsonl or .parquet file, or a folder.
        output (`str`):
            JSON lines: `problem_id` and `completions`, the steps. What was not accepted is in OUTPUT.left_out.jsonl with
            its reason.
        model (`str`):
            Name under which the servers serve the model.
        base_url (`list[str]`):
            Addresses of one or more OpenAI-compatible servers, up to and including /v1. The key is read from
            OPENAI_API_KEY.
        problems (`str`, *optional*):
            Problems of the solutions, with their gold answers; see `mm-prm annotate`. The input itself if not given, whose
            rows then are problems, too.
        image_root (`str`, *optional*):
            Folder within which image paths of the problems lie. The file's own folder if not given.
        on_bad_row (`str`, *optional*, defaults to `"raise"`):
            At a row that cannot be used: stop before anything is asked, or leave it out and list it.
        show_images (`bool`, *optional*, defaults to `False`):
            Whether the model sees the pictures of the problem.
        attempts (`int`, *optional*, defaults to `3`):
            How often a solution is asked for whose steps are not accepted.
        max_steps (`int`, *optional*, defaults to `24`):
            Most steps of a solution, the answer included. The fewest are 2.
        max_tokens (`int`, *optional*, defaults to `4096`):
            Most tokens that the model may write.
        judge_timeout_seconds (`float`, *optional*, defaults to `5.0`):
            Time limit of one comparison of formulas.
        journal (`str`, *optional*):
            File that keeps what is finished; a run that was killed goes on after it. OUTPUT.journal.sqlite if not given.
        max_concurrency (`int`, *optional*, defaults to `64`):
            Most requests under way at once.
        request_seconds (`float`, *optional*, defaults to `120.0`):
            Time limit of one attempt at a request.
        max_retries (`int`, *optional*, defaults to `5`):
            Most attempts after the first at a request that fails.
        output_json (`str`, *optional*):
            Write the summary there, too.
    """

    input: str
    output: str
    model: str
    base_url: list[str] = field(default_factory=list)
    problems: str | None = None
    image_root: str | None = None
    on_bad_row: Literal["raise", "skip"] = "raise"
    show_images: bool = False
    attempts: int = 3
    max_steps: int = 24
    max_tokens: int = 4096
    judge_timeout_seconds: float = 5.0
    journal: str | None = None
    max_concurrency: int = 64
    request_seconds: float = 120.0
    max_retries: int = 5
    output_json: str | None = None


@dataclass
class _Task:
    """A solution to rewrite: its row, the place of its problem, and, once it is asked about, the rest."""

    row: int
    place: int
    solution: str
    problem: Mapping[str, Any] = field(default_factory=dict)
    key: str = ""
    attempts: int = 0  # that are over
    is_kept: bool = False  # by the journal, so that nothing is asked


def main(args: Sequence[str], prog: str) -> int:
    """Run the command; returns its exit status: 1 if servers left solutions open, or none was accepted."""
    return run(parse_settings(WriteStepsSettings, args, prog=prog, description="Write plain solutions down in steps."))


def run(settings: WriteStepsSettings) -> int:
    """Ask, check, write what was accepted and print the summary."""
    from mm_prm.annotation.identity import code_digest, describe
    from mm_prm.annotation.journal import Journal, JournalError
    from mm_prm.chat_client import ChatServerError
    from mm_prm.commands.files import write_json, write_settings_beside
    from mm_prm.commands.progress import ProgressBar
    from mm_prm.judges import RulesJudge
    from mm_prm.policies.step_writer import StepWriter

    output = _check(settings)
    problems, tasks, bad = _read(settings)
    write_settings_beside(output, settings)
    journal_path = settings.journal or f"{output}.journal.sqlite"
    with reading_input("judge_timeout_seconds"):
        judge = RulesJudge(settings.judge_timeout_seconds)
    with reading_input("base_url"):
        writer = StepWriter(
            settings.model,
            settings.base_url,
            judge,
            max_steps=settings.max_steps,
            max_tokens=settings.max_tokens,
            show_images=settings.show_images,
            max_concurrency=settings.max_concurrency,
            timeout_seconds=settings.request_seconds,
            max_retries=settings.max_retries,
        )
    judge_identity = describe(
        RulesJudge, None, {"timeout_seconds": settings.judge_timeout_seconds}, RulesJudge.packages
    )
    identity = code_digest("mm_prm.policies.step_writer") + judge_identity
    finished: dict[int, _Result] = {}
    done = kept = accepted = 0
    try:
        with Journal(journal_path) as journal, ProgressBar("write-steps", len(tasks)) as bar:
            for task, written in _written(problems, tasks, identity, writer, journal, settings):
                finished[task.row] = (problems[task.place]["id"], task.attempts, written)
                done += written.answered
                kept += task.is_kept
                accepted += bool(written.steps)
                bar.update(len(finished), kept, f"{accepted} accepted")
    except JournalError as error:
        raise InputError(str(error)) from error
    except ChatServerError as error:
        raise InputError(
            f"base_url: {error}; {done} finished solutions are in {journal_path}, and the same command goes on after them"
        ) from error
    except KeyboardInterrupt:
        print(
            f"interrupted; {done} finished solutions are in {journal_path}, and the same command goes on after them",
            file=sys.stderr,
        )
        return 130
    finally:
        writer.client.close()
    finished = dict(sorted(finished.items()))  # in the order of the input
    _write(output, finished)
    report = _report(finished, bad)
    write_json(settings.output_json, report)
    _print(report, settings.output)
    return 1 if report["not_answered"] or not report["accepted"] else 0


def _check(settings: WriteStepsSettings) -> Path:
    from mm_prm.commands.files import check_lines_output

    if not settings.base_url:
        raise InputError("base_url: name the server that serves the model, for example http://127.0.0.1:8000/v1")
    for name, least in (("attempts", 1), ("max_steps", 2), ("max_tokens", 1)):
        if getattr(settings, name) < least:
            raise InputError(f"{name}: {getattr(settings, name)} has to be at least {least}")
    if Path(settings.output).suffix != ".jsonl":
        raise InputError(f"output: {Path(settings.output).expanduser()}: name a .jsonl file")
    return check_lines_output(settings.output, settings.input)


def _read(settings: WriteStepsSettings) -> tuple["datasets.Dataset", list[_Task], list[str]]:
    """The problems, the solutions, and what is wrong with the rows that are left out."""
    from mm_prm.commands.files import read_table
    from mm_prm.data import load_problems

    rows: Any = read_table(settings.input)
    problems_path = settings.problems or settings.input
    with reading_input(problems_path):
        problems, skipped = load_problems(
            problems_path, image_root=settings.image_root, on_bad_row=settings.on_bad_row
        )
    if not isinstance(rows, list):  # a table, whose pictures are read with the problems
        rows = rows.select_columns([name for name in rows.column_names if name in ("id", "problem_id", "solution")])
    if not settings.show_images:
        problems = problems.remove_columns("images")
    places = {problem_id: place for place, problem_id in enumerate(problems["id"])}
    reasons = {entry["id"]: entry["reason"] for entry in skipped}
    tasks, bad = [], []
    for number, row in enumerate(rows):
        try:
            problem_id, solution = _solution(row)
            if problem_id not in places:
                raise ValueError(reasons.get(problem_id, f"there is no problem {problem_id!r}"))
        except ValueError as error:
            bad.append(f"{settings.input}, row {number}: {error}")
        else:
            tasks.append(_Task(number, places[problem_id], solution))
    if settings.on_bad_row == "raise":
        refuse_rows(bad)
    return problems, tasks, bad


def _solution(row: Any) -> tuple[str, str]:
    if not isinstance(row, Mapping):
        raise ValueError(f"is {type(row).__name__} instead of an object")
    problem_id = row["problem_id"] if row.get("problem_id") is not None else row.get("id")
    if isinstance(problem_id, bool) or not isinstance(problem_id, str | int):
        raise ValueError(f"problem_id: is {problem_id!r:.60} instead of text")
    solution = row.get("solution")
    if not isinstance(solution, str) or not solution.strip():
        raise ValueError(f"solution: is {solution!r:.60} instead of text")
    return str(problem_id).strip(), solution


def _written(
    problems: "datasets.Dataset",
    tasks: Iterable[_Task],
    identity: str,
    writer: "StepWriter",
    journal: "Journal",
    settings: WriteStepsSettings,
) -> Iterator[tuple[_Task, "Written"]]:
    """What becomes of the solutions, as they are finished; what a server answered is committed before."""
    from mm_prm.policies.step_writer import Written

    underway: dict[Future[ChatCompletion], _Task] = {}
    waiting = iter(tasks)

    def ask(task: _Task) -> None:
        underway[writer.submit(task.problem, task.solution, task.attempts)] = task

    try:
        while True:
            while len(underway) < _REQUESTS_AHEAD * settings.max_concurrency:
                task = next(waiting, None)
                if task is None:
                    break
                task.problem = problems[task.place]
                task.key = hashlib.sha256((identity + writer.key(task.problem, task.solution)).encode()).hexdigest()
                kept = journal.get(task.key)
                task.attempts = kept["attempts"] if kept else 0
                if kept and (kept["steps"] or kept["attempts"] >= settings.attempts):
                    task.is_kept = True
                    yield task, Written(tuple(kept["steps"]), kept["reason"])
                else:
                    ask(task)
            if not underway:
                return
            for future in wait(underway, return_when=FIRST_COMPLETED).done:
                task = underway.pop(future)
                written = writer.read(task.problem, task.solution, future)
                if not written.answered:
                    yield task, written
                    continue
                task.attempts += 1
                if not written.steps and task.attempts < settings.attempts:
                    ask(task)
                    continue
                row = {"steps": list(written.steps), "reason": written.reason, "attempts": task.attempts}
                journal.commit(task.key, row)
                task.problem = {}
                yield task, written
    finally:
        for future in underway:  # after an error, or Ctrl-C
            future.cancel()


def _write(output: Path, finished: Mapping[int, "_Result"]) -> None:
    """Write what was accepted, and beside it what was not."""
    accepted, left_out = [], []
    for row, (problem_id, attempts, written) in finished.items():
        if written.steps:
            accepted.append({"problem_id": problem_id, "completions": list(written.steps)})
        else:
            left_out.append({"problem_id": problem_id, "row": row, "attempts": attempts, "reason": written.reason})
    for file, rows in ((output, accepted), (output.with_name(f"{output.name}.left_out.jsonl"), left_out)):
        part = file.with_name(f".{file.name}.part")
        with part.open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        part.replace(file)  # readers never see half a file


def _report(finished: Mapping[int, "_Result"], bad: Sequence[str]) -> dict[str, Any]:
    """The summary, as plain data."""
    results = [written for _, _, written in finished.values()]
    refused = [written.reason for written in results if written.answered and not written.steps]
    reasons = Counter(reason.partition(":")[0] for reason in refused)
    return {
        "solutions": len(results),
        "accepted": sum(bool(written.steps) for written in results),
        "not_accepted": len(refused),
        "not_answered": sum(not written.answered for written in results),
        "attempts": sum(attempts for _, attempts, _ in finished.values()),
        "steps": sum(len(written.steps) for written in results),
        "reasons": dict(reasons.most_common()),
        "bad_rows": list(bad),
    }


def _print(report: Mapping[str, Any], output: str) -> None:
    print(
        f"{report['solutions']} solutions, {report['attempts']} answers: {report['accepted']} accepted, "
        f"{report['not_accepted']} not accepted, {report['not_answered']} not answered"
    )
    for reason, count in report["reasons"].items():
        print(f"  {count} not accepted: {reason}")
    if report["not_answered"]:
        print("the same command asks again about what was not answered")
    for entry in report["bad_rows"]:
        print(f"left out: {entry}")
    if report["accepted"]:
        print(f"steps: {output} ({report['steps'] / report['accepted']:.1f} a solution)")
