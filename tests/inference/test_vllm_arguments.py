"""What `mm-prm serve` starts: arguments from the model's own files, and refusals before an engine is loaded."""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import Gemma2Config

from mm_prm.cli import main
from mm_prm.commands import serve
from mm_prm.embedded import model_path
from mm_prm.inference import VLLMScorer
from mm_prm.inference.vllm import vllm_arguments


def test_arguments_of_the_embedded_model():
    config = json.loads(Path(model_path("mini-prm"), "config.json").read_text(encoding="utf-8"))
    assert vllm_arguments(model_path("mini-prm")) == {
        "runner": "pooling",
        "convert": "classify",
        "pooler_config": {
            "task": "token_classify",
            "tok_pooling_type": "STEP",
            "step_tag_id": config["step_token_id"],
        },
        "dtype": "bfloat16",
        "max_model_len": 4096,
        "max_num_batched_tokens": 8192,
        "enable_prefix_caching": False,
        "enable_chunked_prefill": False,
        "limit_mm_per_prompt": {"image": 16, "video": 0},
    }


def test_a_batch_holds_the_longest_sequence(tiny_prm_path):
    arguments = vllm_arguments(tiny_prm_path, dtype="bfloat16", max_model_len=32768, max_images=2)
    assert arguments["max_model_len"] == arguments["max_num_batched_tokens"] == 32768
    assert arguments["dtype"] == "bfloat16" and arguments["limit_mm_per_prompt"]["image"] == 2
    assert vllm_arguments(tiny_prm_path)["dtype"] == "float32"  # and not "auto", which would halve it


def edited(path: str, destination: Path, change) -> str:
    shutil.copytree(path, destination)
    file = destination / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    change(config)
    file.write_text(json.dumps(config), encoding="utf-8")
    return str(destination)


def test_only_what_the_checkpoint_lacks_is_overridden(tiny_prm_path, tmp_path):
    assert "hf_overrides" not in vllm_arguments(tiny_prm_path)

    def older(config):
        del config["method"], config["text_config"]["classifier_from_token"]

    assert vllm_arguments(edited(tiny_prm_path, tmp_path / "older", older))["hf_overrides"] == {
        "method": "no_post_processing",
        "text_config": {"classifier_from_token": ["No", "Yes"]},
    }


def test_what_vllm_would_score_otherwise_is_refused(tiny_prm_path, tmp_path):
    def gemma2(config):
        config.clear()
        config.update(Gemma2Config(final_logit_softcapping=2.0).to_dict() | {"reward_token_ids": [1, 2]})

    path = edited(tiny_prm_path, tmp_path / "gemma2", gemma2)
    with pytest.raises(ValueError, match=r"leaves out what 'gemma2' does .*final_logit_softcapping = 2.0"):
        vllm_arguments(path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("mini-policy", "no process reward model: its config.json has no `reward_token_ids`"),
        ("./gone", "no such folder"),
        ("no-such-model", "model: no-such-model"),
    ],
)
def test_what_is_no_process_reward_model_is_not_served(model, message, capsys):
    assert main(["serve", model]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["serve", "mini-prm", "--port", "9000"]) == 2
    error = capsys.readouterr().err
    assert "vLLM is not installed: `pip install vllm`" in error
    assert f"vllm serve {model_path('mini-prm')} --runner pooling --convert classify" in error
    with pytest.raises(ImportError, match="vLLM cannot be imported"):
        VLLMScorer(model_path("mini-prm"))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        (["--api-key", "hush", "hush2", "--seed", "3"], "--api-key '***' '***' --seed 3"),
        (["--api-key=hush", "--seed", "3"], "'--api-key=***' --seed 3"),
        (["--api_key", "hush", "--hf-token", "hush"], "--api_key '***' --hf-token '***'"),
    ],
)
def test_keys_are_not_printed(flags, shown, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["serve", "mini-prm", "--", *flags]) == 2
    error = capfd.readouterr().err
    assert error.endswith(f"{shown}\n") and "hush" not in error
    program = tmp_path / "vllm"
    program.write_text("")

    def become(path, words):
        assert words[-len(flags) :] == flags  # the server has them
        raise KeyboardInterrupt

    program.chmod(0o755)
    monkeypatch.setattr(os, "execv", become)
    assert main(["serve", "mini-prm", "--", *flags]) == 130
    printed = capfd.readouterr().out
    assert printed.endswith(f"{shown}\n") and "hush" not in printed


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_the_command_is_printed_and_becomes_the_server(tmp_path):
    program = tmp_path / "vllm"
    program.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\nsys.exit(7)\n")
    program.chmod(0o755)
    run = subprocess.run(
        [sys.executable, "-m", "mm_prm.cli", "serve", "mini-prm", "--", "--port", "9001", "--enforce-eager"],
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 7, run.stderr  # the server's own
    printed, received = run.stdout.splitlines()
    words = json.loads(received)
    assert shlex.split(printed) == [str(program), *words]
    assert words[:2] == ["serve", model_path("mini-prm")] and words[-3:] == ["--port", "9001", "--enforce-eager"]
    assert "--no-enable-prefix-caching" in words and "--no-enable-chunked-prefill" in words
    pooling = json.loads(words[words.index("--pooler-config") + 1])
    assert pooling["tok_pooling_type"] == "STEP"
    assert words[words.index("--served-model-name") + 1] == "mini-prm"


def test_the_server_is_told_a_folders_whole_path(tiny_prm_path, monkeypatch, capsys):
    monkeypatch.chdir(Path(tiny_prm_path).parent)
    monkeypatch.setattr(serve, "_launcher", lambda path: None)
    assert main(["serve", Path(tiny_prm_path).name]) == 2
    # "prm" alone would be a repository of the Hub to whoever asks the server where its model is from.
    assert f"vllm serve {Path(tiny_prm_path).resolve()} " in capsys.readouterr().err
