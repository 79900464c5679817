import os
import signal
from pathlib import Path

# Before anything imports huggingface_hub or torch: no test may reach the network, and two cores serve everyone.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Programs that tests start find this package, and whatever the tests themselves found
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
)

import pytest

# Where the tests run in the background Ctrl-C is ignored, and the programs that they start and interrupt would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_vlm_path(tmp_path_factory) -> str:
    """Path of a tiny stock Qwen2.5-VL with its processor. Read only."""
    from .testing_utils import build_tiny_vlm

    return build_tiny_vlm(tmp_path_factory.mktemp("tiny_vlm"))


@pytest.fixture(scope="session")
def tiny_prm_path(tiny_vlm_path, tmp_path_factory) -> str:
    """Path of an untrained process reward model made from `tiny_vlm_path`. Read only."""
    from .testing_utils import build_tiny_prm

    return build_tiny_prm(tiny_vlm_path, tmp_path_factory.mktemp("tiny_prm"))
