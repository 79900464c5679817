"""`mm-prm annotate`: problems in, trees of judged rollouts out.

mm-prm annotate --problems problems.json --policy path/to/policy --output trees --journal trees.journal.sqlite
"""

import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from mm_prm.annotation.config import AnnotationConfig
from mm_prm.commands import InputError, reading_input
from mm_prm.commands.judge_settings import JudgeSettings
from mm_prm.commands.policy_settings import PolicySettings
from mm_prm.settings import parse_settings

if TYPE_CHECKING:
    from mm_prm.annotation.annotator import Progress

_SECONDS_PER_NOTE = 0.1
_SECONDS_OF_RATES = 30.0


@dataclass
class AnnotateSettings(PolicySettings, JudgeSettings):
    """
    What is annotated, by which policy and judge, and where the trees go.

    Args:
        problems (`str`):
            Problems: a .json, .jsonl or .parquet file, a folder saved by datasets, or mini:SPLIT:NUMBER[:START] for
            problems of the embedded mini world.
        output (`str`):
            Where the trees go: a folder, or a .parquet or .jsonl file.
        image_root (`str`, *optional*):
            Folder within which image paths lie. The file's own folder if not given.
        on_bad_row (`str`, *optional*, defaults to `"raise"`):
            At a problem that cannot be used: stop before anything is annotated, or leave it out and list it.
        limit (`int`, *optional*):
            Annotate at most so many problems.
        shard (`str`, *optional*):
            I/N, for a job array: annotate every N-th problem only, from the I-th on (1 to N). Output and journal are
            named after it. `mm-prm journal merge` joins the journals.
        executor (`str`, *optional*, defaults to `"local"`):
            What runs it: this process, or the workers of a Ray cluster (`pip install 'mm-prm[ray]'`).
        ray_address (`str`, *optional*):
            ray: the cluster; that of RAY_ADDRESS, or else a new one on this machine, if not given.
        ray_workers (`int`, *optional*, defaults to `1`):
            ray: number of workers, each with a policy of its own.
        ray_gpus_per_worker (`float`, *optional*, defaults to `0.0`):
            ray: GPUs of a worker.
        ray_problems_at_once (`int`, *optional*, defaults to `64`):
            ray: problems that a worker is given together; a worker that is lost loses the trees of that many.
        journal (`str`, *optional*):
            File that keeps every finished tree; a run that was killed goes on after it. OUTPUT.journal.sqlite if not
            given. Keep it on a local disk.
        output_json (`str`, *optional*):
            Write the summary there, too.
    """

    problems: str
    output: str
    image_root: str | None = None
    on_bad_row: Literal["raise", "skip"] = "raise"
    limit: int | None = None
    shard: str | None = None
    executor: Literal["local", "ray"] = "local"
    ray_address: str | None = None
    ray_workers: int = 1
    ray_gpus_per_worker: float = 0.0
    ray_problems_at_once: int = 64
    journal: str | None = None
    output_json: str | None = None


def main(args: Sequence[str], prog: str) -> int:
    """Run the command; returns its exit status: 1 if a problem failed."""
    settings, config = parse_settings(
        (AnnotateSettings, AnnotationConfig), args, prog=prog, description="Grow a tree of judged rollouts."
    )
    return run(settings, config)


