"""Draw a training run's curves, and keep its log beside them.

    python scripts/plot_training.py RUN docs/results/first-run

RUN is the output folder of `hagmoe train` (or of any trainer): the newest checkpoint's trainer_state.json is read. Writes
NAME.png and NAME.json.
"""

import argparse
import json
from pathlib import Path

from hagmoe_hf.analysis.plots import training_curves
from hagmoe_hf.files import write_text


def main() -> None:
    """Read the newest state, write the picture and the log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("name", type=Path)
    args = parser.parse_args()
    states = sorted(args.run.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name.split("-")[1]))
    if not states:
        raise SystemExit(f"{args.run} holds no checkpoint-*/trainer_state.json; allowed: the output folder of a trainer.")
    log = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"]
    args.name.parent.mkdir(parents=True, exist_ok=True)
    training_curves(log, args.name.with_suffix(".png"))
    write_text(args.name.with_suffix(".json"), json.dumps(log, indent=0) + "\n")


if __name__ == "__main__":
    main()
