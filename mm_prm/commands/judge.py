"""`mm-prm judge`: rows of question, gold answer and response in, the same rows with verdicts out.

mm-prm judge --input responses.jsonl --output verdicts.jsonl
"""

import os
import signal
import sys
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mm_prm.commands import InputError, reading_input, refuse_rows
from mm_prm.commands.judge_settings import JudgeSettings
from mm_prm.settings import parse_settings

if TYPE_CHECKING:
    from mm_prm.annotation.protocols import Judge, Verdict
    from mm_prm.judges import RulesJudge

# Rows judged together; what is finished is on the disk after each lot.
_ROWS_AT_ONCE = 256
# Fewer rows are judged before worker processes have started.
_ROWS_WORTH_WORKERS = 2000


@dataclass
class JudgeCommandSettings(JudgeSettings):
    """
    What is judged, and where the verdicts go.

    Args:
        input (`str`):
            JSON lines with `question`, `choices`, `gold`, and `response` (a whole solution) or `prediction` (an answer).
        output (`str`):
            JSON lines: each row with `verdict` (right, wrong or unknown), `extracted` (the answer that was read) and
            `reason`.
        column (`str`, *optional*):
            What is judged in rows that have both; the prediction if not given.
        on_bad_row (`str`, *optional*, defaults to `"raise"`):
            At a row that cannot be used: stop before anything is judged, or leave it out and list it.
        num_workers (`int`, *optional*):
            Processes in which rules compare answers; one for each core if not given.
        output_json (`str`, *optional*):
            Write the summary there, too.
    """

    input: str
    output: str
    column: Literal["prediction", "response"] | None = None
    on_bad_row: Literal["raise", "skip"] = "raise"
    num_workers: int | None = None
    output_json: str | None = None


@dataclass(frozen=True)
class _Answer:
    """What is judged of a row."""

    question: str
    choices: tuple[str, ...]
    gold: str
    text: str
    is_prediction: bool

    def problem(self) -> dict[str, Any]:
        return {"id": "", "question": self.question, "choices": list(self.choices), "answer": self.gold}


def main(args: Sequence[str], prog: str) -> int:
    """Run the command; returns its exit status: 1 if the language model's servers left answers open."""
    return run(
        parse_settings(JudgeCommandSettings, args, prog=prog, description="Check answers against gold answers.")
    )


def run(settings: JudgeCommandSettings) -> int:
    """Judge, write the rows and print the summary."""
    import codecs
    import hashlib
    import json

    from mm_prm.commands.files import check_lines_output, write_settings_beside
    from mm_prm.unfinished import only_run

    with reading_input("judge"):
        settings.check_judge()
        if settings.num_workers is not None and settings.num_workers < 1:
            raise ValueError(f"num_workers: {settings.num_workers} has to be at least 1")
    source, output = Path(settings.input).expanduser(), check_lines_output(settings.output, settings.input)
    if not source.is_file():
        raise InputError(
            f"{source}: {'is a folder; name a .jsonl file' if source.is_dir() else 'there is no such file'}"
        )
    with reading_input(str(source)), source.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        stream.seek(0)
        first = next((line.strip() for line in stream if line.strip()), b"")
    if first.removeprefix(codecs.BOM_UTF8).startswith((b"[{", b"[ {")) or first in (b"{", b"["):
        raise InputError(f"{source}: is one JSON document; JSON lines are read, one object a line")
    bad: list[str] = []
    num_rows = sum(1 for _ in _read(source, settings.column, bad))
    if not num_rows and not bad:
        raise InputError(f"{source}: there are no rows")
    if settings.on_bad_row == "raise":
        refuse_rows(bad)
    write_settings_beside(output, settings)
    key = json.dumps([digest, settings.column, settings.judge_identity()])
    with ExitStack() as stack:
        with reading_input("output"):
            stack.enter_context(only_run(output, "judging into"))
        return _judge_into(output, source, key, num_rows, bad, settings)


