"""What `mm-prm annotate` shows and costs; `--shard` and `mm-prm journal merge`: a job array makes the trees of one run."""

import json
import sys
from pathlib import Path

import datasets
import pytest

from mm_prm.annotation import Journal, Progress
from mm_prm.cli import main
from mm_prm.commands.annotate import Rates
from mm_prm.commands.policy_settings import PolicySettings
from tests.annotation.scripted import ScriptedPolicy


@pytest.fixture(autouse=True)
def policy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    policy = ScriptedPolicy(num_steps=4)
    monkeypatch.setattr(PolicySettings, "open_policy", lambda settings: policy)
    return policy


def annotate(*flags):
    base = ["--problems", "mini:annotation:7", "--num_rollouts", "4", "--rollout_budget", "24"]
    return main(["annotate", *base, *flags])


def trees(path):
    return [{**tree, "cost": {**tree["cost"], "seconds": 0}} for tree in datasets.Dataset.from_parquet(path)]


def test_shards_merged_are_one_run(policy, capsys):
    assert annotate("--output", "whole.parquet") == 0
    for number in (1, 2, 3):
        assert annotate("--output", "trees.parquet", "--shard", f"{number}/3") == 0
    sizes = [len(trees(f"trees.{number}-of-3.parquet")) for number in (1, 2, 3)]
    assert sizes == [3, 2, 2]
    shards = [f"trees.{number}-of-3.parquet.journal.sqlite" for number in (1, 2, 3)]
    capsys.readouterr()
    assert main(["journal", "merge", *shards, "--output", "trees.parquet.journal.sqlite"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{shards[0]}: 3 rows, 3 of them new",
        f"{shards[1]}: 2 rows, 2 of them new",
        f"{shards[2]}: 2 rows, 2 of them new",
        "trees.parquet.journal.sqlite: 7 rows",
    ]
    policy.calls.clear()
    assert annotate("--output", "trees.parquet") == 0
    assert not policy.calls, "every tree came from the merged journal"
    assert trees("trees.parquet") == trees("whole.parquet")
    # Once more: nothing is new.
    assert main(["journal", "merge", *shards, "--output", "trees.parquet.journal.sqlite"]) == 0
    assert "2 rows, 0 of them new" in capsys.readouterr().out


def test_of_two_rows_the_complete_one_stands(tmp_path):
    rows = {"failed": {"status": "failed", "n": 1}, "complete": {"status": "complete", "n": 2}}
    for first, second in (("failed", "complete"), ("complete", "failed")):
        with Journal(tmp_path / f"{first}-a") as journal:
            journal.commit("key", rows[first])
        with Journal(tmp_path / f"{first}-b") as journal:
            journal.commit("key", rows[second])
        inputs = [str(tmp_path / f"{first}-{letter}") for letter in "ab"]
        assert main(["journal", "merge", *inputs, "--output", str(tmp_path / f"{first}-merged")]) == 0
        with Journal(tmp_path / f"{first}-merged") as journal:
            assert list(journal) == [rows["complete"]]


def test_without_ray_the_way_out_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert annotate("--output", "trees", "--executor", "ray") == 2
    assert "Ray cannot be imported" in (message := capsys.readouterr().err) and "mm-prm[ray]" in message


def test_rates_are_those_of_the_last_half_minute():
    rates = Rates()
    seen = [
        Progress(seconds=float(second), rollouts=100 * second, generated_tokens=5000 * second, labels=3 * second)
        for second in (0, 1, 2)
    ]
    assert rates.is_due(seen[0])
    rates.note(seen[0])
    assert not rates.is_due(Progress(seconds=0.05)) and rates.is_due(seen[1])
    rates.note(seen[1])
    note = rates.note(seen[2])
    assert "100 rollouts/s, 5,000 tokens/s, 3.0 labels/s" in note
    later = Progress(seconds=42.0, rollouts=1200, generated_tokens=20_000, labels=6, trees_in_flight=9, trees_failed=2)
    later.rollouts_at_policy, later.solutions_at_judge = 64, 7
    assert rates.note(later) == (
        "9 trees growing, 25 rollouts/s, 250 tokens/s, 0.0 labels/s, waiting for the policy: 64, for the judge: 7, 2 failed"
    )


def test_a_log_file_gets_lines_and_the_summary_ends_with_the_cost_of_a_label(capsys):
    assert annotate("--output", "trees.jsonl", "--output_json", "summary.json") == 0
    output = capsys.readouterr()
    assert "annotate: 7/7" in output.err and "labels/s" in output.err and "waiting for the policy: 0" in output.err
    assert "\r" not in output.err and "\x1b" not in output.err
    summary = json.loads(Path("summary.json").read_text())
    assert set(summary["cost_per_label"]) == {
        "rollouts", "prompt_tokens", "generated_tokens", "judge_calls", "seconds"
    }  # fmt: skip
    if summary["labels"]:
        assert f"each label cost {summary['cost_per_label']['rollouts']:.1f} rollouts" in output.out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["annotate", "--problems", "mini:annotation:2", "--output", "t", "--shard", "3/2"], "'3/2' has to be I/N"),
        (["annotate", "--problems", "mini:annotation:2", "--output", "t", "--shard", "2"], "'2' has to be I/N"),
        (["journal", "join"], "'join' is no action"),
        (["journal"], "use `mm-prm journal merge`"),
        (["journal", "merge", "none.sqlite", "--output", "out"], "journal 'none.sqlite': there is no such file"),
        (["journal", "merge", "--output", "out"], "inputs"),
    ],
)
def test_what_cannot_be_used_is_named(args, message, capsys):
    assert main(args) == 2
    assert message in capsys.readouterr().err
