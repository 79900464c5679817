"""DeepSpeed with our recipes on two processes trains as one process does, and saves a model that loads."""

import importlib.util

import pytest

from .launching import assert_same_training, train_by_recipe, train_in_one

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install 'mm-prm[deepspeed]'"
)


@pytest.mark.parametrize("recipe, packing", [("zero3", "tree"), ("zero2", "rows"), ("zero1", "none")])
def test_two_processes_equal_one(recipe, packing, tiny_prm_path, tmp_path):
    expected = train_in_one(tiny_prm_path, tmp_path, packing=packing, use_cpu="true")
    found = train_by_recipe(recipe, "tests.invariant.on_cpu", tiny_prm_path, tmp_path, packing=packing)
    assert_same_training(found, expected, tiny_prm_path)
