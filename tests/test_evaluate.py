"""`mm-prm evaluate`: the embedded models on problems in a benchmark's columns, cut short and continued."""

import json
import re
from contextlib import closing
from pathlib import Path

import datasets
import pytest

from mm_prm.annotation import identity
from mm_prm.annotation.identity import checkpoint_digest
from mm_prm.annotation.journal import Journal
from mm_prm.annotation.protocols import Verdict
from mm_prm.cli import main
from mm_prm.data import mini, validate_rows
from mm_prm.embedded import model_path
from mm_prm.evaluation import ToleranceJudge, stages
from mm_prm.hub import eval_results_of
from mm_prm.judges import RulesJudge

from .chat_server import ChatServer
from .inference.pooling_server import PoolingServer

SHARED = Path(__file__).parents[2] / "shared" / "data"
NUM_PROBLEMS = 5


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(stages, "_PROBLEMS_AT_ONCE", 2)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def problems():
    """Problems of the mini world in the columns of MM-K12."""
    rows = [
        {"id": row["id"], "question": row["question"], "answer": row["answer"], "image": row["images"][0]}
        for row in mini.generate_problems("test", NUM_PROBLEMS, 3)
    ]
    dataset = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    dataset.to_parquet("problems.parquet")
    return dataset


ARGS = ["evaluate", "--benchmark", "mm-k12", "--benchmark_path", "problems.parquet", "--num_candidates", "4"]
ARGS += ["--policy_max_new_tokens", "128", "--policy_top_k", "0", "--policy_top_p", "1.0", "--num_resamples", "100"]


def read(folder):
    return datasets.Dataset.from_parquet(f"{folder}/pools.parquet").to_list(), json.loads(
        Path(folder, "results.json").read_text(encoding="utf-8")
    )


def test_interrupted_and_continued_equals_uninterrupted(problems, monkeypatch, capsys):
    assert main([*ARGS, "--output", "whole", "--output_json", "out.json"]) == 0
    printed = capsys.readouterr().out
    assert "5 problems, 4 candidates each at most" in printed and "weighted vote" in printed
    assert "the MM-PRM paper: MM-Policy: 33.9 %" in printed
    pools, results = read("whole")
    assert validate_rows("pool", pools) == NUM_PROBLEMS
    assert all(len(pool["candidates"]) == 4 for pool in pools)
    assert {score for pool in pools for scores in pool["step_scores"] for score in scores} != set()
    assert results == json.loads(Path("out.json").read_text(encoding="utf-8"))
    assert results["benchmark_path"] == "problems.parquet" and results["limit"] is None
    assert results["policy"] == "mini-policy"
    assert results["num_problems"] == results["num_benchmark_problems"] == NUM_PROBLEMS
    assert results["metrics"]["num_candidates"] == 4 and "majority" in results["metrics"]

    commit = Journal.commit
    calls = []

    def until(limit):
        def interrupted(self, key, row):
            if len(calls) == limit:
                raise KeyboardInterrupt
            calls.append(key)
            commit(self, key, row)

        return interrupted

    # First within a chunk of solutions, then within a chunk of scores, then to the end.
    for limit in (3, 8):
        monkeypatch.setattr(Journal, "commit", until(limit))
        assert main([*ARGS, "--output", "cut"]) == 130
    monkeypatch.setattr(Journal, "commit", until(1000))
    assert main([*ARGS, "--output", "cut"]) == 0
    assert read("cut") == (pools, results)
    # 3 solutions, then 5 more (the chunk that was cut, again); so the last run has scores to make only.
    assert len(calls) == 8 + 5 - 2

    calls.clear()
    capsys.readouterr()
    assert main([*ARGS, "--output", "cut"]) == 0
    assert calls == []
    assert re.fullmatch(r"solutions: 5/5, \d+ s\nscore: 5/5, \d+ s\n", capsys.readouterr().err)
    assert main([*ARGS, "--output", "cut", "--seed", "1", "--limit", "1"]) == 0
    assert len(calls) == 2 and read("cut")[0][0]["candidates"] != pools[0]["candidates"]


