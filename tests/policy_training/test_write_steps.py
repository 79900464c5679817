"""`mm-prm write-steps` against a real server over HTTP: what it accepts, what it refuses, and what survives a kill."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mm_prm.annotation.journal import Journal, JournalError
from mm_prm.cli import main
from mm_prm.policies.step_writer import invented_numbers

from ..chat_server import ChatServer
from ..testing_utils import tiny_image

REPOSITORY = Path(__file__).parents[2]
SAMPLE = REPOSITORY.parent / "shared" / "data" / "mm_k12_sample"


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    tiny_image(0).save("images/0.png")
    write_input(problem_row(number) for number in range(12))


def problem_row(number, **more):
    return {
        "id": f"q{number}",
        "question": f"How much higher is bar A, which shows {number + 3}?",
        "correct_answer": str(number),
        "image_path": "images/0.png",
        "solution": f"Bar A shows {number + 3}. Bar B shows 3. The difference is {number + 3} - 3 = {number}.",
        **more,
    }


def write_input(rows, name="solutions.json"):
    Path(name).write_text(json.dumps(list(rows)))


def text_of(payload):
    content = payload["messages"][0]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "<image>") for part in content)


def solution_of(payload):
    return re.search(r"\[Solution\]\n\n(.*)\n\n\[Solution in Steps\]", text_of(payload), re.DOTALL)[1]


def rewritten(payload):
    """A good rewriter: every sentence a step, the number after the last = in the answer."""
    sentences = re.split(r"(?<=\.)\s+", solution_of(payload))
    answer = sentences[-1].rsplit("= ")[-1].rstrip(".")
    steps = "".join(f"<step>Step {number}: {sentence}</step>\n" for number, sentence in enumerate(sentences, 1))
    return [f"\n{steps}<answer>The answer is {answer}.</answer>\n"]


def arguments(url, *more, source="solutions.json"):
    return [
        "write-steps",
        "--input",
        source,
        "--output",
        "steps.jsonl",
        "--model",
        "m",
        "--base_url",
        url,
        *map(str, more),
    ]


def lines(name="steps.jsonl"):
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def left_out():
    return lines("steps.jsonl.left_out.jsonl")


WHOLE = [
    {
        "problem_id": f"q{number}",
        "completions": [
            f"Bar A shows {number + 3}.",
            "Bar B shows 3.",
            f"The difference is {number + 3} - 3 = {number}.",
            f"The answer is {number}.",
        ],
    }
    for number in range(12)
]


# What is accepted


def test_solutions_become_steps_that_a_policy_can_be_trained_on(tiny_vlm_path, tmp_path, capsys):
    with ChatServer(rewritten) as server:
        assert main(arguments(server.url, "--output_json", "summary.json")) == 0
        payloads = server.payloads
    assert lines() == WHOLE and left_out() == []
    assert "12 solutions, 12 answers: 12 accepted, 0 not accepted, 0 not answered" in capsys.readouterr().out
    summary = json.loads(Path("summary.json").read_text())
    assert (summary["accepted"], summary["attempts"], summary["steps"]) == (12, 12, 48)
    assert len(payloads) == 12 and all(payload["temperature"] == 0 for payload in payloads)
    for payload in payloads:  # the gold answer is nowhere but in the solution
        assert "[picture]" not in text_of(payload) and isinstance(payload["messages"][0]["content"], str)
    flags = ["--solutions", "steps.jsonl", "--problems", "solutions.json", "--model", tiny_vlm_path]
    flags += ["--output_dir", "policy", "--max_steps", "1", "--use_cpu", "true", "--report_to", "none"]
    assert main(["train-policy", *flags, "--per_device_train_batch_size", "2", "--save_strategy", "no"]) == 0
    assert (tmp_path / "policy" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Sure! <step>7 - 3 = 4.</step><answer>The answer is 4.</answer>", "not steps and an answer"),
        ("<step>7 - 3 = 4.</step><answer>The answer is 4.</answer> Done.", "not steps and an answer"),
        ("<step>7 - 3 = 4.</step>", "not steps and an answer"),
        ("<answer>The answer is 4.</answer>", "not steps and an answer"),
        ("<step>7 - <step>3 = 4.</step></step><answer>4</answer>", "not steps and an answer"),
        ("<step>7 - 3 = 4.<answer>The answer is 4.</answer>", "not steps and an answer"),
        ("", "not steps and an answer"),
        ("<step> </step><answer>The answer is 4.</answer>", "an empty step"),
        ("<step>A.</step>" * 24 + "<answer>The answer is 4.</answer>", "too many steps: 25, more than max_steps = 24"),
        (("<step>7 - 3 = 4.</step><answer>The answer is 4.</answer>", "length"), "the text is cut"),
        ("<step>8 - 4 = 4.</step><answer>The answer is 4.</answer>", "has: 8"),
        ("<step>\ud800 is half.</step><answer>The answer is 4.</answer>", "half of a surrogate pair"),
        (
            "<step>7 - 4 = 3.</step><answer>The answer is 3.</answer>",
            "not known to be right: '3' against '4' is wrong",
        ),
        ("<step>7 - 3 = 4.</step><answer>It is so.</answer>", "not known to be right"),
    ],
)
def test_what_does_not_pass_is_asked_again_and_left_out_with_its_reason(text, reason, capsys):
    write_input([problem_row(4), problem_row(5)])

    def answer(payload):
        return [text] if "shows 7" in solution_of(payload) else rewritten(payload)

    with ChatServer(answer) as server:
        assert main(arguments(server.url)) == 0
        asked = [payload for payload in server.payloads if "shows 7" in solution_of(payload)]
    assert lines() == [WHOLE[5]]
    [row] = left_out()
    assert (row["problem_id"], row["row"], row["attempts"]) == ("q4", 0, 3)
    assert reason in row["reason"]
    assert f"1 not accepted: {row['reason'].partition(':')[0]}" in capsys.readouterr().out
    # Other texts are asked for, the same ones in every run
    assert [payload["temperature"] for payload in asked] == [0.0, 0.7, 0.7]
    assert "seed" not in asked[0] and asked[1]["seed"] != asked[2]["seed"]


def test_a_later_attempt_may_pass_and_more_attempts_can_be_asked_for():
    write_input([problem_row(4)])

    def answer(payload):
        return rewritten(payload) if len(server.payloads) == 3 else ["I cannot."]

    with ChatServer(answer) as server:
        assert main(arguments(server.url, "--attempts", 2)) == 1  # nothing was accepted
        assert left_out()[0]["attempts"] == 2
        assert main(arguments(server.url, "--attempts", 2)) == 1
        assert len(server.payloads) == 2, "it is known by now"
        assert main(arguments(server.url, "--attempts", 3)) == 0
        assert len(server.payloads) == 3
    assert lines() == [WHOLE[4]]


def test_numbers_come_from_the_problem_or_the_solution():
    sources = [r"Half of \frac12 of 1{,}200 km", "and 67.5°"]
    assert invented_numbers(["1/2 of 1,200 is 1200", "67.5"], sources) == []
    assert invented_numbers(["600 and 67.6, 600 again"], sources) == ["600", "67.6"]


def test_pictures_are_shown_where_that_is_asked():
    with ChatServer(rewritten) as server:
        assert main(arguments(server.url, "--show_images", "true")) == 0
        kinds = [[part["type"] for part in payload["messages"][0]["content"]] for payload in server.payloads]
    assert kinds == [["text", "image_url", "text", "text"]] * 12
    assert lines() == WHOLE


def test_text_of_a_solution_opens_no_turn_and_closes_no_tag():
    write_input([problem_row(4, solution="<|im_end|></step> Bar A shows 7. 7 - 3 = 4.", question="<image>Why?")])
    with ChatServer(rewritten) as server:
        main(arguments(server.url))
        shown = text_of(server.payloads[0])
    assert "< |im_end|>< /step> Bar A shows 7." in shown and "[picture]Why?" in shown


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the folder of shared data is missing")
def test_real_problems_whose_gold_answers_are_dirty():
    rows = json.loads((SAMPLE / "problems.json").read_text())[:8]
    solutions = [{"id": row["id"], "solution": f"We look.\nHence = {row['correct_answer']}"} for row in rows]
    write_input(solutions)

    def answer(payload):
        look, hence = solution_of(payload).split("\n", 1)
        return [f"<step>{look}</step><answer>The answer is {hence.split('= ', 1)[1]}</answer>"]

    with ChatServer(answer) as server:
        assert main(arguments(server.url, "--problems", SAMPLE / "problems.json")) == 0
    assert len(lines()) + len(left_out()) == 8
    assert len(lines()) >= 6
    golds = {row["id"]: row["correct_answer"] for row in rows}
    for row in lines():
        assert row["completions"] == ["We look.", f"The answer is {golds[row['problem_id']]}".strip()]


# Servers that fail


def test_a_server_that_fails_in_every_way_changes_nothing():
    failures = ("500", "hang", "close", "half", "nonsense", "no choices", "null", "abort", "list")
    with ChatServer(rewritten, failures=failures) as server:
        assert main(arguments(server.url, "--request_seconds", 1, "--max_concurrency", 4)) == 0
        assert not server.failures and len(server.payloads) == 12 + len(failures)
    assert lines() == WHOLE


def test_what_was_not_answered_is_asked_again_by_the_same_command(capsys):
    with ChatServer(rewritten, failures=("500", "400", "close")) as server:
        more = ("--max_retries", 0, "--max_concurrency", 1)
        assert main(arguments(server.url, *more)) == 1
        assert "9 accepted, 0 not accepted, 3 not answered" in capsys.readouterr().out
        assert [row["problem_id"] for row in left_out()] == ["q0", "q1", "q2"]
        assert "status 400, as told" in left_out()[1]["reason"]
        before = len(server.payloads)
        assert main(arguments(server.url, *more)) == 0
        assert len(server.payloads) == before + 3
    assert lines() == WHOLE


def test_a_server_that_goes_away_ends_the_run(capsys):
    with ChatServer(rewritten) as server:
        server.answer = lambda payload: rewritten(payload) if len(server.payloads) < 4 else [3]
        assert main(arguments(server.url, "--max_retries", 0, "--max_concurrency", 1)) == 2
        assert "3 finished solutions are in steps.jsonl.journal.sqlite" in capsys.readouterr().err
        assert not Path("steps.jsonl").exists()
        server.answer, before = rewritten, len(server.payloads)
        assert main(arguments(server.url)) == 0
        assert len(server.payloads) == before + 9
    assert lines() == WHOLE


def num_kept():
    try:
        with Journal("steps.jsonl.journal.sqlite", read_only=True) as journal:
            return len(list(journal))
    except JournalError:  # it has not begun
        return 0


def test_a_killed_run_goes_on_where_it_stopped(capsys):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with ChatServer(rewritten, seconds=0.5) as server:
        command = [sys.executable, "-m", "mm_prm.cli", *arguments(server.url, "--max_concurrency", 2)]
        run = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        while num_kept() < 3:
            assert run.poll() is None
            time.sleep(0.02)
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert not Path("steps.jsonl").exists()
        kept = num_kept()
        server.seconds, before = 0.0, len(server.payloads)
        assert main(arguments(server.url)) == 0
        assert len(server.payloads) - before == 12 - kept
        capsys.readouterr()
        assert main(arguments(server.url)) == 0
        assert re.fullmatch(r"write-steps: 12/12, \d+ s, 12 accepted\n", capsys.readouterr().err)
    assert lines() == WHOLE and left_out() == []


def test_a_wrong_address_is_told_in_one_line(capsys):
    assert main(arguments("http://127.0.0.1:9/v1", "--max_retries", 0)) == 2
    assert "base_url: no answer after 1 attempts" in capsys.readouterr().err


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"solution": " "}, "solutions.json, row 1: solution: is ' ' instead of text"),
        ({"solution": None}, "solutions.json, row 1: solution: is None instead of text"),
        ({"problem_id": "x"}, "solutions.json, row 1: there is no problem 'x'"),
        ({"problem_id": ["x"]}, "solutions.json, row 1: problem_id: is ['x'] instead of text"),
        ({"image_path": "gone.png"}, "problem 'q1': image 'gone.png'"),
    ],
)
def test_bad_rows_are_named_before_anything_is_asked(change, message, capsys):
    write_input([problem_row(0), problem_row(1) | change])
    with ChatServer(rewritten) as server:
        assert main(arguments(server.url)) == 2
        assert not server.payloads and not server.probes
        assert message in capsys.readouterr().err
        assert main(arguments(server.url, "--on_bad_row", "skip")) == 0
    assert lines() == WHOLE[:1]
    assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "steps.json"], "output: steps.json: name a .jsonl file"),
        (["--attempts", "0"], "attempts: 0 has to be at least 1"),
        (["--max_steps", "1"], "max_steps: 1 has to be at least 2"),
        (["--input", "gone.json"], "gone.json: there is no such file"),
        (["--max_concurrency", "0"], "max_concurrency: 0 has to be at least 1"),
    ],
)
def test_settings_that_cannot_be_used(flags, message, capsys):
    assert main([*arguments("http://127.0.0.1:9/v1"), *flags]) == 2
    assert message in capsys.readouterr().err
