"""recipes/mini/grpo.py runs at a tiny size, and its table compares runs problem by problem."""

import json
import runpy
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "mini" / "grpo.py"


def _run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *arguments])
    runpy.run_path(str(RECIPE), run_name="__main__")


def test_a_run_and_its_table(tmp_path, monkeypatch, capsys):
    size = ["--steps", "1", "--completions", "8", "--problems", "2"]
    _run(monkeypatch, "--rewards", "both", "--output_dir", str(tmp_path / "both"), *size)
    run = json.loads((tmp_path / "both" / "grpo.json").read_text())
    assert {"rewards/process_reward_min/mean", "rewards/outcome_reward/mean"} <= set(run["log"][0])
    assert (tmp_path / "both" / "model.safetensors").is_file()
    for split in ("test", "test_ood"):
        assert {name: len(values) for name, values in run["held out"][split].items()} == {
            "pass@1": 2,
            "process reward": 2,
            "all steps right": 2,
            "steps": 2,
        }

    other = run | {"rewards": "none"}
    other["held out"] = run["held out"] | {"test": run["held out"]["test"] | {"pass@1": [0.0, 0.5]}}
    run["held out"]["test"]["pass@1"] = [0.25, 0.75]
    for name, results in (("none", other), ("both", run)):
        (tmp_path / f"{name}.json").write_text(json.dumps(results))
    capsys.readouterr()
    _run(monkeypatch, "--table", str(tmp_path / "none.json"), str(tmp_path / "both.json"))
    head, _, first, second = capsys.readouterr().out.splitlines()
    assert head.startswith("| rewards | aggregator | steps | seed | test: pass@1 | gain |")
    assert first.startswith("| none | min | 1 | 0 | 25 [0, 50] |  |")
    assert second.startswith(
        "| both | min | 1 | 0 | 50 [25, 75] | 25 [25, 25] |"
    )  # paired: the same gain on both problems


def test_a_run_needs_its_settings(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        _run(monkeypatch, "--rewards", "both")
    assert "--output_dir" in capsys.readouterr().err
