"""The command line: what it answers, what it writes, what it refuses and how it ends."""

import json
import os
import pty
import re
import runpy
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import yaml
from PIL import Image

from mm_prm import __version__
from mm_prm.annotation import AnnotationConfig, Generation, Journal, MCTSAnnotator, Rollout
from mm_prm.cli import COMMANDS, main
from mm_prm.commands.annotate import AnnotateSettings
from mm_prm.commands.files import read_table
from mm_prm.data import load_problems, validate_rows
from mm_prm.settings import parse_settings

REPOSITORY = Path(__file__).parents[1]
SHARED = REPOSITORY.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()  # as TQDM_DISABLE does where tqdm is not loaded yet
    yield
    datasets.enable_progress_bars()


def run_python(program, *args):
    command = [sys.executable, "-c", program, *args]
    return subprocess.run(command, capture_output=True, text=True)


# Help and version


LIGHT = """
import sys, time
from mm_prm.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
print(time.process_time(), *{name.split(".")[0] for name in sys.modules}, file=sys.stderr)
"""


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["annotate", "--help"], ["score", "--help"]])
def test_help_and_version_load_nothing_heavy(args):
    run = run_python(LIGHT, *args)
    assert run.returncode == 0, run.stderr
    seconds, *modules = run.stderr.split()
    assert not {"torch", "transformers", "datasets", "pyarrow", "matplotlib", "numpy"} & set(modules)
    assert float(seconds) < 1
    if args == ["--version"]:
        assert run.stdout == f"mm-prm {__version__}\n"
    elif args == ["--help"]:
        assert all(command in run.stdout for command in COMMANDS)
    else:
        assert "--config FILE" in run.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "required: COMMAND"),
        (["anotate"], "invalid choice: 'anotate' (choose from "),
    ],
)
def test_unknown_commands(args, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(args)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


# A policy that needs no model


class ScriptedPolicy:
    """Right and wrong answers in turn; fails for the problems named in `failing`."""

    def __init__(self):
        self.failing = set()
        self.interrupted_at = set()
        self.settings = []

    def open(self, path, **settings):
        self.settings.append((path, settings))
        return self

    def generate(self, requests):
        return [self._generation(problem, request) for problem, request in requests]

    def _generation(self, problem, request):
        if problem["id"] in self.interrupted_at:
            raise KeyboardInterrupt
        if problem["id"] in self.failing:
            raise RuntimeError("out of luck")
        thought = ("First we look.", "Then we count.")[len(request.prefix) :]
        answers = [problem["answer"], "977"]
        steps = [(*thought, f"The answer is {answers[number % 2]}.") for number in range(request.num_rollouts)]
        return Generation([Rollout(rollout, "finished", 7) for rollout in steps], prompt_tokens=5)


@pytest.fixture
def policy(monkeypatch):
    from mm_prm.policies.transformers import TransformersPolicy

    scripted = ScriptedPolicy()
    monkeypatch.setattr(TransformersPolicy, "from_pretrained", scripted.open)
    return scripted


@pytest.fixture
def problems_file(tmp_path):
    """Three problems with a picture each, in a folder of their own."""
    folder = tmp_path / "problems"
    folder.mkdir()
    Image.new("RGB", (40, 30), "red").save(folder / "red.png")
    rows = [
        {"id": f"q{number}", "question": f"What is {number} + 1?", "answer": str(number + 1), "image_path": "red.png"}
        for number in range(3)
    ]
    return write_problems(folder, rows)


def write_problems(folder, rows):
    path = folder / "problems.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def annotate(*flags, rollouts=4):
    return main(["annotate", "--num_rollouts", str(rollouts), "--rollout_budget", "12", *map(str, flags)])


def test_annotate_with_settings_from_a_file_and_flags_over_it(policy, problems_file, tmp_path, capsys):
    config = tmp_path / "annotate.yaml"
    config.write_text(
        yaml.safe_dump(
            {"problems": str(problems_file), "output": "trees", "num_rollouts": 2, "limit": 1, "policy_top_k": 0}
        )
    )
    assert (
        annotate("--config", config, "--limit", 2, "--policy", "some/policy", "--output_json", "out/summary.json") == 0
    )
    [(path, settings)] = policy.settings
    assert path == "some/policy"
    assert (settings["top_k"], settings["temperature"], settings["max_new_tokens"]) == (0, 1.0, 256)

    trees = datasets.load_from_disk("trees")
    assert validate_rows("tree", trees) == 2
    summary = json.loads(Path("out/summary.json").read_text())
    assert summary["trees"] == {"complete": 2, "failed": 0, "skipped": 0, "from_journal": 0}
    assert summary["problems"] == 2
    assert summary["rollouts"]["total"] == sum(tree["cost"]["rollouts"] for tree in trees) > 8
    assert summary["rollouts"]["right"] == summary["rollouts"]["wrong"] == summary["rollouts"]["total"] / 2
    assert summary["generated_tokens"] == 7 * summary["rollouts"]["total"]
    assert summary["labels"] == sum(node["num_judged"] > 0 for tree in trees for node in tree["nodes"][1:]) > 0
    assert summary["cost_per_label"]["rollouts"] == pytest.approx(
        summary["rollouts"]["total"] / summary["labels"], abs=1e-3
    )
    output = capsys.readouterr()
    assert "2 problems: 2 trees complete (0 from the journal), 0 failed, 0 skipped" in output.out
    assert "annotate: 2/2" in output.err


def test_the_settings_beside_the_output_repeat_the_run_from_the_journal(policy, problems_file, capsys):
    assert annotate("--problems", problems_file, "--output", "out/trees.jsonl", "--policy_temperature", 0.5) == 0
    first = Path("out/trees.jsonl").read_bytes()
    assert main(["annotate", "--config", "out/trees.jsonl.settings.yaml", "--output_json", "summary.json"]) == 0
    assert Path("out/trees.jsonl").read_bytes() == first
    assert len(policy.settings) == 1  # not opened again
    summary = json.loads(Path("summary.json").read_text())
    assert summary["trees"]["from_journal"] == 3
    assert summary["this_run"]["rollouts"] == 0 < summary["rollouts"]["total"]
    with Journal("out/trees.jsonl.journal.sqlite", read_only=True) as journal:
        assert len(journal) == 3


def test_trees_come_in_the_order_of_the_problems_in_every_kind_of_file(policy, problems_file):
    for output in ("trees", "trees.parquet", "trees.jsonl"):
        # One tree at a time, and a journal that knows the last problem only
        assert annotate("--problems", problems_file, "--output", output, "--journal", f"{output}.db") == 0
    folder = datasets.load_from_disk("trees")
    assert folder["problem_id"][:] == ["q0", "q1", "q2"]
    from_parquet = datasets.Dataset.from_parquet("trees.parquet")
    lines = [json.loads(line) for line in Path("trees.jsonl").read_text(encoding="utf-8").splitlines()]
    assert without_seconds(folder) == without_seconds(from_parquet) == without_seconds(lines)
    assert annotate("--problems", problems_file, "--output", "trees", "--limit", 1) == 0
    assert datasets.load_from_disk("trees")["problem_id"][:] == ["q0"]


def without_seconds(trees):
    return [{**tree, "cost": {**tree["cost"], "seconds": 0}} for tree in trees]


def test_map_takes_what_the_command_line_has_annotated_from_the_journal(policy, problems_file):
    assert annotate("--problems", problems_file, "--output", "trees") == 0
    settings = parse_settings(AnnotateSettings, ["--problems", "unused", "--output", "unused"])
    annotator = MCTSAnnotator(
        "mini-policy",
        AnnotationConfig(num_rollouts=4, rollout_budget=12),
        "trees.journal.sqlite",
        settings.policy_settings(),
        {"timeout_seconds": settings.judge_timeout_seconds},
    )
    problems, _ = load_problems(problems_file)
    trees = problems.map(annotator, batched=True, remove_columns=problems.column_names, features=annotator.features)
    assert trees.to_list() == datasets.load_from_disk("trees").to_list()
    assert len(policy.settings) == 1  # not opened again


def test_problems_that_fail_are_listed_and_the_exit_status_says_so(policy, problems_file, capsys):
    policy.failing = {"q1"}
    assert annotate("--problems", problems_file, "--output", "trees", "--output_json", "summary.json") == 1
    summary = json.loads(Path("summary.json").read_text())
    assert summary["trees"] == {"complete": 2, "failed": 1, "skipped": 0, "from_journal": 0}
    [entry] = summary["not_complete"]
    assert (entry["id"], entry["status"]) == ("q1", "failed")
    assert "out of luck" in entry["reason"]
    assert "failed: q1: policy: RuntimeError: out of luck" in capsys.readouterr().out
    assert datasets.load_from_disk("trees")["status"][:] == ["complete", "failed", "complete"]

    policy.failing = set()
    assert annotate("--problems", problems_file, "--output", "trees") == 0
    assert "3 trees complete (2 from the journal)" in capsys.readouterr().out


def test_interrupted_runs_say_how_to_go_on(policy, problems_file, capsys):
    policy.interrupted_at = {"q2"}
    flags = ("--problems", problems_file, "--output", "trees", "--trees_in_flight", 1)
    assert annotate(*flags) == 130
    # How many are finished by then depends on the judge: while a tree waits for it, another one begins.
    interrupted = re.search(r"interrupted; (\d) trees are in trees.journal.sqlite", capsys.readouterr().err)
    assert interrupted is not None and int(interrupted[1]) < 3
    assert not Path("trees").exists()
    policy.interrupted_at = set()
    assert annotate(*flags) == 0
    out = capsys.readouterr().out
    assert "3 trees complete" in out
    if interrupted[1] != "0":
        assert f"({interrupted[1]} from the journal)" in out


def huge_image(folder):
    with (folder / "huge.png").open("wb") as file:
        file.write((folder / "red.png").read_bytes())
        file.truncate(100 * 1024 * 1024)  # takes no room on the disk
    return {"image_path": "huge.png"}


def no_image(folder):
    (folder / "text.png").write_text("no picture")
    return {"image_path": "text.png"}


def outside(folder):
    Image.new("RGB", (4, 4)).save(folder.parent / "outside.png")
    return {"image_path": "../outside.png"}


BAD_ROWS = {
    "missing image": (lambda folder: {"image_path": "gone.png"}, "'gone.png'"),
    "no image": (no_image, "'text.png'"),
    "outside the folder": (outside, "'../outside.png'"),
    "100 MB": (huge_image, "'huge.png'"),
    "duplicate id": (lambda folder: {"id": "q0"}, "id = 'q0'"),
    "empty answer": (lambda folder: {"answer": " "}, "answer = ''"),
}


@pytest.mark.parametrize(("change", "named"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_are_refused_or_skipped(change, named, policy, problems_file, capsys):
    rows = json.loads(problems_file.read_text())
    rows[1] |= change(problems_file.parent)
    write_problems(problems_file.parent, rows)

    assert annotate("--problems", problems_file, "--output", "trees") == 2
    error = capsys.readouterr().err
    assert error.startswith("mm-prm annotate: ")
    assert error.count("\n") == 1
    assert "problems.json" in error
    assert rows[1]["id"] in error
    assert named in error
    assert not policy.settings
    assert not Path("trees").exists()

    assert annotate("--problems", problems_file, "--output", "trees", "--on_bad_row", "skip") == 0
    output = capsys.readouterr().out
    assert "3 problems: 2 trees complete (0 from the journal), 0 failed, 1 skipped" in output
    [line] = [line for line in output.splitlines() if line.startswith(f"skipped: {rows[1]['id']}: ")]
    assert named in line
    assert datasets.load_from_disk("trees")["problem_id"][:] == ["q0", "q2"]


@pytest.mark.parametrize("on_bad_row", ["raise", "skip"])
def test_a_broken_file_is_refused_in_any_case(on_bad_row, policy, problems_file, capsys):
    problems_file.write_text('[{"id": "q0",\n "question" "What?"}]')
    assert annotate("--problems", problems_file, "--output", "trees", "--on_bad_row", on_bad_row) == 2
    assert "problems.json, line 2, column 13: broken JSON" in capsys.readouterr().err


def test_nothing_but_bad_rows(policy, problems_file, capsys):
    rows = [{**row, "answer": ""} for row in json.loads(problems_file.read_text())]
    write_problems(problems_file.parent, rows)
    assert annotate("--problems", problems_file, "--output", "trees", "--on_bad_row", "skip") == 0
    assert "3 problems: 0 trees complete (0 from the journal), 0 failed, 3 skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--strategy", "omegaprn"], "command line: strategy: 'omegaprn' is not one of 'omegaprm', 'flat'"),
        (["--num_rollouts", "0"], "num_rollouts = 0"),
        (["--temperature", "1"], "temperature: there is no such setting; did you mean 'policy_temperature'?"),
        (["--config", "gone.yaml"], "gone.yaml: cannot be read"),
        (["--policy", "./gone"], "policy: ./gone: there is no such folder"),
        (["--policy", "no-such-model"], "policy: no-such-model"),
        (["--policy_top_p", "2"], "policy: top_p: 2.0 has to be above 0"),
        (["--problems", "gone.json"], "gone.json: there is no such file or folder"),
        (["--problems", "mini:nowhere:3"], "mini:nowhere:3: no problem 0 in split 'nowhere'"),
        (["--output", "trees.json"], "output: trees.json: rows are written to .parquet and .jsonl files"),
        (["--output", "problems"], "output: the folder problems holds something else than rows"),
        (["--journal", "problems/red.png"], "journal 'problems/red.png': the file is damaged or not a journal"),
    ],
)
def test_settings_that_cannot_be_used(flags, message, problems_file, capsys):
    args = ["--problems", problems_file, "--output", "trees", "--policy", "mini-policy", *flags]
    assert annotate(*args) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_run_that_cannot_begin_leaves_the_output_of_another_and_its_settings(policy, problems_file, capsys):
    assert annotate("--problems", problems_file, "--output", "trees") == 0
    settings = Path("trees.settings.yaml").read_text()
    assert annotate("--problems", "gone.json", "--output", "trees") == 2
    assert Path("trees.settings.yaml").read_text() == settings
    load_problems(problems_file)[0].save_to_disk("saved")
    assert annotate("--problems", "saved", "--output", "./saved/") == 2
    assert "mm-prm annotate: output: saved is the input, too" in capsys.readouterr().err
    assert "question" in datasets.load_from_disk("saved").column_names