def _judge_into(
    output: Path, source: Path, key: str, num_rows: int, bad: Sequence[str], settings: JudgeCommandSettings
) -> int:
    from mm_prm.chat_client import ChatServerError
    from mm_prm.commands.files import write_json
    from mm_prm.commands.progress import ProgressBar

    part, part_key = output.with_name(f".{output.name}.part"), output.with_name(f".{output.name}.part.key")
    done = judged_before = _finished_rows(part, part_key, key)
    if done:
        print(f"{done} rows were judged by an earlier run; going on after them", file=sys.stderr)
    try:
        with part.open("a", encoding="utf-8") as lines, ProgressBar("judge", num_rows) as bar:
            rows = _read(source, settings.column, [])
            with closing(_judged(rows, done, num_rows, settings)) as lots:
                for lot in lots:
                    lines.writelines(_json_line(row) for row in lot)
                    lines.flush()
                    os.fsync(lines.fileno())
                    done += len(lot)
                    bar.update(done, free=judged_before)
    except ChatServerError as error:
        raise InputError(f"judge: {error}; {done} rows are judged, and the same command goes on after them") from error
    except KeyboardInterrupt:
        print(f"interrupted; {done} rows are judged, and the same command goes on after them", file=sys.stderr)
        return 130
    report = _summary(part, bad)
    part.replace(output)
    part_key.unlink()
    write_json(settings.output_json, report)
    _print_summary(report, settings.output)
    return 1 if report["not_answered"] else 0


def _read(source: Path, column: str | None, bad: list[str]) -> Iterator[tuple[dict[str, Any], _Answer]]:
    """The rows that can be judged; what is wrong with the others is appended to `bad`, with the number of the line."""
    import json

    with reading_input(str(source)), source.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                answer = _answer(row, column)
            except (ValueError, RecursionError) as error:
                bad.append(f"{source}, line {number}: {error}")
            else:
                yield row, answer


def _answer(row: Any, column: str | None) -> _Answer:
    if not isinstance(row, dict):
        raise ValueError(f"is {type(row).__name__} instead of an object")
    for name in ("question", "gold"):
        if not isinstance(row.get(name), str):
            raise ValueError(f"{name}: {_found(row, name)} instead of text")
    if not row["gold"].strip():
        raise ValueError("gold: is empty")
    choices = row.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"choices: {_found(row, 'choices')} instead of a list of texts")
    present = [name for name in ("prediction", "response") if row.get(name) is not None]
    if not present or (column is not None and column not in present):
        raise ValueError(f"{column or 'response'}: is missing" + ("" if column else ", and so is prediction"))
    name = column or present[0]
    if not isinstance(row[name], str):
        raise ValueError(f"{name}: {_found(row, name)} instead of text")
    return _Answer(row["question"], tuple(choices), row["gold"], row[name], name == "prediction")


def _found(row: Mapping[str, Any], name: str) -> str:
    return f"is {row[name]!r:.60}" if row.get(name) is not None else "is missing"


def _finished_rows(part: Path, part_key: Path, key: str) -> int:
    """Rows that a run with the same input and settings has left behind; what it did not finish writing is cut off."""
    with reading_input(str(part)):
        if not part.exists() or not part_key.exists() or part_key.read_text(encoding="utf-8") != key:
            part.unlink(missing_ok=True)
            part_key.write_text(key, encoding="utf-8")
            return 0
        num_rows, length = 0, 0
        with part.open("rb") as lines:
            for line in lines:
                if line.endswith(b"\n"):
                    num_rows, length = num_rows + 1, length + len(line)
        os.truncate(part, length)
        return num_rows


def _judged(
    rows: Iterator[tuple[dict[str, Any], _Answer]], done: int, num_rows: int, settings: JudgeCommandSettings
) -> Generator[list[dict[str, Any]], None, None]:
    """The rows after the first `done`, judged, lot by lot in their order."""
    from concurrent.futures import ThreadPoolExecutor
    from itertools import islice

    if done >= num_rows:
        return
    language_model = None
    if settings.judge != "rules":
        with reading_input("judge"):
            language_model = settings.open_language_model()
    rows = islice(rows, done, None)
    lots = iter(lambda: list(islice(rows, _ROWS_AT_ONCE)), [])
    with ThreadPoolExecutor(settings.judge_max_concurrency) as threads:
        for lot, first_verdicts in _first_verdicts(lots, num_rows - done, settings):
            answers = [answer for _, answer in lot]
            verdicts = list(threads.map(_final_verdict, [language_model] * len(lot), answers, first_verdicts))
            yield [
                {**row, "verdict": verdict.verdict, "extracted": verdict.extracted, "reason": verdict.reason}
                for (row, _), verdict in zip(lot, verdicts, strict=True)
            ]


_Lot = list[tuple[dict[str, Any], _Answer]]


