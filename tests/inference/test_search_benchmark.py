"""The comparison of searches runs at a size that says nothing, and writes its tables."""

import json
import runpy
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "guided_search.py"


def test_all_searches_stand_in_one_table(tmp_path, monkeypatch, capsys):
    output = tmp_path / "table.json"
    flags = "--num_problems 2 --token_budgets 8 200 --num_beams 2 --branching 2 --num_resamples 20 --device cpu --threads 1"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags.split(), "--output_json", str(output)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    nothing, something = json.loads(output.read_text(encoding="utf-8"))["tables"]
    # A budget in which nothing is finished: every choice is wrong.
    assert {row["value"] for row in nothing["methods"].values()} == {0.0}
    for strategy, row in something["searches"].items():
        assert 100 < row["generated_tokens"] <= 200 and row["candidates"] > 1
        found = {name.split(", ")[1]: entry for name, entry in something["methods"].items() if strategy in name}
        assert found["oracle"]["value"] >= max(found["best score"]["value"], found["weighted majority"]["value"])
        for entry in found.values():
            assert 0 <= entry["low"] <= entry["value"] <= entry["high"] <= 1
            assert 0 < entry["minus best_of_n, majority"]["p_value"] <= 1
        assert f"{strategy}, best score" in printed
