"""`mm-prm score`: killed and started again, it ends like a run that was not; each engine has its settings."""

import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest

from mm_prm.annotation.journal import Journal
from mm_prm.cli import main
from mm_prm.commands.score import ScoreSettings
from mm_prm.inference import Scorer

from ..testing_utils import tiny_image
from .pooling_server import PoolingServer

NUM_PROBLEMS = 80  # more than are scored together


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def args(tmp_path, tiny_prm_path):
    tiny_image(1).save("bars.png")
    rows = [
        {"id": f"q{n}", "question": f"What is {n} + 3?", "correct_answer": str(n + 3), "image_path": "bars.png"}
        for n in range(NUM_PROBLEMS)
    ]
    Path("problems.json").write_text(json.dumps(rows), encoding="utf-8")
    pools = [
        {
            "problem_id": f"q{n}",
            "candidates": [[f"{n} + 3 = {n + 3}", f"The answer is {n + 3}."], ["The answer is 1."], []],
        }
        for n in reversed(range(NUM_PROBLEMS))
    ]
    Path("pools.jsonl").write_text("\n".join(map(json.dumps, pools)), encoding="utf-8")
    return ["score", "--pools", "pools.jsonl", "--problems", "problems.json", "--model", tiny_prm_path]


@pytest.fixture
def scored(monkeypatch):
    """Ids of the problems whose candidates were computed."""
    ids = []
    score = Scorer.score

    def counting(self, problems, candidates, progress=None):
        ids.extend(problem["id"] for problem in problems)
        return score(self, problems, candidates, progress)

    monkeypatch.setattr(Scorer, "score", counting)
    return ids


def num_kept(path):
    if not path.exists():
        return 0
    try:
        with Journal(path, read_only=True) as journal:
            return len(journal)
    except RuntimeError:  # being made
        return 0


def test_killed_and_started_again_equals_uninterrupted(args, scored, capsys):
    assert main([*args, "--output", "whole.jsonl"]) == 0
    assert len(scored) == NUM_PROBLEMS
    scored.clear()

    journal = Path("cut.jsonl.journal.sqlite")
    process = subprocess.Popen([sys.executable, "-m", "mm_prm.cli", *args, "--output", "cut.jsonl"])
    while process.poll() is None and num_kept(journal) == 0:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = num_kept(journal)
    assert 0 < kept < NUM_PROBLEMS and not Path("cut.jsonl").exists()

    assert main([*args, "--output", "cut.jsonl"]) == 0
    assert Path("cut.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    # What was finished is not computed again, except that a batch of problems that was begun is made as a whole.
    assert len(scored) == NUM_PROBLEMS - kept // 32 * 32
    assert num_kept(journal) == NUM_PROBLEMS
    scored.clear()
    capsys.readouterr()
    assert main([*args, "--output", "again.jsonl", "--journal", str(journal)]) == 0
    assert re.fullmatch(rf"score: {NUM_PROBLEMS}/{NUM_PROBLEMS}, \d+ s\n", capsys.readouterr().err)
    assert Path("again.jsonl").read_bytes() == Path("whole.jsonl").read_bytes() and not scored


def test_what_changes_a_score_is_not_taken_from_the_journal(args, scored, tiny_prm_path, tmp_path):
    args = [*args, "--output", "scored.jsonl"]
    assert main(args) == 0
    assert main([*args, "--dtype", "bfloat16"]) == 0
    assert len(scored) == 2 * NUM_PROBLEMS
    lines = Path("pools.jsonl").read_text(encoding="utf-8").splitlines()
    changed = json.loads(lines[0]) | {"candidates": [["The answer is 2."]]}
    Path("pools.jsonl").write_text("\n".join([json.dumps(changed), *lines[1:33]]), encoding="utf-8")
    scored.clear()
    assert main(args) == 0
    assert len(scored) == 32  # the batch with the other candidates; the last problem is known
    tiny_image(2).save("bars.png")
    scored.clear()
    assert main(args) == 0
    assert len(scored) == 33


def test_an_interrupted_run_says_how_to_go_on(args, monkeypatch, capsys):
    def interrupted(self, *rest):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "score", interrupted)
        assert main([*args, "--output", "scored.jsonl"]) == 130
    assert "what is scored is in scored.jsonl.journal.sqlite" in capsys.readouterr().err
    assert main([*args, "--output", "scored.jsonl"]) == 0
    assert f"{NUM_PROBLEMS} problems, {3 * NUM_PROBLEMS} candidates" in capsys.readouterr().out


def test_a_server_gives_the_scores_of_transformers_and_resumes(args, tiny_prm_path, capsys):
    lines = Path("pools.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    Path("pools.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert main([*args, "--output", "local.jsonl"]) == 0
    served = PoolingServer(tiny_prm_path)
    flags = ["--engine", "server", "--base_url", served.url, "--output", "served.jsonl"]
    try:
        for _ in range(2):
            assert main([*args[:-2], *flags]) == 0
    finally:
        served.close()
    local, other = (
        [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]
        for name in ("local.jsonl", "served.jsonl")
    )
    for one, two in zip(local, other, strict=True):
        assert one | {"step_scores": None} == two | {"step_scores": None}
        for scores, expected in zip(one["step_scores"], two["step_scores"], strict=True):
            assert scores == pytest.approx(expected, abs=1e-5)
    assert sum(path == "/pooling" for path, _ in served.requests) == 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--engine", "server"], "base_url: is needed where engine is 'server'"),
        (["--engine", "vllm", "--device", "cpu"], "device: is a setting of engine 'transformers', not of 'vllm'"),
        (["--engine", "vllm", "--base_url", "http://x"], "base_url: is a setting of engine 'server', not of 'vllm'"),
        (["--base_url", "http://x", "--share_prefix", "false"], "share_prefix: is a setting of engine 'transformers'"),
        (["--max_model_len", "9"], "max_model_len: is a setting of engine 'vllm', not of 'transformers'"),
        (["--engine", "sglang"], "engine: 'sglang' is not one of"),
    ],
)
def test_settings_that_do_not_go_together(args, flags, message, capsys):
    assert main([*args, "--output", "scored.jsonl", *flags]) == 2
    assert message in capsys.readouterr().err


def test_vllm_is_opened_with_its_settings(args, monkeypatch):
    from mm_prm.inference import vllm

    opened = []
    monkeypatch.setattr(vllm, "VLLMScorer", lambda path, **settings: opened.append((path, settings)))
    settings = ScoreSettings(
        pools="p", problems="q", output="o", model="mini-prm", engine="vllm", dtype="float32", max_model_len=2048
    )
    settings.open_scorer()
    [(path, given)] = opened
    assert path.endswith("mini_prm")
    assert given == {"dtype": "float32", "max_model_len": 2048, "tensor_parallel_size": 1}


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_one_line_says_so(args, capsys):
    assert main([*args, "--output", "scored.jsonl", "--engine", "vllm"]) == 2
    assert "model: vLLM cannot be imported" in capsys.readouterr().err


def test_a_model_that_cannot_be_had_is_named_in_one_line(args, capsys):
    assert main([*args[:-1], "me/misspelt", "--output", "scored.jsonl"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("mm-prm score: model: me/misspelt: ")
