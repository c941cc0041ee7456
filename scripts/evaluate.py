"""Evaluate a model: the library call of `hagmoe evaluate`, for those who start scripts.

python scripts/evaluate.py MODEL --against PARENT bm25 --output build/evaluation
"""

import argparse
import shlex
import sys

from hagmoe_hf.evaluation.command import evaluate
from hagmoe_hf.evaluation.kit import SHIPPED


def main() -> None:
    """Evaluate, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--against", nargs="+", default=[])
    parser.add_argument("--kit", default=SHIPPED)
    parser.add_argument("--tasks", nargs="+", default=[])
    parser.add_argument("--benchmark")
    parser.add_argument("--output", default="hagmoe_evaluation")
    parser.add_argument("--batch-size", type=int, default=32)
    evaluate(**vars(parser.parse_args()), show_progress_bar=True, command=shlex.join(sys.argv))


if __name__ == "__main__":
    main()
