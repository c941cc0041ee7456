"""Look inside a mixture: the library call of `hagmoe analyze`, for those who start scripts.

python scripts/analyze_experts.py MODEL texts.jsonl --output build/inside
"""

import argparse
import shlex
import sys

from hagmoe_hf.analysis.report import analyze
from hagmoe_hf.analysis.texts import read_texts


def main() -> None:
    """Trace, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--output", default="hagmoe_analysis")
    parser.add_argument("--text-column")
    parser.add_argument("--max-texts", type=int)
    parser.add_argument("--parent")
    parser.add_argument("--checkpoints", nargs="+", default=[])
    parser.add_argument("--importance-task")
    parser.add_argument("--prompt")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = vars(parser.parse_args())
    given = read_texts(
        args.pop("texts"), text_column=args.pop("text_column"), max_texts=args.pop("max_texts"), seed=args["seed"]
    )
    analyze(args.pop("model"), given, **args, show_progress_bar=True, command=shlex.join(sys.argv))


if __name__ == "__main__":
    main()
