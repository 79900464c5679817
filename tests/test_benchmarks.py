"""Every benchmark runs at a size that says nothing, and writes a table against its baseline."""

import importlib.util
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCORERS = ["batches of 4, all logits", "padded rows", "packed rows", "shared prefix"]
SCORING = (
    "--dtype float32 --num_layers 2 --hidden_size 256 --num_problems 1 --num_candidates 5 --image_height 2 "
    "--image_width 3 --question_tokens 20 --solution_tokens 40 --num_steps 4 --max_tokens 512"
)


@pytest.mark.parametrize(
    "name, arguments, variants",
    [
        (
            "annotation",
            "--engine transformers --num_problems 3 --num_rollouts 4 --rollout_budget 16 --max_new_tokens 64",
            [["one tree at a time", "annotate", "engine alone"]],
        ),
        (
            "forward",
            "--dtype float32 --num_layers 2 --hidden_size 32 --num_heads 2 --vocab_size 1000 --sequence_length 64",
            [["all logits, float32", "all logits", "logits_to_keep", "process reward model"]] * 2,
        ),
        (
            "rollouts",
            "--num_problems 2 --num_rollouts 2 --max_new_tokens 4",
            [["generate, all problems", "generate, one problem at a time", "TransformersPolicy"]],
        ),
        ("scoring", SCORING, [SCORERS]),
        (
            "training",
            "--dtype float32 --num_layers 1 --hidden_size 32 --vision_depth 8 --vision_size 16 --vocab_size 1100 --num_trees 1 "
            "--pairs 2 --image_height 8 --image_width 8 --question_tokens 10 --solution_tokens 20 --num_steps 4 --mini_rows 6",
            [["rows", "tree", "padded", "padded, all logits"]] * 3
            + [["rows", "tree", "padded", "padded, all logits", "token classification"]],
        ),
        ("search", "--num_searches 30 --num_exhaustive_searches 10", [["every pair", "heaps"], ["heaps"]]),
        ("vision", "--num_images 4", [["loop over images", "at once"]] * 3),
    ],
)
def test_benchmark_runs(name, arguments, variants, tmp_path, monkeypatch, capsys):
    script, output = BENCHMARKS / f"{name}.py", tmp_path / "table.json"
    monkeypatch.syspath_prepend(BENCHMARKS)
    command = f"{script} {arguments} --device cpu --threads 1 --repeats 2 --output_json {output}"
    monkeypatch.setattr(sys, "argv", command.split())
    runpy.run_path(str(script), run_name="__main__")
    tables = json.loads(output.read_text())["tables"]
    assert [list(table["variants"]) for table in tables] == variants
    printed = capsys.readouterr().out
    for table in tables:
        baseline = table["variants"][table["baseline"]]
        assert table["baseline"] == next(iter(table["variants"]))
        assert baseline["times_baseline"] == {"median": 1.0, "low": 1.0, "high": 1.0}
        for row in table["variants"].values():
            assert 0 < row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
            assert row[f"{table['unit']}_per_second"] == pytest.approx(table["amount"] / row["seconds"]["median"])
            assert f"{row['times_baseline']['median']:.2f} (" in printed
        assert table.get("largest_difference", 0) < 1e-5


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_scoring_without_vllm_measures_the_others(tmp_path, monkeypatch, capsys):
    script, output = BENCHMARKS / "scoring.py", tmp_path / "table.json"
    monkeypatch.syspath_prepend(BENCHMARKS)
    command = f"{script} {SCORING} --vllm --device cpu --threads 1 --repeats 1 --warmups 0 --output_json {output}"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit, match=r"failed: .*vLLM cannot be imported"):
        runpy.run_path(str(script), run_name="__main__")
    [table] = json.loads(output.read_text())["tables"]
    assert list(table["variants"]) == SCORERS and list(table["failed"]) == ["vLLM"]
    # Each turn is told when it ends, whatever comes later
    told = capsys.readouterr().err.splitlines()[-1]
    seconds = [f"{name} {row['seconds']['median']:.3f} s" for name, row in table["variants"].items()]
    assert told == f"turn: {', '.join(seconds)}"


def test_benchmark_of_two_gpus_trains_as_one_of_its_launches(tmp_path, monkeypatch):
    script, output = BENCHMARKS / "two_gpus.py", tmp_path / "rates.json"
    monkeypatch.syspath_prepend(BENCHMARKS)
    # As `accelerate launch` starts it
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    shape = "--dtype float32 --num_layers 1 --hidden_size 32 --vision_depth 8 --vision_size 16 --vocab_size 1100 --num_trees 1 "
    shape += "--pairs 2 --image_height 8 --image_width 8 --question_tokens 10 --solution_tokens 20 --num_steps 4"
    command = f"{script} {shape} --steps 4 --warmups 2 --workers 0 --output_json {output}"
    monkeypatch.setattr(sys, "argv", command.split())
    runpy.run_path(str(script), run_name="__main__")
    rates = json.loads(output.read_text())
    assert rates["num_processes"] == 1
    # 4 rows of 4 steps each
    assert rates["step_labels_per_second"] == pytest.approx(16 / rates["seconds_a_step"]["median"])


def test_benchmark_of_two_gpus_measures_the_others_if_a_launch_fails(tmp_path, monkeypatch, capsys):
    script, output = BENCHMARKS / "two_gpus.py", tmp_path / "rates.json"
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    written = []

    def launch(command, env):
        if output.exists():
            written.append(json.loads(output.read_text()))
        recipe = Path(command[command.index("--config_file") + 1]).stem
        if recipe == "fsdp2":
            return subprocess.CompletedProcess(command, 1)
        rates = {"step_labels_per_second": 10.0 if recipe == "one_gpu" else 19.0}
        rates["seconds_a_step"] = {"median": 1.0, "low": 0.9, "high": 1.1}
        Path(command[-1]).write_text(json.dumps(rates))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", launch)
    command = f"{script} --recipes one_gpu fsdp2 gpus --output_json {output}"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit, match=r"failed: \{'fsdp2': 'exit status 1'\}"):
        runpy.run_path(str(script), run_name="__main__")
    table = json.loads(output.read_text())
    assert list(table["launches"]) == ["one_gpu", "gpus"] and list(table["failed"]) == ["fsdp2"]
    assert table["launches"]["gpus"]["times_first"] == 1.9
    # What is finished is written before the next launch
    assert [list(earlier["launches"]) for earlier in written] == [["one_gpu"], ["one_gpu"]]
    assert "fsdp2: failed, exit status 1" in capsys.readouterr().out