def run(settings: AnnotateSettings, config: AnnotationConfig) -> int:
    """Annotate, write the trees and print the summary."""
    import logging

    from mm_prm.annotation.annotator import Progress, annotate
    from mm_prm.annotation.journal import Journal, JournalError
    from mm_prm.annotation.protocols import Judge, Policy
    from mm_prm.commands.files import check_output, write_json, write_rows, write_settings_beside
    from mm_prm.commands.progress import ProgressBar
    from mm_prm.data import load_problems

    shard = _parse_shard(settings.shard)
    output = check_output(_of_shard(settings.output, shard), settings.problems)
    logging.getLogger("mm_prm.data.mmk12").setLevel(logging.ERROR)  # what is left out is listed in the summary
    with reading_input(settings.problems):
        problems, bad_problems = load_problems(
            settings.problems,
            image_root=settings.image_root,
            on_bad_row=settings.on_bad_row,
            limit=settings.limit,
        )
    if shard is not None:
        number, of = shard
        problems = problems.select(range(number - 1, len(problems), of))
        bad_problems = bad_problems if number == 1 else []  # listed once
    with reading_input("policy", settings.policy):
        settings.check_policy()
        policy_identity = settings.policy_identity()
    with reading_input("judge"):
        settings.check_judge()

    if settings.executor == "ray":
        with reading_input("executor"):
            from mm_prm.annotation.ray import RayWorkers, annotate_on_ray, check_ray

            check_ray()
            workers = RayWorkers(
                number=settings.ray_workers,
                num_gpus=settings.ray_gpus_per_worker,
                problems_at_once=settings.ray_problems_at_once,
                address=settings.ray_address,
            )

    def open_policy() -> Policy:
        with reading_input("policy", settings.policy):
            return settings.open_policy()

    def open_judge() -> Judge:
        with reading_input("judge"):
            return settings.open_judge()

    write_settings_beside(output, (settings, config))  # not before the input is read: they are those of the output
    journal_path = settings.journal or f"{output}.journal.sqlite"
    last = Progress()
    summary = Summary()
    try:
        with (
            Journal(journal_path) as journal,
            ProgressBar("annotate", len(problems)) as bar,
        ):
            rates = Rates()

            def show(progress: Progress) -> None:
                nonlocal last
                is_due = progress.trees_done == len(problems) or rates.is_due(progress)
                last = progress
                if is_due:
                    free, underway = progress.trees_from_journal, progress.trees_in_flight
                    bar.update(progress.trees_done, free, rates.note(progress), underway)

            if settings.executor == "ray":
                grow: Any = partial(annotate_on_ray, workers=workers)
            else:
                grow = annotate
            trees = grow(
                problems,
                open_policy,
                open_judge,
                config,
                journal=journal,
                on_progress=show,
                # Rules work on the processor, where more threads than a few only take turns.
                judge_concurrency=4 if settings.judge == "rules" else settings.judge_max_concurrency,
                policy_identity=policy_identity,
                judge_identity=settings.judge_identity(),
            )
            places = {problem_id: place for place, problem_id in enumerate(problems["id"])}
            write_rows("tree", summary.watch(trees), output, places)
    except JournalError as error:
        raise InputError(str(error)) from error
    except OSError as error:  # a full disk
        kept = f"{summary.trees['complete']} trees are in {journal_path}, and the same command goes on after them"
        raise InputError(f"{output}: {error}; {kept}") from error
    except KeyboardInterrupt:
        done = summary.trees["complete"]
        print(
            f"interrupted; {done} trees are in {journal_path}, and the same command goes on after them",
            file=sys.stderr,
        )
        return 130
    report = summary.report(last, bad_problems)
    write_json(settings.output_json, report)
    print_summary(report, str(output))
    return 1 if report["trees"]["failed"] else 0


def _parse_shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    number, slash, of = text.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise InputError(f"shard: {text!r} has to be I/N with I from 1 to N, for example 1/8")
    return int(number), int(of)


def _of_shard(path: str, shard: tuple[int, int] | None) -> str:
    """The name of a shard's output, before the suffix: trees.2-of-8.parquet."""
    if shard is None:
        return path
    from mm_prm.commands.files import SUFFIXES

    suffix = next((suffix for suffix in SUFFIXES if path.endswith(suffix)), "")
    return f"{path.removesuffix(suffix).rstrip('/')}.{shard[0]}-of-{shard[1]}{suffix}"


class Rates:
    """What a run does a second now, over the last half minute."""

    def __init__(self) -> None:
        self._seen: deque[Progress] = deque()

    def is_due(self, progress: "Progress") -> bool:
        """Whether something new is to be shown: ten times a second, however fast the run is."""
        return not self._seen or progress.seconds - self._seen[-1].seconds >= _SECONDS_PER_NOTE

    def note(self, progress: "Progress") -> str:
        """One line on what is under way."""
        self._seen.append(progress)
        while len(self._seen) > 2 and progress.seconds - self._seen[1].seconds > _SECONDS_OF_RATES:
            self._seen.popleft()
        first = self._seen[0]
        seconds = progress.seconds - first.seconds

        def rate(name: str, digits: int = 0) -> str:
            change = getattr(progress, name) - getattr(first, name)
            return f"{change / seconds if seconds else 0.0:,.{digits}f}"

        parts = [
            f"{progress.trees_in_flight} trees growing",
            f"{rate('rollouts')} rollouts/s",
            f"{rate('generated_tokens')} tokens/s",
            f"{rate('labels', 1)} labels/s",
            f"waiting for the policy: {progress.rollouts_at_policy}, for the judge: {progress.solutions_at_judge}",
        ]
        return ", ".join([*parts, f"{progress.trees_failed} failed"] if progress.trees_failed else parts)


