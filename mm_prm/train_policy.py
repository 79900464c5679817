"""
`mm-prm train-policy` on many processes.

accelerate launch --config_file recipes/accelerate/gpus.yaml -m mm_prm.train_policy --config policy.yaml
"""

import sys

from mm_prm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-policy", *sys.argv[1:]]))
