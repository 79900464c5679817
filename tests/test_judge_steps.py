"""`mm-prm judge-steps` through its own front door, on the embedded trees."""

import contextlib
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest

from mm_prm.cli import main
from mm_prm.data.features import PROBLEM_FEATURES, TREE_FEATURES, validate_rows
from mm_prm.data.mini import problem_from_id
from mm_prm.embedded import embedded_path
from mm_prm.hub.data import dataset_upload, read_tables

from .chat_server import ChatServer


def text_of(payload):
    content = payload["messages"][0]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "<image>") for part in content)


def asked(payload):
    """What a request asks about: the question, the steps so far and the steps to judge."""
    text = text_of(payload)
    question = text.split("[Problem]\n\n")[1].split("\n\n[Correct Answer]")[0]
    prefix = text.split("[Steps So Far]\n\n")[1].split("\n\n[Following Steps]")[0]
    return question, prefix, text.split("[Following Steps]\n\n")[1].split("\n\nAre the following")[0]


def probability(*what):
    return (int(hashlib.sha256("|".join(what).encode()).hexdigest(), 16) % 9 + 1) / 10


def opinion(payload):
    yes = probability(*asked(payload))
    return [{"Yes": math.log(yes), "No": math.log(1 - yes)}]


@pytest.fixture(scope="module")
def trees():
    return pyarrow.parquet.read_table(embedded_path("mini_trees.parquet")).slice(0, 6).to_pylist()


def write_input(folder, trees):
    datasets.Dataset.from_list(trees).to_parquet(folder / "trees.parquet")
    problems = [problem_from_id(tree["problem_id"]).row() for tree in trees]
    datasets.Dataset.from_list(problems, features=PROBLEM_FEATURES).to_parquet(folder / "problems.parquet")


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch, trees):
    monkeypatch.chdir(tmp_path)
    write_input(tmp_path, trees)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, trees):
    """What a run gives that nothing disturbs, and its number of requests."""
    folder = tmp_path_factory.mktemp("whole")
    write_input(folder, trees)
    with ChatServer(opinion) as server, contextlib.chdir(folder):
        return judged_by(server, "judged.parquet"), len(server.payloads)


def arguments(url, *more, output="judged.parquet"):
    files = ("--trees", "trees.parquet", "--problems", "problems.parquet", "--output", output)
    return ["judge-steps", *files, "--model", "m", "--base_url", url, *map(str, more)]


def judged(path="judged.parquet"):
    return pyarrow.parquet.read_table(path).to_pylist()


def with_prefixes(tree):
    prefixes = {-1: []}
    for node in tree["nodes"]:
        prefix = prefixes[node["parent_id"]]
        prefixes[node["node_id"]] = prefix + node["steps"]
        yield node, prefix


def test_every_node_has_its_score_and_nothing_else_changes(trees, capsys):
    with ChatServer(opinion) as server:
        assert main(arguments(server.url, "--output_json", "summary.json")) == 0
        requests = server.payloads[1:]  # the first is the question of the start
    rows = judged()
    assert validate_rows("tree", rows) == len(trees)
    assert pyarrow.parquet.read_schema("judged.parquet").equals(TREE_FEATURES.arrow_schema)
    num_nodes = 0
    for row, tree in zip(rows, trees, strict=True):
        question = problem_from_id(tree["problem_id"]).row()["question"]
        shown = question if "<image>" in question else "<image>" + question
        for node, prefix in with_prefixes(row):
            if not node["steps"]:
                assert node["judge_score"] is None
                continue
            num_nodes += 1
            expected = probability(shown, "\n\n".join(prefix) or "(none)", "\n\n".join(node["steps"]))
            assert node["judge_score"] == pytest.approx(expected, abs=1e-6)
        identity = json.loads(json.loads(row["settings"])["step_judge"])
        assert identity["model"] == "m"
        bare = [{name: node[name] for name in tree["nodes"][0]} for node in row["nodes"]]
        assert (bare, row["rollouts"]) == (tree["nodes"], tree["rollouts"])
    assert len(requests) == num_nodes
    summary = json.loads(Path("summary.json").read_text())
    assert (summary["trees"], summary["nodes"], summary["asked"]) == (len(trees), num_nodes, num_nodes)
    assert summary["valid"] + summary["invalid"] == num_nodes
    assert summary["unknown"] == {"not_answered": 0, "unclear": 0}
    assert "judge and Monte Carlo agree on" in capsys.readouterr().out


def test_what_is_not_known_is_null_and_asked_again(trees, whole, capsys):
    hard = trees[3]["nodes"][1]["steps"][0]
    with ChatServer(opinion) as server:

        def unclear(payload):
            return [{"Well": -0.1, "Yes": -5.0}] if asked(payload)[2] == hard else opinion(payload)

        server.answer = unclear
        assert main(arguments(server.url)) == 0  # the model answered, if not the question
        rows = judged()
        unknown = [node for row in rows for node in row["nodes"] if node["judge_score"] is None and node["steps"]]
        assert unknown
        assert all(node["steps"] == [hard] for node in unknown)
        assert "the reply begins with 'Well'" in capsys.readouterr().out
        server.answer, before = opinion, len(server.payloads)
        assert main(arguments(server.url)) == 0
        assert [asked(payload)[2] for payload in server.payloads[before + 1 :]] == [hard] * len(unknown)
    assert judged() == whole[0]


