"""`mm-prm judge-steps`: trees in, the same trees with a multimodal language model's P(valid) at every node out.

mm-prm judge-steps --trees trees --problems problems.json --model NAME --base_url http://127.0.0.1:8000/v1 --output judged
"""

import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mm_prm.commands import InputError, reading_input
from mm_prm.settings import parse_settings

if TYPE_CHECKING:
    from concurrent.futures import Future

    from mm_prm.annotation.journal import Journal
    from mm_prm.chat_client import ChatCompletion
    from mm_prm.judges.steps import StepJudge

# Requests handed to the client for each that it may have under way, so that one slow answer holds nothing up.
_REQUESTS_AHEAD = 4
_MOST_NAMED = 10


@dataclass
class JudgeStepsSettings:
    """
    Which trees are judged by which model, and where they go.

    Args:
        trees (`str`):
            Trees: a folder, a .parquet or .jsonl file as `mm-prm annotate` writes them, or its journal (.sqlite).
        problems (`str`):
            Their problems: a .json, .jsonl or .parquet file, a folder saved by datasets, or mini:SPLIT:NUMBER[:START].
        output (`str`):
            Where the judged trees go: a folder, or a .parquet or .jsonl file.
        model (`str`):
            Name under which the servers serve the model.
        base_url (`list[str]`):
            Addresses of one or more OpenAI-compatible servers, up to and including /v1, which have to give logprobs. The
            key is read from OPENAI_API_KEY.
        image_root (`str`, *optional*):
            Folder within which image paths of the problems lie. The file's own folder if not given.
        on_bad_row (`str`, *optional*, defaults to `"raise"`):
            At a problem that cannot be used: stop, or leave out its tree.
        journal (`str`, *optional*):
            File that keeps every judged tree; a run that was killed goes on after it. OUTPUT.journal.sqlite if not given.
        max_concurrency (`int`, *optional*, defaults to `64`):
            Most requests under way at once.
        request_seconds (`float`, *optional*, defaults to `60.0`):
            Time limit of one attempt at a request.
        max_retries (`int`, *optional*, defaults to `5`):
            Most attempts at a request after the first.
        output_json (`str`, *optional*):
            Write the summary there, too.
    """

    trees: str
    problems: str
    output: str
    model: str
    base_url: list[str] = field(default_factory=list)
    image_root: str | None = None
    on_bad_row: Literal["raise", "skip"] = "raise"
    journal: str | None = None
    max_concurrency: int = 64
    request_seconds: float = 60.0
    max_retries: int = 5
    output_json: str | None = None


def main(args: Sequence[str], prog: str) -> int:
    """Run the command; returns its exit status: 1 if the servers left steps open."""
    return run(parse_settings(JudgeStepsSettings, args, prog=prog, description="Judge every step of trees."))