class Summary:
    """Counts trees as they pass."""

    def __init__(self) -> None:
        self.trees: Counter[str] = Counter()
        self.cost: Counter[str] = Counter()
        self.verdicts: Counter[str] = Counter()
        self.statuses: Counter[str] = Counter()
        self.labels = 0
        self.nodes = 0
        self.unfinished: list[dict[str, str]] = []

    def watch(self, trees: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """Hand the trees on, counted."""
        from mm_prm.annotation.schedule import num_labels

        for tree in trees:
            self.trees[tree["status"]] += 1
            self.cost.update(tree["cost"])
            self.verdicts.update(rollout["verdict"] for rollout in tree["rollouts"])
            self.statuses.update(rollout["status"] for rollout in tree["rollouts"])
            self.nodes += len(tree["nodes"])
            self.labels += num_labels(tree["nodes"])
            if tree["status"] != "complete":
                entry = {"id": tree["problem_id"], "status": tree["status"], "reason": tree["reason"]}
                self.unfinished.append(entry)
            yield tree

    def report(self, run: Any, bad_problems: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        """
        The summary, as plain data.

        Args:
            run ([`~mm_prm.annotation.Progress`]):
                The last progress of the run.
            bad_problems (`Sequence[Mapping[str, str]]`):
                `id` and `reason` of each problem that was left out when the problems were read.
        """
        left_out = [{"id": entry["id"], "status": "skipped", "reason": entry["reason"]} for entry in bad_problems]
        labels = self.labels
        return {
            "problems": self.trees.total() + len(left_out),
            "trees": {
                "complete": self.trees["complete"],
                "failed": self.trees["failed"],
                "skipped": self.trees["skipped"] + len(left_out),
                "from_journal": run.trees_from_journal,
            },
            "nodes": self.nodes,
            "labels": labels,
            "rollouts": {
                "total": self.cost["rollouts"],
                **{verdict: self.verdicts[verdict] for verdict in ("right", "wrong", "unknown")},
                "cut_by_max_new_tokens": self.statuses["length"],
                "unparsable": self.statuses["unparsable"],
            },
            "prompt_tokens": self.cost["prompt_tokens"],
            "generated_tokens": self.cost["generated_tokens"],
            "judge_calls": self.cost["judge_calls"],
            "judge_cache_hits": self.cost["judge_cache_hits"],
            "seconds": round(float(self.cost["seconds"]), 3),
            "cost_per_label": {
                name: round(self.cost[name] / labels, 3) if labels else None
                for name in ("rollouts", "prompt_tokens", "generated_tokens", "judge_calls", "seconds")
            },
            "this_run": {"rollouts": run.rollouts, "seconds": round(run.seconds, 3)},
            "not_complete": left_out + self.unfinished,
        }


def print_summary(report: Mapping[str, Any], output: str) -> None:
    """Print the summary of a run."""
    trees, rollouts, cost = report["trees"], report["rollouts"], report["cost_per_label"]
    print(
        f"{report['problems']} problems: {trees['complete']} trees complete ({trees['from_journal']} from the journal), "
        f"{trees['failed']} failed, {trees['skipped']} skipped"
    )
    print(
        f"{rollouts['total']} rollouts: {rollouts['right']} right, {rollouts['wrong']} wrong, "
        f"{rollouts['unknown']} unknown (of which {rollouts['cut_by_max_new_tokens']} were cut at "
        f"policy_max_new_tokens and {rollouts['unparsable']} hold no steps); {report['prompt_tokens']} prompt tokens, "
        f"{report['generated_tokens']} generated tokens, {report['judge_calls']} judge calls "
        f"({report['judge_cache_hits']} answered by the cache)"
    )
    print(f"{report['labels']} step labels in {report['nodes']} nodes, {report['seconds']:.1f} s", end="")
    if report["labels"]:
        print(
            f"; each label cost {cost['rollouts']:.1f} rollouts, {cost['prompt_tokens']:.0f} prompt tokens, "
            f"{cost['generated_tokens']:.0f} generated tokens, {cost['judge_calls']:.1f} judge calls, "
            f"{cost['seconds']:.3f} s",
            end="",
        )
    print(f"\nthis run: {report['this_run']['rollouts']} rollouts, {report['this_run']['seconds']:.1f} s")
    for entry in report["not_complete"]:
        print(f"{entry['status']}: {entry['id']}: {entry['reason']}")
    print(f"trees: {output}")
