"""`mm-prm annotate --shard` and `mm-prm journal merge`: a job array makes the trees of a single run."""

import datasets
import pytest

from mm_prm.annotation import Journal
from mm_prm.cli import main
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
