"""
Our recipes of accelerate on two GPUs train as one GPU does. Needs two GPUs:

python -m pytest -m gpu tests/invariant/test_gpus.py
"""

import importlib.util

import pytest
import torch

from .launching import assert_same_training, train_by_recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
# Without tensor cores' rounding, so that what differs is the order of sums
_SETTINGS = {"bf16": "false", "tf32": "false"}


@pytest.fixture(scope="module")
def one(tiny_prm_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return train_by_recipe("one_gpu", "mm_prm.train", tiny_prm_path, folder, num_processes=1, **_SETTINGS)


@pytest.mark.parametrize("recipe", ["gpus", "fsdp2", "zero1", "zero2", "zero3"])
def test_two_gpus_equal_one(one, recipe, tiny_prm_path, tmp_path):
    if recipe.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: pip install 'mm-prm[deepspeed]'")
    found = train_by_recipe(recipe, "mm_prm.train", tiny_prm_path, tmp_path, **_SETTINGS)
    assert_same_training(found, one, tiny_prm_path, tolerance=1e-4)