def test_a_journal_in_the_home_folder(policy, problems_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert annotate("--problems", problems_file, "--output", "trees", "--journal", "~/journals/trees.sqlite") == 0
    with Journal(tmp_path / "home" / "journals" / "trees.sqlite", read_only=True) as journal:
        assert len(journal) == 3
    assert not Path("~").exists()


def test_a_journal_has_one_writer(policy, problems_file, capsys):
    with Journal("trees.journal.sqlite"):
        assert annotate("--problems", problems_file, "--output", "trees") == 2
    assert "another process is writing to it" in capsys.readouterr().err


def test_mistakes_of_ours_keep_their_traceback(policy, problems_file, monkeypatch):
    def broken(*args, **kwargs):
        raise KeyError("ours")

    monkeypatch.setattr("mm_prm.data.problems.load_problems", broken)
    with pytest.raises(KeyError, match="ours"):
        annotate("--problems", problems_file, "--output", "trees")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of shared data is missing")
def test_all_real_problems_become_trees(policy, capsys):
    problems = SHARED / "mm_k12_sample" / "problems.json"
    assert annotate("--problems", problems, "--output", "trees.parquet", rollouts=2) == 0
    assert "120 problems: 120 trees complete (0 from the journal), 0 failed, 0 skipped" in capsys.readouterr().out


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of shared data is missing")
def test_the_embedded_policy_on_real_problems(capsys):
    problems = SHARED / "mm_k12_sample" / "problems.json"
    flags = ("--problems", problems, "--output", "trees", "--limit", 3, "--policy_max_new_tokens", 24)
    assert annotate(*flags, rollouts=2) == 0
    assert "3 problems: 3 trees complete" in capsys.readouterr().out


# Rows


@pytest.fixture
def trees(policy, problems_file):
    assert annotate("--problems", problems_file, "--output", "trees") == 0
    return problems_file


def test_rows_of_a_folder_a_file_and_a_journal(trees, capsys):
    assert (
        main(["rows", "--trees", "trees", "--problems", str(trees), "--output", "rows", "--output_json", "n.json"])
        == 0
    )
    rows = datasets.load_from_disk("rows")
    counts = json.loads(Path("n.json").read_text())
    assert validate_rows("stepwise", rows) == counts["rows"] == counts["rows_right"] + counts["rows_wrong"] > 0
    assert rows["prompt"][0].endswith("What is 0 + 1?")
    assert f"{counts['rows']} rows" in capsys.readouterr().out
    assert yaml.safe_load(Path("rows.settings.yaml").read_text())["max_rows_per_tree"] == 16

    assert main(["rows", "--trees", "trees.journal.sqlite", "--output", "rows.parquet"]) == 0
    from_journal = datasets.Dataset.from_parquet("rows.parquet")
    assert from_journal["completions"][:] == rows["completions"][:]
    assert set(from_journal["prompt"]) == {""}


@pytest.mark.parametrize("command", ["rows", "judge-steps"])
def test_trees_are_not_overwritten_by_what_is_made_of_them(command, trees, capsys):
    model = ["--model", "judge", "--base_url", "http://127.0.0.1:9/v1"] if command == "judge-steps" else []
    assert main([command, "--trees", "trees", "--problems", str(trees), "--output", "trees", *model]) == 2
    assert f"mm-prm {command}: output: trees is the input, too" in capsys.readouterr().err
    assert validate_rows("tree", datasets.load_from_disk("trees")) == 3


def test_trees_of_bad_problems_are_left_out_on_request(trees, capsys):
    bad = json.loads(trees.read_text())
    bad[1]["answer"] = ""
    write_problems(trees.parent, bad)
    command = ["rows", "--trees", "trees", "--problems", str(trees), "--output", "rows", "--output_json", "n.json"]
    assert main(command) == 2
    assert "answer = ''" in capsys.readouterr().err
    assert main([*command, "--on_bad_row", "skip"]) == 0
    assert json.loads(Path("n.json").read_text())["bad_problems"] == 1
    assert bad[1]["id"] not in datasets.load_from_disk("rows")["problem_id"][:]
    assert "1 bad problems are left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PAR1 no", "broken parquet file"),
        (None, "there is no such file or folder"),
    ],
)
def test_trees_that_cannot_be_read(content, message, capsys):
    if content is not None:
        Path("trees.parquet").write_bytes(content)
    assert main(["rows", "--trees", "trees.parquet", "--output", "rows"]) == 2
    assert f"trees.parquet: {message}" in capsys.readouterr().err


