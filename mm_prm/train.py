"""
`mm-prm train` on many processes.

accelerate launch --config_file recipes/accelerate/gpus.yaml -m mm_prm.train --config train.yaml
"""

import sys

from mm_prm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
