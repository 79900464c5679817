"""`mm-prm evaluate`: a policy and a process reward model in, their numbers on a benchmark out.

mm-prm evaluate --benchmark mathvision --policy path/or/hub-id --model path/or/hub-id --output evaluation
mm-prm evaluate --benchmark processbench --model path/or/hub-id --output evaluation
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mm_prm.commands import InputError, reading_input
from mm_prm.commands.judge_settings import JudgeSettings
from mm_prm.commands.policy_settings import PolicySettings
from mm_prm.commands.scorer_settings import ScorerSettings
from mm_prm.settings import parse_settings

if TYPE_CHECKING:
    from mm_prm.annotation.journal import Journal
    from mm_prm.data.benchmarks import LoadedBenchmark


@dataclass(kw_only=True)
class EvaluateSettings(PolicySettings, JudgeSettings, ScorerSettings):
    """
    What is measured on which benchmark.

    Args:
        benchmark (`str`):
            mm-k12, olympiadbench, mathvista, mathverse, mathvision, processbench or visualprocessbench.
        output (`str`):
            Folder of the results. What is finished is kept there in a journal, and a run that was killed goes on.
        candidates (`str`, *optional*):
            Solutions to score instead of the policy's: a folder, or a .parquet, .jsonl or .json file, with `problem_id`
            and `candidates` (for each candidate the list of its steps).
        benchmark_path (`str`, *optional*):
            Local copy of the benchmark: a file of its columns, or a folder of them. From the Hub if not given.
        limit (`int`, *optional*):
            Take at most so many rows of each split.
        on_bad_row (`str`, *optional*, defaults to `"raise"`):
            At a row of the benchmark that cannot be used: stop, or leave it out and list it.
        output_json (`str`, *optional*):
            Write the results there, too.
        num_candidates (`int`, *optional*, defaults to `16`):
            Solutions of each problem.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the solutions and of the resampling.
        policy_max_new_tokens (`int`, *optional*, defaults to `1024`):
            Most tokens of a solution. One that reaches it has no answer.
        threshold (`float`, *optional*):
            For benchmarks of labelled steps: a threshold fixed beforehand, beside 0.5 and the oracle's.
        calibrate_on (`str`, *optional*):
            For benchmarks of labelled steps: the subset on which a threshold is calibrated. It is then not measured.
        neutral (`str`, *optional*, defaults to `"leave_out"`):
            For benchmarks of labelled steps: what neutral steps count as.
        num_resamples (`int`, *optional*, defaults to `2000`):
            Number of bootstrap resamples of the problems.
    """

    benchmark: str
    output: str
    candidates: str | None = None
    benchmark_path: str | None = None
    limit: int | None = None
    on_bad_row: Literal["raise", "skip"] = "raise"
    output_json: str | None = None
    num_candidates: int = 16
    seed: int = 0
    policy_max_new_tokens: int = 1024
    threshold: float | None = None
    calibrate_on: str | None = None
    neutral: Literal["leave_out", "wrong"] = "leave_out"
    num_resamples: int = 2000

    def __post_init__(self) -> None:
        for name in ("num_candidates", "num_resamples", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: give a number above 0")
        self.check_scorer()


def main(args: Sequence[str], prog: str) -> int:
    """Run the command; returns its exit status."""
    description = "Measure a policy and a process reward model on a benchmark."
    return run(parse_settings(EvaluateSettings, args, prog=prog, description=description))


def run(settings: EvaluateSettings) -> int:
    """Sample, score, judge and measure; print the table."""
    from mm_prm.annotation.journal import Journal, JournalError
    from mm_prm.chat_client import ChatServerError
    from mm_prm.commands.files import write_json
    from mm_prm.data.benchmarks import load_benchmark
    from mm_prm.inference.served import ScoreServerError
    from mm_prm.settings import write_settings

    output = Path(settings.output).expanduser()
    with reading_input(settings.benchmark):
        output.mkdir(parents=True, exist_ok=True)
        loaded = load_benchmark(
            settings.benchmark, settings.benchmark_path, on_bad_row=settings.on_bad_row, limit=settings.limit
        )
    if loaded.solutions and settings.candidates:
        raise InputError(f"candidates: {settings.benchmark} has its own solutions; leave it out")
    if settings.judge != "rules" and settings.judge_cache is None:
        settings = replace(settings, judge_cache=str(output / "verdicts.sqlite"))
    with reading_input("policy"):
        settings.check_policy()
    with reading_input("judge"):
        settings.check_judge()
    settings = replace(settings, model=settings.find_model())
    settings.check_model()
    write_settings(output, settings)
    try:
        with Journal(output / "journal.sqlite") as journal:
            measure = _measure_steps if loaded.solutions else _measure_answers
            metrics = measure(settings, loaded, journal, output)
    except (JournalError, ChatServerError, ScoreServerError) as error:
        raise InputError(str(error)) from error
    report = {
        "benchmark": settings.benchmark,
        "benchmark_path": settings.benchmark_path,
        "limit": settings.limit,
        "num_benchmark_problems": len(loaded.problems),
        "policy": None if loaded.solutions or settings.candidates else settings.policy,
        "model": settings.model,
        "model_checkpoint": settings.model_checkpoint,
        "answer_rule": loaded.benchmark.answer_rule,
        "left_out": loaded.left_out,
        "paper": dict(loaded.benchmark.paper),
        **metrics,
    }
    write_json(str(output / "results.json"), report)
    write_json(settings.output_json, report)
    for name, percent in loaded.benchmark.paper.items():
        print(f"the MM-PRM paper: {name}: {percent:.1f} %")
    for entry in loaded.left_out:
        print(f"left out: {entry['id']}: {entry['reason']}")
    print(f"results: {output / 'results.json'}")
    return 0


def _measure_answers(
    settings: EvaluateSettings, loaded: "LoadedBenchmark", journal: "Journal", output: Path
) -> dict[str, Any]:
    """Best-of-N over sampled solutions, or those of a file."""
    from concurrent.futures import ThreadPoolExecutor

    from mm_prm.commands.best_of_n import print_tables
    from mm_prm.commands.files import write_rows
    from mm_prm.evaluation import ToleranceJudge, sample_candidates
    from mm_prm.evaluation.stages import count_empty
    from mm_prm.inference import build_pools
    from mm_prm.judges import RulesJudge
    from mm_prm.metrics.best_of_n.best_of_n import BestOfN

    problems = loaded.problems
    if settings.candidates is not None:
        chosen, candidates = _read_candidates(settings.candidates, problems["id"][:])
        problems = problems.select(chosen)
    else:
        identity = settings.policy_identity()
        with _progress("solutions", len(problems)) as show:
            candidates = sample_candidates(
                problems, settings.open_policy, identity, settings.num_candidates, settings.seed, journal, show
            )
    scores = _scores(settings, problems, candidates, journal)
    with reading_input("judge"):
        judge = ToleranceJudge(settings.open_judge(), RulesJudge(settings.judge_timeout_seconds), loaded.tolerances)
    # A language model answers many questions at once; rules are faster one by one than threads are.
    with ThreadPoolExecutor(1 if settings.judge == "rules" else settings.judge_max_concurrency) as threads:
        rows = problems.remove_columns("images")
        one_each = threads.map(lambda *one: build_pools([one[0]], [one[1]], judge, [one[2]]), rows, candidates, scores)
        pools = [pool for [pool] in one_each]
    write_rows("pool", pools, output / "pools.parquet")
    columns = {name: [pool[name] for pool in pools] for name in ("correct", "step_scores", "answers", "candidates")}
    results = BestOfN().compute(**columns, num_resamples=settings.num_resamples, seed=settings.seed)
    counts = {
        "candidates_without_steps": count_empty(candidates),
        "unknown_verdicts": sum(verdict is None for pool in pools for verdict in pool["correct"]),
    }
    assert settings.model is not None
    print_tables(results, Path(settings.model).name)
    print(", ".join(f"{number} {name.replace('_', ' ')}" for name, number in counts.items()))
    return counts | {"num_problems": len(pools), "metrics": results}


def _measure_steps(
    settings: EvaluateSettings, loaded: "LoadedBenchmark", journal: "Journal", output: Path
) -> dict[str, Any]:
    """Wrong steps found, on solutions whose steps are labelled."""
    import datasets

    from mm_prm.metrics.step_errors.step_errors import StepErrors

    subsets = sorted({solution["subset"] for solution in loaded.solutions})
    if settings.calibrate_on is not None and not (settings.calibrate_on in subsets and len(subsets) > 1):
        there_are = ", ".join(subsets)
        raise InputError(
            f"calibrate_on = {settings.calibrate_on!r}: give one of several subsets; there are {there_are}"
        )
    by_problem: dict[str, list[dict[str, Any]]] = {problem_id: [] for problem_id in loaded.problems["id"]}
    for solution in loaded.solutions:
        by_problem[solution["problem_id"]].append(solution)
    candidates = [[solution["steps"] for solution in solutions] for solutions in by_problem.values()]
    scores = _scores(settings, loaded.problems, candidates, journal)
    rows = [
        solution | {"step_scores": step_scores}
        for solutions, each in zip(by_problem.values(), scores, strict=True)
        for solution, step_scores in zip(solutions, each, strict=True)
    ]
    validation = [row for row in rows if row["subset"] == settings.calibrate_on]
    measured = [row for row in rows if row["subset"] != settings.calibrate_on]
    datasets.Dataset.from_list(measured).to_parquet(str(output / "solutions.parquet"))
    kind = "first_error" if "first_error" in rows[0] else "step_labels"

    def columns(chosen: list[dict[str, Any]], *names: str) -> dict[str, list[Any]]:
        return {name: [row[name] for row in chosen] for name in ("step_scores", kind, *names)}

    results = StepErrors().compute(
        **columns(measured, "subset"),
        problem_ids=[row["problem_id"] for row in measured],
        threshold=settings.threshold,
        validation=columns(validation) if validation else None,
        neutral=settings.neutral,
        num_resamples=settings.num_resamples,
        seed=settings.seed,
    )
    print_step_tables(results)
    return {"num_problems": len({row["problem_id"] for row in measured}), "metrics": results}


def _read_candidates(path: str, problem_ids: Sequence[str]) -> tuple[list[int], list[list[list[str]]]]:
    """Which problems have solutions in the file, and these solutions."""
    from mm_prm.commands.files import read_table
    from mm_prm.data.features import validate_row

    places = {problem_id: place for place, problem_id in enumerate(problem_ids)}
    found: dict[int, list[list[str]]] = {}
    with reading_input(path):
        for number, row in enumerate(read_table(path, key="pools")):
            pool = dict(row) if isinstance(row, Mapping) else row
            if isinstance(pool, dict):
                size = len(pool["candidates"]) if isinstance(pool.get("candidates"), list) else 0
                pool = {name: pool[name] for name in ("problem_id", "candidates") if name in pool}
                pool |= {"answers": [""] * size, "correct": [None] * size, "step_scores": []}
            validate_row("pool", pool, number)
            if pool["problem_id"] not in places:
                raise InputError(f"{path}: row {number}: problem_id = {pool['problem_id']!r}: no such problem")
            if places[pool["problem_id"]] in found:
                raise InputError(f"{path}: row {number}: problem_id = {pool['problem_id']!r}: occurs twice")
            found[places[pool["problem_id"]]] = pool["candidates"]
    if not found:
        raise InputError(f"{path}: there are no rows")
    chosen = sorted(found)
    return chosen, [found[place] for place in chosen]


def _scores(
    settings: EvaluateSettings, problems: Any, candidates: Sequence[Any], journal: "Journal"
) -> list[list[list[float]]]:
    from mm_prm.evaluation import score_candidates

    identity = settings.scorer_identity()
    with _progress("score", len(problems)) as show:
        return score_candidates(problems, candidates, settings.open_scorer, identity, journal, show)


def _progress(name: str, total: int) -> AbstractContextManager[Callable[[int, int], None]]:
    from contextlib import contextmanager

    from mm_prm.commands.progress import ProgressBar

    @contextmanager
    def bar():
        with ProgressBar(name, total) as shown:
            yield shown.update

    return bar()


def print_step_tables(results: Mapping[str, Any]) -> None:
    """Print the figures of each threshold, over all by each convention and for each subset."""
    import sys

    from rich import box
    from rich.console import Console
    from rich.table import Table

    names = list(next(iter(results["thresholds"].values()))["pooled"])
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("threshold", "", *names):
        table.add_column(heading, no_wrap=True, justify="right" if heading in names else "left")
    for name, at in results["thresholds"].items():
        shown = name if name == "0.5" else f"{name} ({at['threshold']:.3f})"
        parts = {
            part.replace("_", " "): at[part] for part in ("mean_of_subsets", "pooled", "weighted_mean_of_subsets")
        }
        for part, figures in (parts | at["subsets"]).items():
            table.add_row(shown, part, *(_figure(figures[figure]) for figure in names))
            shown = ""
    print(
        f"{results['num_solutions']} solutions, {results['num_right']} right and {results['num_wrong']} wrong steps, "
        f"{results['num_neutral']} neutral, {results['num_unscored']} solutions unscored"
    )
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    auc = results["auc"]["pooled"]
    print(f"AUC of right against wrong steps: {'not defined' if auc is None else f'{auc:.3f}'}")


def _figure(figure: Mapping[str, float] | None) -> str:
    if figure is None:
        return "–"
    return f"{100 * figure['value']:.1f} [{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"
