"""`mm-prm judge` through its own front door."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest

from mm_prm.cli import main

from .chat_server import ChatServer

SAMPLE = Path(__file__).parents[2] / "shared" / "data" / "answer_equivalence" / "ursa_sample.jsonl"
ROWS = [
    {"question": "3 + 4?", "choices": [], "gold": "7", "response": "Count.\n\nThe answer is 7.", "correct": True},
    {"question": "3 + 4?", "choices": [], "gold": "7", "prediction": "8", "id": "keeps its columns"},
    {"question": "Which?", "choices": ["a red one", "a blue one"], "gold": "B", "prediction": "Answer: blue ones"},
    {"question": "Half?", "gold": "1/2", "prediction": "$\\dfrac{1}{2}$", "correct": True},
]


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def judge(*args):
    return main(["judge", *map(str, args)])


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_each_row_comes_back_with_its_verdict(capsys):
    write(Path("in.jsonl"), ROWS)
    assert judge("--input", "in.jsonl", "--output", "deep/out.jsonl", "--output_json", "summary.json") == 0
    rows = read("deep/out.jsonl")
    assert [{name: row[name] for name in given} for row, given in zip(rows, ROWS, strict=True)] == ROWS
    assert [row["verdict"] for row in rows] == ["right", "wrong", "unknown", "right"]
    assert [row["extracted"] for row in rows] == ["7", "8", "blue ones", "$\\dfrac{1}{2}$"]
    assert all(row["reason"] for row in rows)
    summary = json.loads(Path("summary.json").read_text())
    assert summary == {
        "rows": 4,
        "right": 2,
        "wrong": 1,
        "unknown": 1,
        "not_answered": 0,
        "left_out": [],
        "agreement": {"rows": 2, "decided": 2, "agree": 1.0, "precision": 1.0, "recall": 1.0},
    }
    assert "4 rows: 2 right, 1 wrong, 1 unknown (25.0%)" in capsys.readouterr().out
    assert sorted(os.listdir("deep")) == ["out.jsonl", "out.jsonl.settings.yaml"]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{broken", "in.jsonl, line 3: "),
        ('["a list"]', "in.jsonl, line 3: is list instead of an object"),
        ({"gold": "7", "prediction": "7"}, "in.jsonl, line 3: question: is missing instead of text"),
        ({"question": "?", "gold": 7, "prediction": "7"}, "in.jsonl, line 3: gold: is 7 instead of text"),
        ({"question": "?", "gold": " ", "prediction": "7"}, "in.jsonl, line 3: gold: is empty"),
        ({"question": "?", "gold": "7"}, "in.jsonl, line 3: response: is missing, and so is prediction"),
        ({"question": "?", "gold": "7", "response": ["7"]}, "in.jsonl, line 3: response: is ['7'] instead of text"),
        ({"question": "?", "gold": "7", "choices": "AB", "response": "7"}, "in.jsonl, line 3: choices: is 'AB'"),
        ("[" * 100_000, "in.jsonl, line 3: "),
    ],
)
def test_bad_rows_are_named_by_their_line_and_refused_or_left_out(line, named, capsys):
    write(Path("in.jsonl"), [ROWS[0], "", line, ROWS[1]])
    assert judge("--input", "in.jsonl", "--output", "out.jsonl") == 2
    assert named in capsys.readouterr().err
    assert not Path("out.jsonl").exists()
    assert judge("--input", "in.jsonl", "--output", "out.jsonl", "--on_bad_row", "skip") == 0
    assert f"left out: {named}" in capsys.readouterr().out
    assert [row["verdict"] for row in read("out.jsonl")] == ["right", "wrong"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--judge", "llm"], "judge: judge_model: is needed where judge is 'llm'"),
        (["--judge", "cascade", "--judge_model", "m"], "judge: judge_base_urls: is needed"),
        (["--judge_model", "m"], "judge_model: rules ask no language model"),
        (["--num_workers", "0"], "num_workers: 0 has to be at least 1"),
        (["--output", "in.jsonl"], "is the input, too"),
        (["--input", "gone.jsonl"], "gone.jsonl: there is no such file"),
        (["--judge", "llm", "--judge_model", "m", "--judge_base_urls", "http://127.0.0.1:9/v1", "--judge_max_retries", "0"], "judge: no answer after 1 attempts"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_used(flags, named, capsys):
    write(Path("in.jsonl"), ROWS)
    assert judge("--input", "in.jsonl", "--output", "out.jsonl", *flags) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "in.jsonl: there are no rows"),
        (" \n\n", "in.jsonl: there are no rows"),
        (json.dumps(ROWS), "in.jsonl: is one JSON document; JSON lines are read"),
        (json.dumps(ROWS, indent=2), "in.jsonl: is one JSON document; JSON lines are read"),
        (json.dumps(ROWS[0], indent=2), "in.jsonl: is one JSON document; JSON lines are read"),
    ],
    ids=["empty", "blank", "list", "indented list", "indented row"],
)
def test_files_that_are_no_json_lines_are_refused_as_a_whole(content, named, capsys):
    Path("in.jsonl").write_text(content)
    assert judge("--input", "in.jsonl", "--output", "out.jsonl") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
    assert judge("--input", ".", "--output", "out.jsonl") == 2
    assert "is a folder" in capsys.readouterr().err


def test_a_mark_of_the_byte_order_is_no_part_of_the_first_row():
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8-sig")
    assert judge("--input", "in.jsonl", "--output", "out.jsonl") == 0
    assert len(read("out.jsonl")) == len(ROWS)


def test_a_column_can_be_chosen():
    write(Path("in.jsonl"), [{"question": "?", "gold": "7", "prediction": "8", "response": "The answer is 7."}])
    for flags, verdict in (
        ([], "wrong"),
        (["--column", "response"], "right"),
        (["--column", "prediction"], "wrong"),
    ):
        assert judge("--input", "in.jsonl", "--output", "out.jsonl", *flags) == 0
        assert read("out.jsonl")[0]["verdict"] == verdict


def test_a_language_model_decides_what_rules_leave_open_once(capsys):
    def say(payload):
        return ["Yes" if "blue ones" in payload["messages"][0]["content"] else "No"]

    write(Path("in.jsonl"), ROWS)
    with ChatServer(say) as server:
        flags = [
            "--judge",
            "cascade",
            "--judge_model",
            "m",
            "--judge_base_urls",
            server.url,
            "--judge_cache",
            "c.sqlite",
        ]
        for _ in range(2):
            assert judge("--input", "in.jsonl", "--output", "out.jsonl", *flags) == 0
            rows = read("out.jsonl")
            assert [row["verdict"] for row in rows] == ["right", "wrong", "right", "right"]
            assert rows[2]["reason"] == "not clear which choice; language model"
        assert len(server.payloads) == 3  # one row and two openings
        server.failures = ["500"] * 9
        write(Path("in.jsonl"), [{**ROWS[2], "prediction": "blue one of them"}])
        server.answer = lambda payload: ["Yes"]
        server.failures = [None, "500"]
        assert judge("--input", "in.jsonl", "--output", "out.jsonl", *flags, "--judge_max_retries", "0") == 1
    [row] = read("out.jsonl")
    assert row["verdict"] == "unknown"
    assert "status 500" in row["reason"]
    assert "1 of them are unknown because no server answered" in capsys.readouterr().out


def test_a_server_that_is_gone_ends_the_run_and_a_rerun_goes_on(capsys, monkeypatch):
    monkeypatch.setattr("mm_prm.commands.judge._ROWS_AT_ONCE", 10)
    rows = [{"question": f"{number}?", "gold": "7", "prediction": "seven"} for number in range(30)]
    write(Path("in.jsonl"), rows)
    with ChatServer(lambda payload: ["Yes"]) as server:
        flags = ["--judge", "llm", "--judge_model", "m", "--judge_base_urls", server.url, "--judge_max_retries", "0"]
        server.failures = [None] * 12 + ["500"] * 18  # the opening, a lot and a row
        assert judge("--input", "in.jsonl", "--output", "out.jsonl", *flags, "--judge_max_concurrency", "1") == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("mm-prm judge: judge: no answer after 1 attempts; the last: ")
        assert error.endswith("; 10 rows are judged, and the same command goes on after them")
        assert not Path("out.jsonl").exists() and len(read(".out.jsonl.part")) == 10
        server.failures, asked = [], len(server.payloads)
        assert judge("--input", "in.jsonl", "--output", "out.jsonl", *flags) == 0
        assert len(server.payloads) == asked + 1 + 20
    assert [(row["question"], row["verdict"]) for row in read("out.jsonl")] == [(r["question"], "right") for r in rows]


def test_half_a_surrogate_pair_survives():
    write(Path("in.jsonl"), [{**ROWS[0], "note": "\ud800"}])
    assert judge("--input", "in.jsonl", "--output", "out.jsonl") == 0
    assert read("out.jsonl")[0]["note"] == "\ud800"


def test_a_killed_run_goes_on_after_what_it_finished(capsys):
    rows = [
        {**ROWS[0], "number": number, "prediction": f"{number}\\sqrt{{2}}", "gold": f"\\sqrt{{{2 * number * number}}}"}
        for number in range(1000)
    ]
    write(Path("in.jsonl"), rows)
    command = [sys.executable, "-m", "mm_prm.cli", "judge", "--input", "in.jsonl", "--output", "out.jsonl"]
    flags = ["--num_workers", "2"]
    part = Path(".out.jsonl.part")
    run = subprocess.Popen([*command, *flags], start_new_session=True, stderr=subprocess.DEVNULL)
    while not part.exists() or not part.stat().st_size:
        assert run.poll() is None
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    kept = part.read_text()
    assert 0 < kept.count("\n") < len(rows)
    part.write_text(kept + '{"question": "half a li')
    assert judge("--input", "in.jsonl", "--output", "out.jsonl", *flags) == 0
    assert f"{kept.count(chr(10))} rows were judged by an earlier run" in capsys.readouterr().err
    judged = read("out.jsonl")
    assert [row["number"] for row in judged] == list(range(1000))
    assert {row["verdict"] for row in judged[1:]} == {"right"}
    assert Path("out.jsonl").read_text().startswith(kept)
    assert not part.exists()


def test_what_another_run_left_behind_is_not_used():
    write(Path("in.jsonl"), ROWS)
    Path(".out.jsonl.part").write_text('{"verdict": "right"}\n')
    Path(".out.jsonl.part.key").write_text("another")
    assert judge("--input", "in.jsonl", "--output", "out.jsonl") == 0
    assert len(read("out.jsonl")) == 4
    assert read("out.jsonl")[0]["question"] == "3 + 4?"


def test_workers_give_what_one_process_gives():
    if not SAMPLE.exists():
        pytest.skip(f"{SAMPLE} is missing")
    for workers in (1, 2):
        flags = ["--num_workers", workers, "--output_json", f"{workers}.json"]
        assert judge("--input", SAMPLE, "--output", f"{workers}.jsonl", *flags) == 0
    assert Path("1.jsonl").read_text() == Path("2.jsonl").read_text()
    agreement = json.loads(Path("1.json").read_text())["agreement"]
    assert agreement["agree"] >= 0.99
    assert agreement["precision"] >= 0.98
    assert agreement["recall"] >= 0.99


def test_a_second_run_on_the_same_output_is_refused_until_the_first_has_ended(capsys):
    write(Path("in.jsonl"), ROWS)
    assert judge("--input", "in.jsonl", "--output", "out.jsonl") == 0
    assert {path.name for path in Path().iterdir()} == {"in.jsonl", "out.jsonl", "out.jsonl.settings.yaml"}
    with filelock.FileLock(".out.jsonl.lock"):
        assert judge("--input", "in.jsonl", "--output", "out.jsonl") == 2
        assert "output: another run is judging into out.jsonl: wait for it" in capsys.readouterr().err
        assert judge("--input", "in.jsonl", "--output", "other.jsonl") == 0
    assert judge("--input", "in.jsonl", "--output", "out.jsonl") == 0