def run(settings: JudgeStepsSettings) -> int:
    """Judge, write the trees and print the summary."""
    from mm_prm.annotation.journal import Journal, JournalError
    from mm_prm.chat_client import ChatServerError
    from mm_prm.commands.files import check_output, read_trees, write_json, write_rows, write_settings_beside
    from mm_prm.commands.progress import ProgressBar
    from mm_prm.data import load_problems
    from mm_prm.judges.steps import StepJudge

    output = check_output(settings.output, settings.trees, settings.problems)
    if not settings.base_url:
        raise InputError("base_url: name the server that serves the model, for example http://127.0.0.1:8000/v1")
    with reading_input(settings.problems):
        problems, bad_problems = load_problems(
            settings.problems, image_root=settings.image_root, on_bad_row=settings.on_bad_row
        )
    places = {problem_id: place for place, problem_id in enumerate(problems["id"])}
    bad_ids = {entry["id"] for entry in bad_problems} - set(places)
    with reading_input(settings.trees):
        trees = [dict(tree) for tree in read_trees(settings.trees) if tree["problem_id"] not in bad_ids]
        _check(trees, places)
    write_settings_beside(output, settings)
    with reading_input("base_url"):
        judge = StepJudge(
            settings.model,
            settings.base_url,
            max_concurrency=settings.max_concurrency,
            timeout_seconds=settings.request_seconds,
            max_retries=settings.max_retries,
        )
    journal_path = settings.journal or f"{output}.journal.sqlite"
    summary = Summary()
    try:
        with Journal(journal_path) as journal, ProgressBar("judge-steps", len(trees)) as bar:
            pairs = ((tree, problems[places[tree["problem_id"]]]) for tree in trees)
            judged = _judged(pairs, judge, journal, summary, _REQUESTS_AHEAD * settings.max_concurrency)
            order = {tree["problem_id"]: place for place, tree in enumerate(trees)}
            write_rows("tree", _shown(judged, bar, summary), output, order)
    except JournalError as error:
        raise InputError(str(error)) from error
    except ChatServerError as error:
        raise InputError(
            f"base_url: {error}; {summary.trees} judged trees are in {journal_path}, and the same command goes on after "
            "them"
        ) from error
    except KeyboardInterrupt:
        print(
            f"interrupted; {summary.trees} judged trees are in {journal_path}, and the same command goes on after them",
            file=sys.stderr,
        )
        return 130
    finally:
        judge.client.close()
    report = summary.report(len(bad_ids))
    write_json(settings.output_json, report)
    print_summary(report, settings.output)
    return 1 if report["unknown"]["not_answered"] else 0


def _check(trees: Sequence[Mapping[str, Any]], places: Mapping[str, int]) -> None:
    from mm_prm.data.features import validate_rows

    validate_rows("tree", trees)
    missing = [tree["problem_id"] for tree in trees if tree["problem_id"] not in places]
    if missing:
        shown = ", ".join(map(repr, missing[:_MOST_NAMED])) + (", …" if len(missing) > _MOST_NAMED else "")
        raise ValueError(f"{len(missing)} trees belong to no problem in the problems: {shown}")


@dataclass
class _Underway:
    """A tree, and the answers that are on their way, by the number of the node."""

    key: str
    tree: dict[str, Any]
    answers: dict[int, "Future[ChatCompletion]"]


def _judged(
    pairs: Iterable[tuple[dict[str, Any], Mapping[str, Any]]],
    judge: "StepJudge",
    journal: "Journal",
    summary: "Summary",
    most_requests: int,
) -> Iterator[dict[str, Any]]:
    """The trees with scores, committed, in their order; the requests of many are under way at once."""
    underway: deque[_Underway] = deque()
    num_requests = 0
    try:
        for tree, problem in pairs:
            begun = _begin(tree, problem, judge, journal)
            underway.append(begun)
            num_requests += len(begun.answers)
            while num_requests > most_requests:
                num_requests -= len(underway[0].answers)
                yield _finish(underway[0], judge, journal, summary)
                underway.popleft()
        while underway:
            yield _finish(underway[0], judge, journal, summary)
            underway.popleft()
    finally:
        for begun in underway:  # after an error, or Ctrl-C
            for answer in begun.answers.values():
                answer.cancel()


def _begin(tree: dict[str, Any], problem: Mapping[str, Any], judge: "StepJudge", journal: "Journal") -> _Underway:
    """Ask about every node of a tree whose score an earlier run has not left in the journal."""
    import hashlib
    import json

    from mm_prm.judges.steps import question_parts

    unjudged = {**tree, "nodes": [{**node, "judge_score": None} for node in tree["nodes"]]}
    question = question_parts(problem)
    key = hashlib.sha256(json.dumps([judge.identity, question, problem["answer"], unjudged]).encode()).hexdigest()
    tree = journal.get(key) or unjudged
    tree["settings"] = json.dumps({**json.loads(tree["settings"]), "step_judge": judge.identity})
    answers: dict[int, Future[ChatCompletion]] = {}
    prefixes: dict[int, list[str]] = {-1: []}
    for number, node in enumerate(tree["nodes"]):
        prefix = prefixes[node["parent_id"]]
        prefixes[node["node_id"]] = prefix + node["steps"]
        if node["steps"] and node["judge_score"] is None:
            answers[number] = judge.submit(question, problem["answer"], prefix, node["steps"])
    return _Underway(key, tree, answers)


