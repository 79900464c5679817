"""`mm-prm search` on the embedded models: pools that `best-of-n` measures, and a killed run that goes on."""

import json
import re
from pathlib import Path

import datasets
import pytest

from mm_prm.annotation.journal import Journal
from mm_prm.cli import main
from mm_prm.data import validate_rows
from mm_prm.evaluation import stages

from .chat_server import ChatServer


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(stages, "_PROBLEMS_AT_ONCE", 2)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


ARGS = ["search", "--problems", "mini:test:3", "--token_budget", "200", "--num_beams", "4", "--branching", "2"]


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_interrupted_and_continued_equals_uninterrupted(monkeypatch, capsys):
    assert main([*ARGS, "--output", "whole.jsonl", "--output_json", "summary.json"]) == 0
    pools, summary = read("whole.jsonl"), json.loads(Path("summary.json").read_text(encoding="utf-8"))
    assert validate_rows("pool", pools) == summary["problems"] == 3
    assert sum(len(pool["candidates"]) for pool in pools) == summary["candidates"] > 3
    assert 0 < summary["generated_tokens"] <= 600
    for pool in pools:
        assert [len(scores) for scores in pool["step_scores"]] == [len(steps) for steps in pool["candidates"]]

    commit, calls = Journal.commit, []

    def interrupted(self, key, row):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(key)
        commit(self, key, row)

    monkeypatch.setattr(Journal, "commit", interrupted)
    assert main([*ARGS, "--output", "cut.jsonl"]) == 130
    assert "what is finished is in cut.jsonl.journal.sqlite" in capsys.readouterr().err
    monkeypatch.setattr(Journal, "commit", commit)
    assert main([*ARGS, "--output", "cut.jsonl"]) == 0
    assert read("cut.jsonl") == pools
    monkeypatch.setattr(stages, "search", None)  # everything is in the journal
    capsys.readouterr()
    assert main([*ARGS, "--output", "cut.jsonl"]) == 0
    assert re.fullmatch(r"search: 3/3, \d+ s\n", capsys.readouterr().err)
    assert main(["best-of-n", "--pools", "cut.jsonl", "--num_resamples", "20"]) == 0
    assert "Best-of-N, min" in capsys.readouterr().out


def test_a_problem_without_solutions_counts_as_wrong(capsys):
    assert main([*ARGS, "--output", "pools.jsonl", "--strategy", "dvts", "--token_budget", "5"]) == 0
    assert "3 problems, 0 candidates (3 problems have none)" in capsys.readouterr().out
    assert [pool["candidates"] for pool in read("pools.jsonl")] == [[[]]] * 3
    assert main(["best-of-n", "--pools", "pools.jsonl", "--num_resamples", "20", "--output_json", "b.json"]) == 0
    assert json.loads(Path("b.json").read_text(encoding="utf-8"))["pass@1"]["value"] == 0


def test_a_server_writes_the_steps():
    def answer(payload):
        written = payload["messages"][-1]["content"] if payload["messages"][-1]["role"] == "assistant" else ""
        text = "\n\nThe answer is 4." if written else "We look.\n\nThe answer is 4."
        return [text] * payload["n"]

    with ChatServer(answer) as server:
        flags = ["--policy", "m", "--policy_engine", "server", "--policy_base_urls", server.url]
        assert main([*ARGS, *flags, "--output", "pools.jsonl", "--token_budget", "60"]) == 0
    for pool in read("pools.jsonl"):
        assert pool["candidates"][0] == ["We look.", "The answer is 4."] and pool["answers"][0] == "4"


@pytest.mark.parametrize("model", ["me/misspelt", "no_model"])
def test_a_model_that_cannot_be_had_is_told_before_the_policy_is_opened(model, capsys):
    Path("no_model").mkdir()
    with ChatServer(lambda payload: ["The answer is 4."] * payload["n"]) as server:
        flags = ["--policy", "m", "--policy_engine", "server", "--policy_base_urls", server.url]
        assert main([*ARGS, *flags, "--output", "pools.jsonl", "--model", model]) == 2
        assert not server.probes and not server.payloads
    assert model in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_beams", "5"], "search: num_beams = 5: has to be a multiple of branching = 2"),
        (["--policy_engine", "server"], "policy_base_urls: is needed"),
        (["--engine", "server"], "base_url: is needed"),
        (["--strategy", "bfs"], "strategy: 'bfs' is not one of"),
        (["--model", "./gone"], "model: ./gone: there is no such folder"),
        (["--model", "me/misspelt"], "model: me/misspelt: "),
        (["--policy", "me/misspelt"], "policy: me/misspelt: "),
    ],
)
def test_bad_settings_are_told_in_one_line(flags, message, capsys):
    assert main([*ARGS, "--output", "pools.jsonl", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1] and "Traceback" not in error
