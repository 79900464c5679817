import os
import socket
import subprocess
import sys

import torch
from safetensors.torch import load_file


def _train(model_path, folder, num_processes, batch_size):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    output = folder / f"{num_processes}.safetensors"
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={num_processes}", f"--master-port={port}"]
    script = ["-m", "tests.invariant.two_processes", model_path, str(output), str(batch_size), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(
        [sys.executable, *(launcher if num_processes > 1 else []), *script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return load_file(output)


def test_one_process_equals_two(tiny_prm_path, tmp_path):
    # The halves of a batch hold different weights of labels: averaging their means would differ
    one = _train(tiny_prm_path, tmp_path, num_processes=1, batch_size=8)
    two = _train(tiny_prm_path, tmp_path, num_processes=2, batch_size=4)
    torch.testing.assert_close(one.pop("numbers"), two.pop("numbers"), rtol=1e-5, atol=1e-6)
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=name)
