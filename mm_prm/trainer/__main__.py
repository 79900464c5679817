"""`accelerate launch -m mm_prm.trainer --config train.yaml`: `mm-prm train` on many processes."""

import sys

from mm_prm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