def judged_by(server, output):
    assert main(arguments(server.url, output=output)) == 0
    return judged(output)


def test_a_request_that_no_server_answers_is_unknown_and_the_exit_status_tells(whole, capsys):
    with ChatServer(opinion) as server:
        calls = iter(range(10**6))
        lock = threading.Lock()

        def some_fail(payload):
            with lock:
                number = next(calls)
            if number and number % 4 == 0:  # now and then, so that nobody thinks the server is gone
                return [{"Yes": math.nan}]
            return opinion(payload)

        server.answer = some_fail
        assert main(arguments(server.url, "--max_retries", 0, "--max_concurrency", 1)) == 1
        open_nodes = sum(node["judge_score"] is None for row in judged() for node in row["nodes"] if node["steps"])
        assert open_nodes > 3
        assert f"{open_nodes} not answered" in capsys.readouterr().out
        assert main(["rows", "--trees", "judged.parquet", "--output", "r.parquet", "--keep", "consensus"]) == 0
        server.answer = opinion
        assert main(arguments(server.url)) == 0
    assert judged() == whole[0]


def test_a_server_that_goes_away_ends_the_run_and_the_same_command_goes_on(whole, capsys):
    num_requests = whole[1]
    with ChatServer(opinion) as server:
        server.answer = lambda payload: opinion(payload) if len(server.payloads) < 20 else ["x", 1][1:]
        more = ("--max_retries", 0, "--max_concurrency", 2)
        assert main(arguments(server.url, *more)) == 2
        message = capsys.readouterr().err
        assert "judged trees are in judged.parquet.journal.sqlite, and the same command goes on" in message
        assert not Path("judged.parquet").exists()
        server.answer, before = opinion, len(server.payloads)
        assert main(arguments(server.url)) == 0
        assert len(server.payloads) - before < num_requests
    assert judged() == whole[0]


def test_a_killed_run_goes_on_where_it_stopped(whole):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with ChatServer(opinion) as server:
        server.seconds = 0.1
        command = [sys.executable, "-m", "mm_prm.cli", *arguments(server.url, "--max_concurrency", 2)]
        run = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        while len(server.payloads) < 15:
            assert run.poll() is None
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
        run.wait()
        server.seconds, before = 0.0, len(server.payloads)
        assert main(arguments(server.url)) == 0
        assert len(server.payloads) - before < whole[1] - 5
    assert judged() == whole[0]


def test_another_judge_asks_anew():
    with ChatServer(opinion) as server:
        judged_by(server, "judged.parquet")
        num_requests = len(server.payloads)
        again = [word if word != "m" else "n" for word in arguments(server.url)]
        assert main(again) == 0
        assert len(server.payloads) == 2 * num_requests
        # What is judged already can be judged again, too.
        again[again.index("trees.parquet")] = "judged.parquet"
        again[again.index("judged.parquet", again.index("--output"))] = "twice.parquet"
        assert main(again) == 0
    strip = [{**row, "settings": ""} for row in judged()]
    assert [{**row, "settings": ""} for row in judged("twice.parquet")] == strip


def test_judged_trees_go_to_the_hub_and_give_rows_by_consensus(trees):
    with ChatServer(opinion) as server:
        rows = judged_by(server, "judged.parquet")
    Path("tables").mkdir()
    Path("judged.parquet").rename("tables/trees.parquet")
    with dataset_upload(read_tables("tables"), "me/trees") as upload:
        file = upload.files["trees/train-00000-of-00001.parquet"]
        assert pyarrow.parquet.read_table(file).to_pylist() == rows
    # Trees of before go there, too, and load as the same kind of row.
    Path("trees.parquet").rename("tables/trees.parquet")
    with dataset_upload(read_tables("tables"), "me/trees") as upload:
        file = upload.files["trees/train-00000-of-00001.parquet"]
        loaded = datasets.Dataset.from_parquet(str(file), cache_dir="cache")
        assert loaded.features == TREE_FEATURES
        assert all(node["judge_score"] is None for row in loaded for node in row["nodes"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trees.parquet": "nothing.parquet"}, "nothing.parquet: there is no such file"),
        ({"problems.parquet": "mini:test:3"}, "6 trees belong to no problem in the problems: 'mini-annotation-"),
    ],
)
def test_what_cannot_be_used_is_named_before_anything_is_asked(change, message, capsys):
    with ChatServer(opinion) as server:
        assert main([change.get(word, word) for word in arguments(server.url)]) == 2
        assert server.payloads == []
    assert message in capsys.readouterr().err


def test_a_wrong_address_is_told_in_one_line(capsys):
    assert main(arguments("http://127.0.0.1:9/v1", "--max_retries", 0)) == 2
    assert "base_url: no answer after 1 attempts" in capsys.readouterr().err
    without = arguments("x")
    place = without.index("--base_url")
    assert main(without[:place] + without[place + 2 :]) == 2
    assert "base_url: name the server" in capsys.readouterr().err
