"""
`mm-prm train` on several processes without GPUs, split by FSDP2 or DeepSpeed as accelerate does it on GPUs.

accelerate launch --config_file recipes/accelerate/zero3.yaml --num_processes 2 -m tests.invariant.on_cpu …

All that is not accelerate's own here is how processes find each other: accelerate splits a model over accelerators only,
so this says that two processes that talk through gloo are such.
"""

import os
import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from mm_prm.cli import main


def _gloo(self: PartialState, *args: object, **kwargs: object) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = _gloo  # type: ignore[method-assign]
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed.ops

        # DeepSpeed would compile, for minutes, what adds up gradients faster than gloo
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    sys.exit(main(["train", *sys.argv[1:]]))
