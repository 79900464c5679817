"""The recipes of training are read by what reads them, and `accelerate launch -m mm_prm.train` trains on two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from mm_prm.commands.train import AdapterSettings, TrainSettings
from mm_prm.models import AutoModelForProcessReward
from mm_prm.settings import parse_settings
from mm_prm.trainer import PRMConfig

from .toy import toy_dataset

REPOSITORY = Path(__file__).resolve().parents[2]
ACCELERATE = sorted((REPOSITORY / "recipes" / "accelerate").glob("*.yaml"))
MODELS = [REPOSITORY / "recipes" / name for name in ("mm_prm_8b", "qwen3_vl_8b")]
MODELS = sorted(file for folder in MODELS for file in folder.glob("*.yaml") if not file.stem.startswith("policy"))


@pytest.mark.parametrize("file", MODELS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_recipes_of_models_are_read(file):
    settings, config, adapter = parse_settings(
        (TrainSettings, PRMConfig, AdapterSettings), ["--config", str(file), "--use_cpu", "true"], prog="mm-prm train"
    )
    assert settings.rows and config.label_mode == "soft" and config.freeze_vision_tower
    assert adapter.use_peft == ("lora" in file.stem)
    assert "NOT RUN" in file.read_text(), "nobody has run it yet"


@pytest.mark.parametrize("file", ACCELERATE, ids=lambda file: file.stem)
def test_recipes_of_accelerate_are_read(file):
    config = load_config_from_file(str(file))
    kinds = {"one_gpu": "NO", "gpus": "MULTI_GPU", "fsdp2": "FSDP"}
    assert str(config.distributed_type).split(".")[-1] == kinds.get(file.stem, "DEEPSPEED")
    assert config.mixed_precision == "bf16"
    values = yaml.safe_load(file.read_text())
    assert values.get("deepspeed_config", {}).get("zero_stage") == (int(file.stem[-1]) if "zero" in file.stem else None)
    assert values.get("fsdp_config", {}).get("fsdp_version") == (2 if file.stem == "fsdp2" else None)


def test_accelerate_launches_two_processes(tiny_vlm_path, tmp_path):
    toy_dataset(8).to_parquet(tmp_path / "rows.parquet")
    flags = {"model": tiny_vlm_path, "rows": str(tmp_path / "rows.parquet"), "output_dir": str(tmp_path / "prm")}
    flags |= {"max_steps": "2", "per_device_train_batch_size": "4", "packing": "tree", "logging_steps": "1"}
    flags |= {"use_cpu": "true", "report_to": "none", "save_strategy": "no", "gradient_checkpointing": "false"}
    launch = ["-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/gpus.yaml", "--num_processes", "2"]
    launch += ["--mixed_precision", "no", "--main_process_port", "0", "-m", "mm_prm.train"]
    result = subprocess.run(
        [sys.executable, *launch, *(word for name, value in flags.items() for word in (f"--{name}", value))],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},  # the launcher leaves a folder there
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count(f"model: {tmp_path / 'prm'}") == 1, "one process speaks"
    assert "num_processes: 2" in (tmp_path / "prm" / "README.md").read_text()
    assert "train: 2/2, loss" in result.stderr and "step_labels_per_second" in result.stderr
    settings = yaml.safe_load((tmp_path / "prm" / "settings.yaml").read_text())
    assert settings["packing"] == "tree" and settings["use_peft"] is False
    AutoModelForProcessReward.from_pretrained(tmp_path / "prm")