def _finish(begun: _Underway, judge: "StepJudge", journal: "Journal", summary: "Summary") -> dict[str, Any]:
    """Wait for the answers about a tree, and commit it."""
    for number, answer in begun.answers.items():
        opinion = judge.opinion(answer)
        begun.tree["nodes"][number]["judge_score"] = opinion.score
        if opinion.score is None:
            summary.unknown("unclear" if opinion.answered else "not_answered", opinion.reason)
    if begun.answers:
        journal.commit(begun.key, begun.tree)
    summary.add(begun.tree, len(begun.answers))
    return begun.tree


def _shown(trees: Iterable[dict[str, Any]], bar: Any, summary: "Summary") -> Iterator[dict[str, Any]]:
    for tree in trees:
        bar.update(summary.trees, summary.from_journal, f"{summary.asked} steps asked")
        yield tree


class Summary:
    """Counts judged trees."""

    def __init__(self) -> None:
        self.trees = self.from_journal = self.nodes = self.asked = self.valid = self.compared = self.agree = 0
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, None] = {}

    def unknown(self, kind: str, reason: str) -> None:
        """Count a node without a score."""
        self.reasons[kind] += 1
        if len(self.examples) < _MOST_NAMED:
            self.examples[reason] = None

    def add(self, tree: Mapping[str, Any], num_asked: int) -> None:
        """Count a tree, whose nodes have their scores."""
        from mm_prm.data.selection import path_scores

        self.trees += 1
        self.from_journal += num_asked == 0
        self.asked += num_asked
        paths = path_scores(tree["nodes"])
        for node in tree["nodes"][1:]:
            self.nodes += 1
            self.valid += node["judge_score"] is not None and node["judge_score"] > 0.5
            score = paths[node["node_id"]]
            if score is not None and node["num_judged"]:
                self.compared += 1
                self.agree += (score > 0.5) == (node["num_right"] > 0)

    def report(self, num_bad_problems: int) -> dict[str, Any]:
        """The summary, as plain data."""
        unknown = {kind: self.reasons[kind] for kind in ("not_answered", "unclear")}
        return {
            "trees": self.trees,
            "from_journal": self.from_journal,
            "bad_problems": num_bad_problems,
            "nodes": self.nodes,
            "asked": self.asked,
            "valid": self.valid,
            "invalid": self.nodes - self.valid - sum(unknown.values()),
            "unknown": unknown,
            "reasons": list(self.examples),
            "agree_with_monte_carlo": self.agree / self.compared if self.compared else None,
        }


def print_summary(report: Mapping[str, Any], output: str) -> None:
    """Print the summary of a run."""
    unknown = report["unknown"]
    print(f"{report['trees']} trees ({report['from_journal']} without a request), {report['asked']} steps asked")
    if report["bad_problems"]:
        print(f"  trees of {report['bad_problems']} bad problems are left out")
    print(
        f"{report['nodes']} nodes: {report['valid']} valid (above 0.5), {report['invalid']} not valid, unknown: "
        f"{unknown['not_answered']} not answered, {unknown['unclear']} neither yes nor no"
    )
    for reason in report["reasons"]:
        print(f"  unknown: {reason}")
    if unknown["not_answered"]:
        print("the same command asks again about what is unknown")
    if report["agree_with_monte_carlo"] is not None:
        print(f"judge and Monte Carlo agree on {100 * report['agree_with_monte_carlo']:.1f} % of the prefixes")
    print(f"trees: {output}")
