"""What goes wrong outside: a full disk, servers that fail, Ctrl-C. Nothing finished is lost, and the status tells."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from mm_prm.annotation import Journal
from mm_prm.cli import main
from tests.chat_server import ChatServer

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def problems(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "red").save("red.png")
    rows = [
        {"id": f"q{number}", "question": f"What is {number}?", "correct_answer": "41", "image_path": "red.png"}
        for number in range(12)
    ]
    Path("problems.json").write_text(json.dumps(rows))


def solve(payload):
    steps = ["First we look.", "Then we count."]
    done = sum(step in str(payload["messages"]) for step in steps)
    separator = "\n\n" if payload["messages"][-1]["role"] == "assistant" else ""
    ends = [f"The answer is {41 + number % 2}." for number in range(payload["n"])]
    return [separator + "\n\n".join([*steps[done:], end]) for end in ends]


def command(server, *flags):
    base = ["annotate", "--problems", "problems.json", "--output", "trees", "--trees_in_flight", "2"]
    size = ["--num_rollouts", "4", "--rollout_budget", "12"]
    return [*base, *size, "--policy", "m", "--policy_engine", "server", "--policy_base_urls", server.url, *flags]


def stored():
    with Journal("trees.journal.sqlite", read_only=True) as journal:
        return {row["problem_id"]: row["status"] for row in journal}


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def interrupt(run):
    """Sends Ctrl-C; five seconds later all has ended."""
    began = time.monotonic()
    run.send_signal(signal.SIGINT)
    messages = run.communicate(timeout=100)[1]
    assert time.monotonic() - began < 5
    assert run.returncode == 130 and "Traceback" not in messages
    assert "interrupted; 0 trees are in trees.journal.sqlite" in messages


def test_a_full_disk_ends_the_run_and_the_next_one_goes_on(capsys):
    def limit():  # what writes beyond it gets an error, as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    with ChatServer(solve) as server:
        run = subprocess.run(
            [sys.executable, "-m", "mm_prm.cli", *command(server)],
            env=environment(),
            preexec_fn=limit,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert run.returncode == 2, run.stderr
        assert "mm-prm annotate: journal 'trees.journal.sqlite'" in run.stderr and "Traceback" not in run.stderr
        kept = stored()
        assert 0 < len(kept) < 12 and set(kept.values()) == {"complete"}
        assert main(command(server)) == 0
    assert stored() == dict.fromkeys((f"q{number}" for number in range(12)), "complete")
    assert f"12 trees complete ({len(kept)} from the journal)" in capsys.readouterr().out


def test_a_server_that_fails_in_every_way_changes_no_tree():
    with ChatServer(solve) as server:
        assert main([*command(server), "--journal", "calm.sqlite"]) == 0
    failures = ("500", "close", "half", "nonsense", "hang", "list")
    with ChatServer(solve, failures=failures) as server:
        assert main([*command(server), "--policy_request_seconds", "1"]) == 0

    def trees(path):
        with Journal(path, read_only=True) as journal:
            return {row["problem_id"]: (row["nodes"], row["rollouts"]) for row in journal}

    assert trees("trees.journal.sqlite") == trees("calm.sqlite")


def test_a_server_that_goes_away_fails_what_it_has_not_answered(capsys):
    num_answers = 0

    def solve_a_few(payload):
        nonlocal num_answers
        num_answers += 1
        if num_answers > 6:
            raise ConnectionResetError  # the handler ends without an answer
        return solve(payload)

    with ChatServer(solve_a_few) as server:
        assert main([*command(server), "--policy_max_retries", "0"]) == 1
    statuses = stored()
    assert len(statuses) == 12 and set(statuses.values()) == {"complete", "failed"}
    assert "policy: ChatServerError: no answer after 1 attempts" in capsys.readouterr().out
    with ChatServer(solve) as server:
        assert main(command(server)) == 0
    assert set(stored().values()) == {"complete"}


def test_an_image_that_vanishes_fails_its_problem_only():
    from datasets import Dataset, Features, List
    from datasets import Image as ImageFeature

    from mm_prm.annotation import AnnotationConfig, annotate
    from mm_prm.data.features import PROBLEM_FEATURES
    from tests.annotation.scripted import ScriptedJudge, ScriptedPolicy, make_problem

    rows = [make_problem(f"p{number}", images=[{"path": f"{number}.png", "bytes": None}]) for number in range(6)]
    features = Features({**PROBLEM_FEATURES, "images": List(ImageFeature(decode=False))})
    dataset = Dataset.from_list(rows, features=features).cast_column("images", List(ImageFeature()))
    for number in range(6):
        Image.new("RGB", (4, 4)).save(f"{number}.png")
    Path("3.png").unlink()
    config = AnnotationConfig(num_rollouts=4, rollout_budget=12)
    for problems in (dataset, dataset.to_iterable_dataset()):
        found = {row["problem_id"]: row for row in annotate(problems, ScriptedPolicy(), ScriptedJudge(), config)}
        assert {name for name, row in found.items() if row["status"] == "failed"} == {"p3"} and len(found) == 6
        assert "images[0] cannot be read" in found["p3"]["reason"] and "3.png" in found["p3"]["reason"]


def test_ctrl_c_stops_within_five_seconds():
    with ChatServer(solve, seconds=120.0) as server:
        run = subprocess.Popen(
            [sys.executable, "-m", "mm_prm.cli", *command(server)],
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 60
        while len(server.payloads) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(server.payloads) >= 2
        interrupt(run)
        server.closing.set()


def test_ctrl_c_stops_a_policy_in_the_midst_of_a_batch():
    program = """
import sys
import torch
from mm_prm.cli import program
from mm_prm.commands.policy_settings import PolicySettings
class Busy:  # with code that is not Python's, as a model is: Python would abort in it
    def generate(self, requests):
        print("computing", flush=True)
        while True:
            torch.randn(1000, 1000) @ torch.randn(1000, 1000)
PolicySettings.open_policy = lambda settings: Busy()
sys.argv[1:] = ["annotate", "--problems", "problems.json", "--output", "trees"]
program()
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    run = subprocess.Popen([sys.executable, "-c", program], env=environment(), text=True, **pipes)
    assert run.stdout.readline() == "computing\n"
    interrupt(run)