def test_candidates_of_a_file(problems, capsys):
    right = mini.problem("test", 3).solution("right")
    rows = [{"problem_id": problems[0]["id"], "candidates": [right, ["The answer is 977."], []], "note": "x"}]
    Path("candidates.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert main([*ARGS, "--candidates", "candidates.jsonl", "--output", "out"]) == 0
    pools, results = read("out")
    assert pools[0]["correct"][0] is True and pools[0]["correct"][1] is not True
    assert (results["num_problems"], results["num_benchmark_problems"]) == (1, NUM_PROBLEMS)
    assert pools[0]["step_scores"][2] == [] and results["candidates_without_steps"] == 1
    assert results["policy"] is None and results["metrics"]["oracle"]["value"] == 1.0

    Path("candidates.jsonl").write_text(json.dumps(rows[0] | {"problem_id": "other"}), encoding="utf-8")
    assert main([*ARGS, "--candidates", "candidates.jsonl", "--output", "out"]) == 2
    assert "candidates.jsonl: row 0: problem_id = 'other'" in capsys.readouterr().err


def test_a_server_scores_under_its_own_models_name(problems, tiny_prm_path, capsys):
    rows = [{"problem_id": problems[0]["id"], "candidates": [["The answer is 977."], ["The answer is 3."]]}]
    Path("candidates.jsonl").write_text(json.dumps(rows[0]), encoding="utf-8")
    args = [*ARGS, "--candidates", "candidates.jsonl", "--output", "out"]
    assert main(args) == 0
    embedded = read("out")[0][0]["step_scores"]
    assert read("out")[1]["model"] == "mini-prm"
    server = PoolingServer(tiny_prm_path)
    try:
        # In the journal of the same output, scores of mini-prm are no scores of the server's model.
        assert main([*args, "--base_url", server.url]) == 0
        pools, results = read("out")
        assert results["model"] == str(tiny_prm_path) and pools[0]["step_scores"] != embedded
        assert sum(path == "/pooling" for path, _ in server.requests) == 2
        capsys.readouterr()
        assert main([*args[:-1], "other", "--base_url", server.url, "--model", "mini-prm"]) == 2
        assert f"serves {str(tiny_prm_path)!r} (as 'prm'), not 'mini-prm'" in capsys.readouterr().err
    finally:
        server.close()


def test_a_language_model_judges_what_rules_leave_open_once(problems):
    candidates = [["Some red thing, or another."], ["The answer is 977."]]
    rows = [{"problem_id": problem["id"], "candidates": candidates} for problem in problems]
    Path("candidates.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with ChatServer(lambda payload: ["Yes" if "red" in str(payload["messages"]) else "No"]) as server:
        flags = [
            "--judge",
            "cascade",
            "--judge_model",
            "m",
            "--judge_base_urls",
            server.url,
            "--judge_max_retries",
            "0",
        ]
        asked = []
        for _ in range(2):
            assert main([*ARGS, *flags, "--candidates", "candidates.jsonl", "--output", "out"]) == 0
            asked.append(len(server.payloads))
            pools, results = read("out")
            assert [pool["correct"][0] for pool in pools] == [True] * NUM_PROBLEMS
            assert results["unknown_verdicts"] == 0
    assert asked[0] > 1 and asked[1] == asked[0] + 1  # the second run opens the server and asks it nothing


@pytest.mark.parametrize("gone", ["policy", "scores", "judge"])
def test_a_server_that_is_gone_is_told_in_one_line(problems, gone, capsys):
    candidates = [[f"The answer is {number}."] for number in range(3)]
    rows = [{"problem_id": problem["id"], "candidates": candidates} for problem in problems]
    Path("candidates.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    answering = ChatServer(lambda payload: ["Yes"], failures=(None,) * (gone == "judge") + ("500",) * 100)
    with answering as server, closing(PoolingServer(model_path("mini-prm"))) as scores:
        scores.replace["/pooling"] = (404, {}, b"{}")
        policy = ["--policy", "m", "--policy_engine", "server", "--policy_base_urls", server.url]
        judge = ["--judge", "llm", "--judge_model", "m", "--judge_base_urls", server.url, "--judge_max_retries", "0"]
        flags = {
            "policy": [*policy, "--policy_max_retries", "0"],
            "scores": ["--candidates", "candidates.jsonl", "--base_url", scores.url],
            "judge": ["--candidates", "candidates.jsonl", *judge],
        }
        assert main([*ARGS, *flags[gone], "--output", "out"]) == 2
    assert not Path("out/results.json").exists()
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("mm-prm evaluate: ") and ("status 404" if gone == "scores" else "status 500") in error


def test_steps_of_processbench(capsys):
    path = SHARED / "processbench"
    if not path.exists():
        pytest.skip(f"the sample of ProcessBench is not here: {path} is missing")
    args = ["evaluate", "--benchmark", "processbench", "--benchmark_path", str(path), "--limit", "2"]
    args += ["--output", "out", "--num_resamples", "50", "--threshold", "0.3"]
    assert main([*args, "--calibrate_on", "gsm8k"]) == 0
    assert "mean of subsets" in capsys.readouterr().out
    metrics = json.loads(Path("out/results.json").read_text(encoding="utf-8"))["metrics"]
    assert list(metrics["thresholds"]) == ["0.5", "fixed", "calibrated", "oracle"]
    assert set(metrics["thresholds"]["0.5"]["subsets"]) == {"math", "olympiadbench", "omnimath"}
    assert metrics["num_solutions"] == 6 and metrics["num_unscored"] == 0
    assert main([*args, "--calibrate_on", "gsm8"]) == 2
    error = capsys.readouterr().err
    assert "there are gsm8k, math, olympiadbench, omnimath" in error
    assert "score:" not in error  # told before anything is scored
    assert main([*args, "--candidates", "x.jsonl"]) == 2
    assert "processbench has its own solutions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--benchmark", "mathsight"], "use one of mm-k12, olympiadbench"),
        (["--benchmark_path", "nowhere.parquet"], "nowhere.parquet: there is no such file or folder"),
        (["--benchmark", "mathvista"], "column 'pid' is missing; there are id, question, answer, image"),
        (["--policy", "./nowhere"], "./nowhere: there is no such folder"),
        (["--policy_engine", "server"], "policy_base_urls: is needed where policy_engine is 'server'"),
        (["--judge", "cascade"], "judge_model: is needed where judge is 'cascade'"),
        (["--num_candidates", "0"], "num_candidates = 0: give a number above 0"),
    ],
)
def test_bad_input_is_told_in_one_line(problems, args, message, capsys):
    assert main([*ARGS, "--output", "out", *args]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_tolerance():
    judge = ToleranceJudge(RulesJudge(), RulesJudge(), {"near": 0.05})
    problem = {"id": "near", "answer": "1.2", "choices": []}

    def verdict(answer, **changes):
        return judge.judge(problem | changes, [f"The answer is {answer}."]).verdict

    assert [verdict("1.2"), verdict("1.249"), verdict("1.25"), verdict("1.26")] == ["right", "right", "right", "wrong"]
    assert verdict("1.249", id="other") == "wrong"
    assert judge.judge(problem, ["The answer is red."]) == RulesJudge().judge(problem, ["The answer is red."])
    assert isinstance(judge.judge(problem, ["The answer is 1.23."]), Verdict)


def test_models_that_cannot_be_had_are_named_and_engines_have_their_settings(problems, capsys):
    Path("candidates.jsonl").write_text(
        json.dumps({"problem_id": problems[0]["id"], "candidates": [["The answer is 3."]]}), encoding="utf-8"
    )
    for flags, message in (
        (["--policy", "me/misspelt"], "policy: me/misspelt: "),
        (["--candidates", "candidates.jsonl", "--model", "me/misspelt"], "model: me/misspelt: "),
        (["--engine", "vllm", "--device", "cpu"], "device: is a setting of engine 'transformers', not of 'vllm'"),
        (["--engine", "server"], "base_url: is needed where engine is 'server'"),
    ):
        assert main([*ARGS, "--output", "out", *flags]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("model", ["me/misspelt", "mini-policy", "not/there/at/all"])
def test_a_model_that_cannot_be_had_is_told_before_anything_is_sampled(problems, capsys, model):
    assert main([*ARGS, "--output", "out", "--model", model]) == 2
    assert f"model: {model}: " in capsys.readouterr().err.splitlines()[-1]
    assert not Path("out/journal.sqlite").exists()


def test_figures_say_which_checkpoint_was_measured(problems, tiny_prm_path, monkeypatch):
    rows = [{"problem_id": problems[0]["id"], "candidates": [["The answer is 977."], ["The answer is 3."]]}]
    Path("candidates.jsonl").write_text(json.dumps(rows[0]), encoding="utf-8")
    flags = ["--candidates", "candidates.jsonl", "--model", str(tiny_prm_path), "--output", "out"]
    read_folders = []

    def counted(path):
        read_folders.append(str(path))
        return checkpoint_digest(path)

    with monkeypatch.context() as patch:
        patch.setattr(identity, "checkpoint_digest", counted)
        assert main([*ARGS, *flags]) == 0
    assert read_folders == [str(tiny_prm_path)]  # gigabytes, for many a model
    pools = ["--pools", "out/pools.parquet", "--output_json", "best.json"]
    assert main(["best-of-n", *pools, "--model", str(tiny_prm_path), "--num_resamples", "10"]) == 0
    figures = json.loads(Path("best.json").read_text(encoding="utf-8"))
    digest = checkpoint_digest(tiny_prm_path)
    assert read("out")[1]["model_checkpoint"] == figures["model_checkpoint"] == digest
    for file in ("best.json", "out/results.json"):
        assert eval_results_of(file, dataset="me/pools", model=tiny_prm_path)
    with pytest.raises(ValueError, match="whose checkpoint is not that of"):
        eval_results_of("best.json", dataset="me/pools", model=model_path("mini-prm"))
