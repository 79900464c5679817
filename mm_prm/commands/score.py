"""`mm-prm score`: candidate pools in, the same pools with a score for each step out.

mm-prm score --pools candidates.jsonl --problems problems.json --model path/to/prm --output pools.parquet
mm-prm score --pools candidates.jsonl --problems problems.json --base_url http://127.0.0.1:8000 --output pools.parquet
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mm_prm.commands import InputError, reading_input
from mm_prm.commands.scorer_settings import ScorerSettings
from mm_prm.settings import parse_settings

if TYPE_CHECKING:
    import datasets


@dataclass(kw_only=True)
class ScoreSettings(ScorerSettings):
    """
    Which candidates are scored, and where the scores go.

    Args:
        pools (`str`):
            Candidates: a folder, or a .parquet, .jsonl or .json file, with `problem_id` and `candidates` (for each
            candidate the list of its steps). `answers` and `correct` are kept; where they are missing, rules judge.
        problems (`str`):
            Problems of the pools; see `mm-prm annotate`.
        output (`str`):
            Where the scored pools go: a folder, or a .parquet or .jsonl file.
        journal (`str`, *optional*):
            SQLite file on a local disk that keeps what is scored, so that a run that was killed goes on after it. Beside
            the output if not given.
        image_root (`str`, *optional*):
            Folder within which image paths of the problems lie. The file's own folder if not given.
        on_bad_row (`str`, *optional*, defaults to `"raise"`):
            At a problem that cannot be used: stop, or leave it and its candidates out.
        judge_timeout_seconds (`float`, *optional*, defaults to `5.0`):
            Time limit of one comparison of formulas.
        output_json (`str`, *optional*):
            Write the summary there, too.
    """

    pools: str
    problems: str
    output: str
    journal: str | None = None
    image_root: str | None = None
    on_bad_row: Literal["raise", "skip"] = "raise"
    judge_timeout_seconds: float = 5.0
    output_json: str | None = None

    def __post_init__(self) -> None:
        self.check_scorer()


def main(args: Sequence[str], prog: str) -> int:
    """Run the command; returns its exit status."""
    return run(
        parse_settings(ScoreSettings, args, prog=prog, description="Give every step of every candidate its score.")
    )


def run(settings: ScoreSettings) -> int:
    """Score, write the pools and print a summary."""
    import time

    from mm_prm.annotation.journal import Journal, JournalError
    from mm_prm.commands.files import check_output, read_table, write_json, write_rows, write_settings_beside
    from mm_prm.data import load_problems

    output = check_output(settings.output, settings.problems)  # pools may be scored in place
    rows = read_table(settings.pools)
    with reading_input(settings.problems):
        problems, bad_problems = load_problems(
            settings.problems, image_root=settings.image_root, on_bad_row=settings.on_bad_row
        )
    places = {problem_id: place for place, problem_id in enumerate(problems["id"])}
    left_out = {entry["id"]: entry["reason"] for entry in bad_problems}
    with reading_input(settings.pools):
        pools = [pool for pool in _checked(rows) if not _is_left_out(pool["problem_id"], places, left_out)]
    if not pools:
        raise InputError(f"{settings.pools}: there are no candidates to score")
    write_settings_beside(output, settings)

    journal_path = settings.journal or f"{output}.journal.sqlite"
    problems = problems.select([places[pool["problem_id"]] for pool in pools])
    began = time.perf_counter()
    try:
        with Journal(journal_path) as journal:
            scores = _scores(settings, problems, [pool["candidates"] for pool in pools], journal)
    except JournalError as error:
        raise InputError(str(error)) from error
    except KeyboardInterrupt:
        print(
            f"interrupted; what is scored is in {journal_path}, and the same command goes on after it", file=sys.stderr
        )
        return 130
    write_rows("pool", _scored(pools, problems, scores, settings.judge_timeout_seconds), output)
    report = {
        "problems": len(pools),
        "candidates": sum(len(pool["candidates"]) for pool in pools),
        "steps": sum(len(steps) for pool in pools for steps in pool["candidates"]),
        "seconds": round(time.perf_counter() - began, 3),
        "left_out": [{"id": name, "reason": reason} for name, reason in left_out.items()],
    }
    write_json(settings.output_json, report)
    print(
        f"{report['problems']} problems, {report['candidates']} candidates, {report['steps']} steps scored in "
        f"{report['seconds']:.1f} s"
    )
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    print(f"pools: {settings.output}")
    return 0


def _scores(
    settings: ScoreSettings, problems: "datasets.Dataset", candidates: Sequence[Any], journal: Any
) -> list[list[list[float]]]:
    from mm_prm.commands.progress import ProgressBar
    from mm_prm.evaluation import score_candidates

    identity = settings.scorer_identity()
    with _reading_scores(), ProgressBar("score", len(problems)) as bar:
        return score_candidates(problems, candidates, settings.open_scorer, identity, journal, bar.update)


@contextmanager
def _reading_scores() -> Iterator[None]:
    from mm_prm.inference.served import ScoreServerError

    try:
        yield
    except ScoreServerError as error:
        raise InputError(str(error)) from error


def _checked(rows: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Pool rows without scores; with `answers` and `correct` only where the input has them."""
    from mm_prm.data.features import validate_row

    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            validate_row("pool", row, number)
        pool = {name: row[name] for name in ("problem_id", "candidates", "answers", "correct") if name in row}
        size = len(pool["candidates"]) if isinstance(pool.get("candidates"), list) else 0
        validate_row("pool", {"answers": [""] * size, "correct": [None] * size, **pool, "step_scores": []}, number)
        yield pool


def _is_left_out(problem_id: str, places: Mapping[str, int], left_out: Mapping[str, str]) -> bool:
    if problem_id not in places and problem_id not in left_out:
        raise ValueError(f"pool {problem_id!r}: problem_id: there is no problem with this id")
    return problem_id not in places


def _scored(
    pools: Sequence[dict[str, Any]],
    problems: "datasets.Dataset",
    scores: Sequence[Sequence[Sequence[float]]],
    judge_timeout_seconds: float,
) -> Iterator[dict[str, Any]]:
    from mm_prm.inference import build_pools
    from mm_prm.judges.rules import RulesJudge

    judge = RulesJudge(judge_timeout_seconds)
    for pool, problem, step_scores in zip(pools, problems.remove_columns("images"), scores, strict=True):
        [judged] = build_pools([problem], [pool["candidates"]], judge, [step_scores])
        yield judged | pool | {"step_scores": judged["step_scores"]}
