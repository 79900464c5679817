"""`mm-prm report` reads what the other commands wrote."""

import json
import os
from pathlib import Path

import datasets
import pytest

from mm_prm.cli import main
from mm_prm.data.features import FEATURES
from mm_prm.report import render_report

from ..testing_utils import tiny_problem
from .test_report import Page, pool_rows, tree_row

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def problems_file(path="problems.parquet", count=4) -> str:
    rows = [tiny_problem(number) for number in range(count)]
    datasets.Dataset.from_list(rows, features=FEATURES["problem"]).to_parquet(path)
    return path


def write_lines(path, rows):
    Path(path).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def report(*args, status=0) -> Page | None:
    assert main(["report", *args]) == status
    return Page(Path(args[0], "report.html").read_text(encoding="utf-8")) if status == 0 else None


def test_a_folder_of_tables(capsys):
    os.mkdir("run")
    problems_file("run/problems.parquet")
    write_lines("run/pools.jsonl", pool_rows())
    write_lines("run/trees.jsonl", [tree_row("problem-3")])
    page = report("run", "--title", "<b>", "--max_problems", "2")
    assert capsys.readouterr().out == f"report: {Path('run', 'report.html')}\n"
    assert page.count("article", **{"class": "chosen"}) == 2 and page.count("details", **{"class": "node"}) == 4
    assert page.count("svg") == 4 and "<b>" in page.text and "3 problems, 5 candidates each" in page.text
    assert {path.name for path in Path("run").glob("*.png")} == {
        "curve.png",
        "reliability.png",
        "scores.png",
        "annotation.png",
    }


def test_figures_are_those_of_results_json(capsys):
    os.mkdir("run")
    problems_file("problems.parquet")
    write_lines("run/pools.jsonl", pool_rows())
    assert main(["best-of-n", "--pools", "run/pools.jsonl", "--output_json", "run/results.json"]) == 0
    results = json.loads(Path("run/results.json").read_text(encoding="utf-8"))
    results["pass@1"]["value"] = 0.123
    Path("run/results.json").write_text(json.dumps(results), encoding="utf-8")
    assert "12.3 %" in report("run", "--problems", "problems.parquet").text

    write_lines("run/pools.jsonl", pool_rows(2))
    capsys.readouterr()
    report("run", "--problems", "problems.parquet", status=2)
    assert "is of 3 problems, but the pools are of 2; remove the older" in capsys.readouterr().err


def test_problems_are_found_by_the_settings_of_the_run(capsys):
    os.mkdir("run")
    path = problems_file()
    write_lines("candidates.jsonl", [{**row, "step_scores": []} for row in pool_rows()])
    args = ["score", "--pools", "candidates.jsonl", "--problems", path, "--model", "mini-prm"]
    assert main([*args, "--output", "run/pools.parquet"]) == 0
    page = report("run")
    assert "mini-prm" in page.text and page.count("img") > 0
    Path(path).rename("moved.parquet")
    capsys.readouterr()
    report("run", status=2)
    error = capsys.readouterr().err
    assert error.startswith("mm-prm report: problems.parquet: ") and "--problems says where the problems are" in error
    report("run", "--problems", "moved.parquet")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
def test_a_benchmark_of_labelled_steps():
    args = ["evaluate", "--benchmark", "processbench", "--benchmark_path", str(SHARED / "processbench")]
    assert main([*args, "--limit", "2", "--num_resamples", "20", "--output", "run"]) == 0
    page = report("run")
    for shown in ("mini-prm on processbench", "Wrong steps found", "labels of the steps", "gsm8k", "✗ wrong"):
        assert shown in page.text
    assert page.count("math") > 0 and page.count("svg") == 2


@pytest.mark.parametrize(
    ("files", "flags", "message"),
    [
        ({}, [], "run: holds none of pools, trees and solutions, and no results.json of Best-of-N"),
        ({"pools.jsonl": pool_rows(), "pools.parquet": []}, [], "holds pools.parquet and pools.jsonl; keep one"),
        ({"pools.jsonl": pool_rows()}, [], "problem 'problem-0' of a pool or tree is not among the problems"),
        ({"pools.jsonl": [{"problem_id": "x"}]}, [], "pool 'x': candidates = None: the field is missing"),
        ({"pools.jsonl": pool_rows()}, ["--aggregator", "best"], "aggregator = 'best': use one of min"),
        ({"results.json": [["a list"]]}, [], "results.json: must be an object, as `mm-prm evaluate` or"),
    ],
)
def test_what_cannot_be_reported(files, flags, message, capsys):
    os.mkdir("run")
    for name, rows in files.items():
        write_lines(f"run/{name}", rows)
    report("run", *flags, status=2)
    assert message in capsys.readouterr().err
    assert not Path("run/report.html").exists()


def test_the_folder_is_missing(capsys):
    report("nowhere", status=2)
    assert "nowhere: there is no such folder" in capsys.readouterr().err


def test_nothing_but_trees():
    trees = [tree_row("problem-0") | {"status": "failed", "reason": "no <b>"}]
    page = Page(render_report({}, [tiny_problem(0)], trees=trees))
    assert "1 failed" in page.text and page.count("details") == 0
