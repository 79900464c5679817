"""`mm-prm annotate`: problems in, trees of judged rollouts out.

mm-prm annotate --problems problems.json --policy path/to/policy --output trees --journal trees.journal.sqlite
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mm_prm.annotation.config import AnnotationConfig
from mm_prm.commands import InputError, reading_input
from mm_prm.commands.judge_settings import JudgeSettings
from mm_prm.commands.policy_settings import PolicySettings
from mm_prm.settings import parse_settings


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

    output = check_output(settings.output)
    write_settings_beside(output, (settings, config))
    logging.getLogger("mm_prm.data.mmk12").setLevel(logging.ERROR)  # what is left out is listed in the summary
    with reading_input(settings.problems):
        problems, bad_problems = load_problems(
            settings.problems,
            image_root=settings.image_root,
            on_bad_row=settings.on_bad_row,
            limit=settings.limit,
        )
    with reading_input("policy"):
        settings.check_policy()
        policy_identity = settings.policy_identity()
    with reading_input("judge"):
        settings.check_judge()

    def open_policy() -> Policy:
        with reading_input("policy"):
            return settings.open_policy()

    def open_judge() -> Judge:
        with reading_input("judge"):
            return settings.open_judge()

    journal_path = settings.journal or f"{output}.journal.sqlite"
    last = Progress()
    summary = Summary()
    try:
        with (
            Journal(journal_path) as journal,
            ProgressBar("annotate", len(problems)) as bar,
        ):

            def show(progress: Progress) -> None:
                nonlocal last
                last = progress
                growing = progress.trees_in_flight
                note = f"{growing} trees growing, {progress.rollouts} rollouts"
                bar.update(progress.trees_done, note, underway=growing, free=progress.trees_from_journal)

            trees = annotate(
                problems,
                open_policy,
                open_judge,
                config,
                journal,
                show,
                policy_identity=policy_identity,
                judge_identity=settings.judge_identity(),
            )
            places = {problem_id: place for place, problem_id in enumerate(problems["id"])}
            write_rows("tree", summary.watch(trees), output, places)
    except JournalError as error:
        raise InputError(str(error)) from error
    except KeyboardInterrupt:
        done = summary.trees["complete"]
        print(
            f"interrupted; {done} trees are in {journal_path}, and the same command goes on after them",
            file=sys.stderr,
        )
        return 130
    report = summary.report(last, bad_problems)
    write_json(settings.output_json, report)
    print_summary(report, settings.output)
    return 1 if report["trees"]["failed"] else 0


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
        for tree in trees:
            self.trees[tree["status"]] += 1
            self.cost.update(tree["cost"])
            self.verdicts.update(rollout["verdict"] for rollout in tree["rollouts"])
            self.statuses.update(rollout["status"] for rollout in tree["rollouts"])
            self.nodes += len(tree["nodes"])
            # The root says how hard the problem is; every other measured node labels a step.
            self.labels += sum(node["num_judged"] > 0 for node in tree["nodes"][1:])
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
            "seconds": round(float(self.cost["seconds"]), 3),
            "cost_per_label": {
                name: round(self.cost[name] / labels, 3) if labels else None
                for name in ("rollouts", "generated_tokens", "judge_calls", "seconds")
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
        f"{report['generated_tokens']} generated tokens, {report['judge_calls']} judge calls"
    )
    print(f"{report['labels']} step labels in {report['nodes']} nodes, {report['seconds']:.1f} s", end="")
    if report["labels"]:
        print(
            f"; each label cost {cost['rollouts']:.1f} rollouts, {cost['generated_tokens']:.0f} generated tokens, "
            f"{cost['seconds']:.3f} s",
            end="",
        )
    print(f"\nthis run: {report['this_run']['rollouts']} rollouts, {report['this_run']['seconds']:.1f} s")
    for entry in report["not_complete"]:
        print(f"{entry['status']}: {entry['id']}: {entry['reason']}")
    print(f"trees: {output}")
