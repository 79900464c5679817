"""`mm-prm train`: bad rows that are skipped, and adapters."""

import json

import datasets
import pytest
from transformers.utils import logging as transformers_logging

from mm_prm.cli import main
from mm_prm.data.features import STEPWISE_FEATURES
from mm_prm.models import AutoModelForProcessReward

from .toy import toy_dataset


@pytest.fixture
def flags(tiny_vlm_path, tmp_path):
    def make(rows, **settings):
        rows.to_parquet(tmp_path / "rows.parquet")
        values = {"rows": tmp_path / "rows.parquet", "model": tiny_vlm_path, "output_dir": tmp_path / "prm"}
        values |= {"max_steps": 1, "per_device_train_batch_size": 4, "use_cpu": "true", "report_to": "none"}
        values |= {"save_strategy": "no", "gradient_checkpointing": "false", **settings}
        return ["train", *(word for name, value in values.items() for word in (f"--{name}", str(value)))]

    return make


def _with_bad_label(row, index):
    return {"labels": [1.5] * len(row["labels"])} if index in (2, 5) else {}


def test_bad_rows_are_named_or_skipped(flags, tmp_path, capsys, caplog):
    rows = toy_dataset(8).map(_with_bad_label, with_indices=True)
    assert main(flags(rows)) == 2
    assert "row 2 ('problem-0'): labels[0] = 1.5: must be in [0, 1]" in capsys.readouterr().err
    transformers_logging.enable_propagation()
    assert main(flags(rows, on_bad_row="skip")) == 0
    transformers_logging.disable_propagation()
    assert "2 of 8 rows are bad and are left out" in caplog.text
    assert "row 2 ('problem-0')" in caplog.text and "row 5 ('problem-1')" in caplog.text


def test_rows_without_images_of_their_own_are_skipped_before_they_are_joined(flags, tmp_path, capsys):
    path = tmp_path / "problems.jsonl"
    problems = [{"id": f"problem-{number}", "question": "How many?", "answer": "4"} for number in range(2)]
    path.write_text("\n".join(json.dumps(problem) for problem in problems))
    row = {"prompt": "How many?", "completions": ["4."], "labels": [0.5], "num_right": [4], "num_judged": [8]}
    row |= {"tree_id": "tree", "path": [0, 1]}
    rows = [{**row, "problem_id": f"problem-{number // 4}"} for number in range(8)]
    rows[2]["labels"], rows[5]["labels"] = [1.5], [0.5, 0.5]
    rows = datasets.Dataset.from_list(rows, features=STEPWISE_FEATURES)
    assert main(flags(rows, problems=path)) == 2
    assert "1.5" in capsys.readouterr().err
    assert main(flags(rows, problems=path, on_bad_row="skip")) == 0
    error = capsys.readouterr().err
    assert "row 2: " in error and "2 of 8 rows are bad and are left out" in error


def test_an_adapter_is_trained(flags, tmp_path, capsys):
    pytest.importorskip("peft")
    assert main(flags(toy_dataset(4), use_peft="true", lora_r=2, lora_dropout=0.1)) == 2
    assert "lora_dropout: 0.1 does nothing while disable_dropout is true" in capsys.readouterr().err
    assert main(flags(toy_dataset(4), use_peft="true", lora_r=2)) == 0
    assert json.loads((tmp_path / "prm" / "adapter_config.json").read_text())["r"] == 2
    AutoModelForProcessReward.from_pretrained(tmp_path / "prm")