def test_rows_name_the_bad_tree(trees, capsys):
    lines = [{**tree, "status": "done"} for tree in datasets.load_from_disk("trees")]
    Path("bad.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main(["rows", "--trees", "bad.jsonl", "--output", "rows"]) == 2
    assert "mm-prm rows: bad.jsonl: tree 'q0': status = 'done'" in capsys.readouterr().err
    Path("bad.jsonl").write_text('{"problem_id": "q0"}\n{"problem_id"')
    assert main(["rows", "--trees", "bad.jsonl", "--output", "rows"]) == 2
    assert "bad.jsonl, line 2: broken JSON" in capsys.readouterr().err


def test_a_journal_of_several_settings_is_refused(trees, capsys):
    assert annotate("--problems", trees, "--output", "trees", "--seed", 1) == 0
    assert main(["rows", "--trees", "trees.journal.sqlite", "--output", "rows"]) == 2
    assert "holds several trees of problem 'q0'" in capsys.readouterr().err


# Training, scores and Best-of-N, on the embedded policy


@pytest.fixture
def rows(trees):
    assert main(["rows", "--trees", "trees", "--output", "rows"]) == 0
    return str(trees)


def test_train_score_and_choose(rows, tiny_vlm_path, capsys, monkeypatch):
    Path("train.yaml").write_text(
        yaml.safe_dump(
            {
                "model": tiny_vlm_path,
                "rows": "rows",
                "problems": rows,
                "output_dir": "prm",
                "learning_rate": "1e-3",
                "max_steps": 9,
                "per_device_train_batch_size": 2,
                "logging_steps": 1,
            }
        )
    )
    # As `accelerate launch -m mm_prm.train` starts it
    monkeypatch.setattr(
        sys,
        "argv",
        ["trainer", "--config", "train.yaml", "--max_steps", "3", "--eval_rows", "rows", "--output_json", "m.json"],
    )
    with pytest.raises(SystemExit) as end:
        runpy.run_module("mm_prm.train", run_name="__main__")
    assert end.value.code == 0
    output = capsys.readouterr()
    assert "train: 3/3, loss " in output.err
    assert "model: prm" in output.out
    metrics = json.loads(Path("m.json").read_text())
    assert metrics["train_loss"] > 0
    assert metrics["eval_loss"] > 0
    settings = yaml.safe_load(Path("prm/settings.yaml").read_text())
    assert (settings["max_steps"], settings["learning_rate"], settings["rows"]) == (3, 1e-3, "rows")
    assert json.loads(Path("prm/config.json").read_text())["reward_token_ids"]

    # A checkpoint goes on
    assert (
        main(["train", "--config", "prm/settings.yaml", "--resume_from_checkpoint", "last", "--max_steps", "4"]) == 0
    )
    assert json.loads(Path("prm/trainer_state.json").read_text())["global_step"] == 4

    candidates = [
        {
            "problem_id": f"q{number}",
            "candidates": [["Look.", f"The answer is {number + 1}."], ["The answer is 9."], []],
        }
        for number in (2, 0)
    ]
    Path("candidates.jsonl").write_text("\n".join(map(json.dumps, candidates)))
    score = ["score", "--pools", "candidates.jsonl", "--problems", rows, "--model", "prm", "--output", "pools"]
    assert main(score) == 0
    assert "2 problems, 6 candidates, 6 steps scored" in capsys.readouterr().out
    pools = datasets.load_from_disk("pools")
    assert validate_rows("pool", pools) == 2
    assert pools["problem_id"][:] == ["q2", "q0"]
    assert pools["correct"][0] == [True, False, False]
    assert pools["answers"][0] == ["3", "9", ""]
    assert [len(scores) for scores in pools["step_scores"][0]] == [2, 1, 0]

    assert main(["best-of-n", "--pools", "pools", "--num_resamples", "50", "--output_json", "b.json"]) == 0
    output = capsys.readouterr().out
    assert "minus majority vote" in output
    assert "Best-of-N, mean_odds" in output
    results = json.loads(Path("b.json").read_text())
    assert results["pass@1"]["value"] == pytest.approx(1 / 3)

    # What the pools say of their answers is kept; scoring in place is possible
    changed = [{**pool, "correct": [None, True, False]} for pool in pools]
    Path("pools.jsonl").write_text("\n".join(map(json.dumps, changed)))
    assert main([*score, "--pools", "pools.jsonl", "--output", "pools.jsonl"]) == 0
    again = [json.loads(line) for line in Path("pools.jsonl").read_text().splitlines()]
    assert again[0]["correct"] == [None, True, False]
    assert again[0]["step_scores"] == pools["step_scores"][0]


def test_training_names_bad_rows_and_says_that_it_sees_no_pictures(rows, tiny_vlm_path, capsys):
    lines = [{**row, "prompt": "What is 0 + 1?"} for row in datasets.load_from_disk("rows")]
    lines[1]["labels"] = [2.0] * len(lines[1]["labels"])
    Path("bad.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main(["train", "--model", tiny_vlm_path, "--rows", "bad.jsonl", "--output_dir", "prm"]) == 2
    error = capsys.readouterr().err
    assert "train: bad.jsonl has no images and `problems` is not given" in error
    assert "mm-prm train: training row 1 ('q0'): labels[0] = 2.0: must be in [0, 1]" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "./gone"], "model: ./gone: there is no such folder"),
        (["--rows", "gone.parquet"], "gone.parquet: there is no such file or folder"),
        (
            ["--label_mode", "softt"],
            "label_mode: 'softt' is not one of 'soft', 'hard', 'smoothed'; did you mean 'soft'?",
        ),
        (["--eval_strategy", "epoch"], "eval_strategy: epoch needs eval_rows"),
        (["--problems", "mini:test:1"], "3 problems of the rows are not in the problem table: 'q0', 'q1', 'q2'"),
        (["--max_length", "3"], "none of the "),
        (["--model", "no-such-model"], "mm-prm train: no-such-model: "),
    ],
)
def test_training_that_cannot_begin(flags, message, rows, tiny_vlm_path, capsys):
    args = ["--model", tiny_vlm_path, "--rows", "rows", "--problems", rows, "--output_dir", "prm"]
    assert main(["train", *args, *flags]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("mm-prm train: ")
    assert message in error


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        ({"problem_id": "q9", "candidates": [["A."]]}, "pool 'q9': problem_id: there is no problem with this id"),
        ({"problem_id": "q0", "candidates": ["A."]}, "pool 'q0': candidates[0] = 'A.': must be a list"),
        ({"problem_id": "q0"}, "pool 'q0': candidates = None: the field is missing"),
        ({"problem_id": "q0", "candidates": [["A."]], "correct": []}, "pool 'q0': correct = []: has 0 entries"),
        (["A."], "pool row 0: row = ['A.']: must be a mapping"),
    ],
)
def test_bad_candidates_are_named(pool, message, problems_file, capsys):
    Path("pools.json").write_text(json.dumps([pool]))
    args = ["--pools", "pools.json", "--problems", str(problems_file), "--output", "scored"]
    assert main(["score", *args]) == 2
    assert f"mm-prm score: pools.json: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_numbers_as_ids_in_every_file(kind, problems_file):
    problems = json.loads(problems_file.read_text())
    write_problems(problems_file.parent, [{**problem, "id": number} for number, problem in enumerate(problems)])
    pools = datasets.Dataset.from_list([{"problem_id": number, "candidates": [["A."]]} for number in range(3)])
    name = "pools" if kind == "folder" else f"pools.{kind}"
    save = {"jsonl": pools.to_json, "parquet": pools.to_parquet, "folder": pools.save_to_disk}[kind]
    save(name)
    rows = read_table(name)
    assert [row["problem_id"] for row in rows] == load_problems(problems_file)[0]["id"][:] == ["0", "1", "2"]
    assert [row["candidates"] for row in rows] == [[["A."]]] * 3


