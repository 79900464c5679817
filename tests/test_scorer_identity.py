"""A journal's scores count for the model, the engine and the scoring code that gave them, and for nothing else."""

import importlib
import shutil
from pathlib import Path

import mm_prm
from mm_prm.annotation.identity import code_digest
from mm_prm.commands.score import ScoreSettings
from mm_prm.embedded import model_path


def test_scoring_code_counts_and_that_of_commands_does_not(tmp_path, monkeypatch):
    source, copy = Path(mm_prm.__file__).parent, tmp_path / "mm_prm"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("mini_*", "__pycache__"))
    for name in ("commands", "commands.scorer_settings", "evaluation", "inference", "models"):
        specification = importlib.import_module(f"mm_prm.{name}").__spec__
        place = copy / Path(specification.origin).relative_to(source)
        monkeypatch.setattr(specification, "origin", str(place))

    def identity() -> str:
        code_digest.cache_clear()
        return ScoreSettings(pools="p", problems="q", output="o", model="mini-prm").scorer_identity()

    first = identity()
    for name, counts in (
        ("commands/convert.py", False),
        ("evaluation/judging.py", False),
        ("models/templates.py", True),
        ("inference/solutions.py", True),
    ):
        file = copy / name
        content = file.read_text(encoding="utf-8")
        file.write_text(content + "\n# changed\n", encoding="utf-8")
        assert (identity() != first) == counts, name
        file.write_text(content, encoding="utf-8")
    code_digest.cache_clear()


def test_model_engine_and_dtype_count(tmp_path):
    def identity(model, engine, dtype=None):
        settings = {"pools": "p", "problems": "q", "output": "o", "model": str(model)}
        return ScoreSettings(**settings, engine=engine, dtype=dtype).scorer_identity()

    shutil.copytree(model_path("mini-prm"), tmp_path / "prm")
    first = identity("mini-prm", "transformers")
    assert identity(tmp_path / "prm", "transformers") == first
    assert identity(tmp_path / "prm", "vllm") != first
    assert identity(tmp_path / "prm", "transformers", "bfloat16") != first
    with (tmp_path / "prm" / "config.json").open("a") as config:
        config.write(" ")
    assert identity(tmp_path / "prm", "transformers") != first
