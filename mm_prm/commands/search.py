"""`mm-prm search`: problems in, candidate pools out that a policy wrote step by step under a process reward model.

mm-prm search --problems problems.json --policy path/or/hub-id --model path/to/prm --strategy dvts --output pools.jsonl
mm-prm best-of-n --pools pools.jsonl
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mm_prm.commands import InputError, reading_input
from mm_prm.commands.policy_settings import PolicySettings
from mm_prm.commands.scorer_settings import ScorerSettings
from mm_prm.settings import parse_settings

if TYPE_CHECKING:
    from mm_prm.inference import SearchConfig


@dataclass(kw_only=True)
class SearchSettings(PolicySettings, ScorerSettings):
    """
    Which problems are searched, and how.

    Args:
        problems (`str`):
            Problems; see `mm-prm annotate`.
        output (`str`):
            Where the pools go, which `mm-prm best-of-n` measures: a folder, or a .parquet or .jsonl file.
        strategy (`str`, *optional*, defaults to `"beam_search"`):
            beam_search, dvts (several trees that follow one beam each), or best_of_n, which samples whole solutions.
        token_budget (`int`, *optional*, defaults to `4096`):
            Number of generated tokens for each problem. A search that ends before starts anew.
        num_beams (`int`, *optional*, defaults to `16`):
            Number of continuations that are sampled at a time.
        branching (`int`, *optional*, defaults to `4`):
            Number of continuations of each beam; num_beams / branching beams are kept.
        aggregator (`str`, *optional*, defaults to `"min"`):
            What the scores of a beam's steps become to compare it with others: min, last, product, mean, max,
            sum_logprob, sum_logit or mean_odds.
        max_steps (`int`, *optional*, defaults to `40`):
            A beam with so many steps and no end is given up.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the continuations.
        journal (`str`, *optional*):
            SQLite file on a local disk that keeps what is finished, so that a run that was killed goes on after it.
            Beside the output if not given.
        image_root (`str`, *optional*):
            Folder within which image paths of the problems lie. The file's own folder if not given.
        on_bad_row (`str`, *optional*, defaults to `"raise"`):
            At a problem that cannot be used: stop, or leave it out.
        judge_timeout_seconds (`float`, *optional*, defaults to `5.0`):
            Time limit of one comparison of formulas.
        output_json (`str`, *optional*):
            Write the summary there, too.
    """

    problems: str
    output: str
    strategy: Literal["best_of_n", "beam_search", "dvts"] = "beam_search"
    token_budget: int = 4096
    num_beams: int = 16
    branching: int = 4
    aggregator: str = "min"
    max_steps: int = 40
    seed: int = 0
    journal: str | None = None
    image_root: str | None = None
    on_bad_row: Literal["raise", "skip"] = "raise"
    judge_timeout_seconds: float = 5.0
    output_json: str | None = None

    def __post_init__(self) -> None:
        self.check_policy()
        self.check_scorer()

    def config(self) -> "SearchConfig":
        """The settings of the search itself."""
        from mm_prm.inference import SearchConfig

        return SearchConfig(
            self.strategy,
            self.token_budget,
            self.num_beams,
            self.branching,
            self.aggregator,
            self.max_steps,
            self.seed,
        )


def main(args: Sequence[str], prog: str) -> int:
    """Run the command; returns its exit status."""
    description = "Write solutions step by step, guided by a process reward model."
    return run(parse_settings(SearchSettings, args, prog=prog, description=description))


def run(settings: SearchSettings) -> int:
    """Search, write the pools and print a summary."""
    from mm_prm.annotation.journal import Journal, JournalError
    from mm_prm.commands.files import check_output, write_json, write_rows, write_settings_beside
    from mm_prm.data import load_problems
    from mm_prm.inference import build_pools
    from mm_prm.judges.rules import RulesJudge

    output = check_output(settings.output, settings.problems)
    with reading_input("search"):
        config = settings.config()
    with reading_input(settings.problems):
        problems, bad_problems = load_problems(
            settings.problems, image_root=settings.image_root, on_bad_row=settings.on_bad_row
        )
    if not len(problems):
        raise InputError(f"{settings.problems}: there are no problems to search")
    write_settings_beside(output, settings)
    journal_path = settings.journal or f"{output}.journal.sqlite"
    try:
        with Journal(journal_path) as journal:
            results = _results(settings, problems, config, journal)
    except JournalError as error:
        raise InputError(str(error)) from error
    except KeyboardInterrupt:
        print(
            f"interrupted; what is finished is in {journal_path}, and the same command goes on after it",
            file=sys.stderr,
        )
        return 130
    judge = RulesJudge(settings.judge_timeout_seconds)
    rows = problems.remove_columns("images")
    # A problem without solutions has one without steps, which is wrong: it counts.
    pools = (
        build_pools([row], [result.candidates or [[]]], judge, [result.step_scores or [[]]])[0]
        for row, result in zip(rows, results, strict=True)
    )
    write_rows("pool", pools, output)
    report = {
        "problems": len(problems),
        "candidates": sum(len(result.candidates) for result in results),
        "problems_without_candidates": sum(not result.candidates for result in results),
        **{
            name: sum(getattr(result, name) for result in results)
            for name in ("generated_tokens", "unused_tokens", "num_unfinished")
        },
        "left_out": [{"id": entry["id"], "reason": entry["reason"]} for entry in bad_problems],
    }
    write_json(settings.output_json, report)
    print(
        f"{report['problems']} problems, {report['candidates']} candidates "
        f"({report['problems_without_candidates']} problems have none), {report['generated_tokens']} generated tokens "
        f"and {report['unused_tokens']} beyond the budget, {report['num_unfinished']} continuations without an end"
    )
    for entry in report["left_out"]:
        print(f"left out: {entry['id']}: {entry['reason']}")
    print(f"pools: {settings.output}")
    return 0


def _results(settings: SearchSettings, problems: Any, config: "SearchConfig", journal: Any) -> list[Any]:
    from mm_prm.chat_client import ChatServerError
    from mm_prm.commands.progress import ProgressBar
    from mm_prm.evaluation import search_candidates
    from mm_prm.inference.served import ScoreServerError

    identity = f"{settings.policy_identity()} {settings.scorer_identity()}"
    try:
        with ProgressBar("search", len(problems)) as bar:
            return search_candidates(
                problems, settings.open_policy, settings.open_scorer, identity, config, journal, bar.update
            )
    except (ChatServerError, ScoreServerError) as error:
        raise InputError(str(error)) from error