# Best-of-N


ANCESTOR_ROWS = [
    {"id": 1, "labels": [1, 0], "prm_scores": [[0.9, 0.8], [0.9, 0.1]]},
    {"id": 2, "labels": [0, 1], "prm_scores": [[0.2], [0.7]], "solutions_splits": [["a"], ["b"]]},
]


@pytest.mark.parametrize("content", [ANCESTOR_ROWS, {"pools": ANCESTOR_ROWS, "results": {}}])
def test_result_files_of_the_ancestor(content, capsys):
    Path("results.json").write_text(json.dumps(content))
    assert main(["best-of-n", "--pools", "results.json", "--output_json", "b.json"]) == 0
    results = json.loads(Path("b.json").read_text())
    assert (results["pass@1"]["value"], results["best_of_n"]["min"]["value"], results["num_problems"]) == (0.5, 1.0, 2)
    output = capsys.readouterr().out
    assert "majority" not in output  # there are no answers to vote for
    assert any(line.split()[:4] == ["mean", "pass@1", "50.0", "%"] for line in output.splitlines())
    assert any(line.split() == ["Best-of-N,", "last", "50.0", "100.0"] for line in output.splitlines())


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of shared data is missing")
def test_recorded_pools_of_the_ancestor():
    pools = SHARED / "ancestor_reference" / "best_of_n.json"
    assert main(["best-of-n", "--pools", str(pools), "--output_json", "b.json", "--num_resamples", "20"]) == 0
    expected = json.loads(pools.read_text())["results"]
    results = json.loads(Path("b.json").read_text())
    assert results["num_problems"] == 60
    assert results["oracle"]["value"] == expected["pass@16"]["accuracy"]
    assert results["best_of_n"]["min"]["value"] == pytest.approx(expected["min"]["accuracy"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rows": []}, "must be a list of rows"),
        ([{"prm_scores": []}], "row 0: correct: must be a list that says of each candidate if it is right"),
        ([{"labels": [1, 0], "prm_scores": [[0.5]]}], "`step_scores` has 1 entries for 2 candidates"),
        ([], "there are no rows"),
        ([{"labels": []}], "row 0: correct: there are no candidates"),
        ([{"correct": [None, None]}], "correct: no candidate has a verdict"),
        (
            [{"problem_id": "q", "correct": [True]}, {"problem_id": "q", "correct": [False]}],
            "row 1: problem_id: 'q' is already that of row 0",
        ),
    ],
)
def test_bad_pools_are_named(content, message, capsys):
    Path("pools.json").write_text(json.dumps(content))
    assert main(["best-of-n", "--pools", "pools.json"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mm-prm best-of-n: pools.json: ")
    assert message in error


@pytest.mark.parametrize("name", ["pools.json", "pools.jsonl"])
def test_files_as_windows_writes_them(name):
    lines = [json.dumps(row) for row in ANCESTOR_ROWS]
    text = "\r\n".join(lines) + "\r\n" if name == "pools.jsonl" else "[" + ",\r\n".join(lines) + "]"
    Path(name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert main(["best-of-n", "--pools", name, "--output_json", "b.json", "--num_resamples", "20"]) == 0
    assert json.loads(Path("b.json").read_text())["num_problems"] == 2


def test_json_lines_under_another_name(capsys):
    Path("pools.json").write_text("\n".join(map(json.dumps, ANCESTOR_ROWS)))
    assert main(["best-of-n", "--pools", "pools.json"]) == 2
    assert (
        "broken JSON, line 2, column 1: Extra data; JSON lines are read from .jsonl files" in capsys.readouterr().err
    )


def test_a_summary_that_cannot_be_written_is_named(capsys):
    Path("pools.json").write_text(json.dumps(ANCESTOR_ROWS))
    Path("results").mkdir()
    assert main(["best-of-n", "--pools", "pools.json", "--output_json", "results", "--num_resamples", "20"]) == 2
    assert "mm-prm best-of-n: output_json: " in (error := capsys.readouterr().err)
    assert "'results'" in error


def test_candidates_without_a_verdict_are_counted(capsys):
    Path("pools.json").write_text(json.dumps([{"correct": [True, None, None]}, {"correct": [False]}]))
    assert main(["best-of-n", "--pools", "pools.json", "--num_resamples", "20"]) == 0
    assert "2 of 4 candidates have no verdict and count as not right" in capsys.readouterr().out


# Progress


PROGRESS = """
import time
from mm_prm.commands.progress import ProgressBar
with ProgressBar("count", 4) as bar:
    for done in range(5):
        time.sleep(0.1)
        bar.update(done, note=f"{done} apples")
"""


def test_a_bar_with_the_time_left_on_a_terminal():
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    subprocess.run([sys.executable, "-c", PROGRESS], stderr=follower, env=environment, check=True)
    os.close(follower)
    shown = os.read(leader, 100_000).decode()
    os.close(leader)
    assert "4/4" in shown
    assert "left, 2 apples" in shown
    assert "\x1b[" in shown


RESUMED = """
import time
from mm_prm.commands import progress
progress._SECONDS_PER_LINE = 0.0
with progress.ProgressBar("count", 100) as bar:
    time.sleep(1.0)
    bar.update(49, free=49)
    bar.update(50, free=50)
    bar.update(50, free=50, underway=20)
    time.sleep(0.5)
    bar.update(60, free=50, underway=20)
"""


def test_the_time_left_counts_what_this_run_did_alone():
    *begun, last = run_python(RESUMED).stderr.splitlines()
    assert [re.sub(r"\d+ s", "1 s", line) for line in begun] == ["count: 49/100, 1 s", *["count: 50/100, 1 s"] * 2]
    # 10 done and 20 half done in half a second, so 30 halves of a second are to do for the other 30 things.
    [seconds] = re.findall(r"count: 60/100, \d+ s, 0:00:(\d\d) left", last)
    assert 0 < int(seconds) < 3


def test_lines_without_a_terminal():
    [line] = run_python(PROGRESS).stderr.splitlines()
    assert re.fullmatch(r"count: 4/4, \d+ s, 0:00:00 left, 4 apples", line)
