"""FSDP2 with our recipe on two processes trains as one process does, and saves a model that loads."""

from .launching import assert_same_training, train_by_recipe, train_in_one


def test_two_processes_equal_one(tiny_prm_path, tmp_path):
    expected = train_in_one(tiny_prm_path, tmp_path, packing="tree", use_cpu="true")
    found = train_by_recipe("fsdp2", "tests.invariant.on_cpu", tiny_prm_path, tmp_path, packing="tree")
    assert_same_training(found, expected, tiny_prm_path)
