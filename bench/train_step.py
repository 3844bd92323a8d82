"""How much of the machine's matrix rate a training step of the tiny recipe reaches: `sgemm_share` of `bench/loop.py`, by itself.

python bench/train_step.py [--size s] [--rounds 15]
"""

import sys

from loop import main

if __name__ == "__main__":
    main(["--only", "sgemm_share", *sys.argv[1:]])
