import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mm_prm.models import AutoModelForProcessReward

from .two_processes import half_a_batch, train


@pytest.fixture(scope="module")
def two(tiny_prm_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    script = ["-m", "tests.invariant.two_processes", tiny_prm_path, "4", str(folder)]
    result = subprocess.run(
        [sys.executable, *launcher, *script],
        # The launcher leaves a folder in TMPDIR.
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "TMPDIR": str(folder)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.mark.parametrize("packing", ["none", "rows", "tree"])
def test_one_process_equals_two(two, tiny_prm_path, tmp_path, packing):
    # The halves of a batch hold different weights of labels: averaging their means would differ
    train(tiny_prm_path, str(tmp_path / "one.safetensors"), batch_size=8, output_dir=str(tmp_path), packing=packing)
    one, other = load_file(tmp_path / "one.safetensors"), load_file(two / f"two-{packing}.safetensors")
    torch.testing.assert_close(one.pop("numbers"), other.pop("numbers"), rtol=1e-5, atol=1e-6)
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_one_process_equals_two_that_share_the_weights(two, tiny_prm_path):
    model = AutoModelForProcessReward.from_pretrained(tiny_prm_path)
    batch, total = half_a_batch(tiny_prm_path)
    model(**batch, num_items_in_batch=total).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    sharded = load_file(two / "two-sharded.safetensors")
    assert sharded.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (sharded[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