def _first_verdicts(
    lots: Iterable[_Lot], num_rows: int, settings: JudgeCommandSettings
) -> Iterator[tuple[_Lot, "list[Verdict] | list[None]"]]:
    """What the rules say, in worker processes where there is enough to do; nothing where they are not asked."""
    if settings.judge == "llm":
        yield from ((lot, [None] * len(lot)) for lot in lots)
        return
    num_workers = settings.num_workers or os.cpu_count() or 1
    if settings.num_workers is None and num_rows < _ROWS_WORTH_WORKERS:
        num_workers = 1
    if num_workers == 1:
        _open_rules(settings.judge_timeout_seconds)
        yield from ((lot, _apply_rules([answer for _, answer in lot])) for lot in lots)
        return
    import multiprocessing
    from collections import deque
    from concurrent.futures import Future, ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    executor = ProcessPoolExecutor(
        num_workers, multiprocessing.get_context("spawn"), _open_rules, (settings.judge_timeout_seconds, True)
    )
    underway: deque[tuple[_Lot, Future[list[Verdict]]]] = deque()
    try:
        for lot in lots:
            underway.append((lot, executor.submit(_apply_rules, [answer for _, answer in lot])))
            if len(underway) > 2 * num_workers:
                first, future = underway.popleft()
                yield first, future.result()
        for first, future in underway:
            yield first, future.result()
    except BrokenProcessPool as error:
        raise InputError(
            "a worker process was killed, perhaps for want of memory: the rows that are judged are kept, and the same "
            "command goes on after them; give --num_workers 1 to do with less memory"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


_rules: "RulesJudge"


def _open_rules(timeout_seconds: float, in_worker: bool = False) -> None:
    global _rules
    from mm_prm.judges import RulesJudge

    if in_worker:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which then ends its workers
    _rules = RulesJudge(timeout_seconds)


def _apply_rules(answers: Sequence[_Answer]) -> "list[Verdict]":
    return [
        _rules.judge_prediction(answer.gold, answer.text, answer.choices)
        if answer.is_prediction
        else _rules.judge(answer.problem(), [answer.text])
        for answer in answers
    ]


def _final_verdict(language_model: "Judge | None", answer: _Answer, first: "Verdict | None") -> "Verdict":
    from mm_prm.annotation.protocols import Verdict

    if first is not None and (language_model is None or first.verdict != "unknown" or not first.extracted):
        return first
    assert language_model is not None
    verdict = language_model.judge(answer.problem(), [answer.text])
    if first is None:
        return verdict
    return Verdict(verdict.verdict, first.extracted, f"{first.reason}; {verdict.reason}")


def _json_line(row: Mapping[str, Any]) -> str:
    import json

    try:
        text = json.dumps(row, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        text = json.dumps(row)
    return text + "\n"


def _summary(judged: Path, bad: Sequence[str]) -> dict[str, Any]:
    """Counts over the written rows; with the agreement with `correct`, where rows have it."""
    import json

    verdicts: Counter[str] = Counter()
    official: Counter[tuple[str, bool]] = Counter()
    not_answered = 0
    with judged.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            verdicts[row["verdict"]] += 1
            not_answered += row["verdict"] == "unknown" and "language model: " in row["reason"]
            if isinstance(row.get("correct"), bool):
                official[row["verdict"], row["correct"]] += 1
    report: dict[str, Any] = {
        "rows": verdicts.total(),
        **{verdict: verdicts[verdict] for verdict in ("right", "wrong", "unknown")},
        "not_answered": not_answered,
        "left_out": list(bad),
    }
    if official:
        right, wrong = official["right", True], official["wrong", False]
        decided = sum(count for (verdict, _), count in official.items() if verdict != "unknown")
        report["agreement"] = {
            "rows": official.total(),
            "decided": decided,
            "agree": _share(right + wrong, decided),
            "precision": _share(right, right + official["right", False]),
            "recall": _share(right, right + official["wrong", True] + official["unknown", True]),
        }
    return report


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _print_summary(report: Mapping[str, Any], output: str) -> None:
    share = f" ({report['unknown'] / report['rows']:.1%})" if report["rows"] else ""
    print(
        f"{report['rows']} rows: {report['right']} right, {report['wrong']} wrong, {report['unknown']} unknown{share}"
    )
    if report["not_answered"]:
        print(f"{report['not_answered']} of them are unknown because no server answered")
    if agreement := report.get("agreement"):
        values = {name: "-" if agreement[name] is None else f"{agreement[name]:.1%}" for name in agreement}
        print(
            f"against `correct` ({agreement['rows']} rows, {agreement['decided']} decided): agreement {values['agree']} "
            f"of the decided, precision {values['precision']}, recall {values['recall']} (unknown counts as missed)"
        )
    for entry in report["left_out"]:
        print(f"left out: {entry}")
    print(f"verdicts: {output}")
