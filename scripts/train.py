"""Train a HAG-MoE: `hagmoe train` as a script, for `accelerate launch`.

    accelerate launch --num_processes 2 scripts/train.py --config train.yaml

docs/training.md has the line for CPUs. `python scripts/train.py --help` lists all options.
"""

import sys

from hagmoe_hf.training.run import main

if __name__ == "__main__":
    main(sys.argv[1:])
