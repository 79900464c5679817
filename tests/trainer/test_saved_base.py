"""The base of an adapter is the model that was asked, whole, or an error."""

import shutil

import pytest

from mm_prm.models import AutoModelForProcessReward, ProcessRewardProcessor
from mm_prm.trainer import PRMTrainer
from mm_prm.trainer.saved_base import save_base_model

from .test_prm_trainer import _config
from .toy import toy_rows


def test_the_same_model_is_saved_once_and_another_is_refused(tiny_vlm_path, tmp_path):
    base, weights = tmp_path / "base_model", tmp_path / "base_model" / "model.safetensors"
    save_base_model(tiny_vlm_path, base, seed=0)
    first = weights.stat().st_mtime_ns, weights.stat().st_ino
    save_base_model(tiny_vlm_path, base, seed=0)
    assert (weights.stat().st_mtime_ns, weights.stat().st_ino) == first

    other = tmp_path / "other"
    shutil.copytree(tiny_vlm_path, other)
    with pytest.raises(ValueError) as error:
        save_base_model(str(other), base, seed=0)
    for words in (str(other), str(tiny_vlm_path), "set another output_dir, or delete"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match=r"'seed': 0}, but .*'seed': 1} is asked"):
        save_base_model(tiny_vlm_path, base, seed=1)
    with pytest.raises(ValueError, match=r"'revision': None, .*'revision': 'v2'"):
        save_base_model(tiny_vlm_path, base, seed=0, revision="v2")
    (base / "made_from.json").unlink()
    with pytest.raises(ValueError, match="does not say which model it was made from"):
        save_base_model(tiny_vlm_path, base, seed=0)


def test_a_save_that_was_killed_does_not_count(tiny_vlm_path, tmp_path, monkeypatch):
    def killed(self, *rest, **settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ProcessRewardProcessor, "save_pretrained", killed)
        save_base_model(tiny_vlm_path, tmp_path / "base_model", seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["base_model.unfinished"]
    save_base_model(tiny_vlm_path, tmp_path / "base_model", seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["base_model"]
    AutoModelForProcessReward.from_pretrained(tmp_path / "base_model")


def test_the_trainer_refuses_the_base_of_another_seed(tiny_vlm_path, tmp_path):
    peft = pytest.importorskip("peft")
    save_base_model(tiny_vlm_path, tmp_path / "base_model", seed=7, dtype="float32")
    lora = peft.LoraConfig(r=4, target_modules="all-linear")
    with pytest.raises(ValueError, match=r"'seed': 7}, but .*'seed': 42} is asked"):
        PRMTrainer(tiny_vlm_path, _config(tmp_path), train_dataset=toy_rows(4), peft_config=lora)
