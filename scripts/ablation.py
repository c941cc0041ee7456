"""Does the mixture pay? Prepare inputs once, run tables of arms in parts, make tables and plots (docs/ablation.md).

python scripts/ablation.py --prepare pairs.parquet --kit build/kit --inputs build/ablation/inputs
python scripts/ablation.py --table 1 --budget full --device cuda --minutes 10     # again, until it says "no runs left"
python scripts/ablation.py --report
"""

import argparse
import shlex
import sys
from pathlib import Path

from ablation.arms import TABLES
from ablation.budgets import BUDGETS


def main() -> None:
    """Do the one thing that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prepare", type=Path, metavar="PAIRS", help="parquet of training pairs")
    what.add_argument("--table", type=int, choices=sorted(TABLES), help="do the runs that this table needs")
    what.add_argument("--report", action="store_true", help="make tables and plots from the results")
    what.add_argument(
        "--parting", type=Path, nargs="+", metavar="RESULT", help="what parted experts do to pairs in these runs"
    )
    what.add_argument(
        "--by-length", type=Path, nargs="+", metavar="RESULT", help="scores of --set in these runs, texts cut to --lengths"
    )
    what.add_argument(
        "--by-merging", type=Path, nargs="+", metavar="RESULT", help="held-out MRR of these runs, experts merged in --parts"
    )
    what.add_argument(
        "--by-memory", type=Path, nargs="+", metavar="RESULT", help="held-out MRR and --set, memory turned down to --parts"
    )
    what.add_argument(
        "--staying", type=Path, nargs="+", metavar="RESULT", help="how far held-out texts in --language moved in these runs"
    )
    what.add_argument(
        "--add-words", type=Path, metavar="PAIRS", help="give --inputs pairs of words, made by scripts/word_pairs.py"
    )
    what.add_argument("--pack", type=Path, metavar="RESULT", help="write this run's kept model --into a new folder")
    what.add_argument("--score", type=Path, metavar="VECTORS", help="score recorded vectors (done by --table)")
    parser.add_argument("--set", default="retrieval/wiki_description_en", help="with --by-length, --by-memory")
    parser.add_argument("--language", default="en", help="with --staying")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 256], help="with --by-length: tokens")
    parser.add_argument(
        "--parts",
        type=float,
        nargs="+",
        default=[0, 0.25, 0.5, 0.75, 1],
        help="with --by-merging (1 is the mean) and --by-memory",
    )
    parser.add_argument("--inputs", type=Path, default=Path("build/ablation/inputs"))
    parser.add_argument("--results", type=Path, default=Path("docs/results/ablation"))
    parser.add_argument("--work", type=Path, default=Path("build/ablation/work"), help="checkpoints")
    parser.add_argument("--kit", type=Path, default=None, help="evaluation sets")
    parser.add_argument("--into", type=Path, default=None, help="with --score: the result file; with --pack: a folder")
    parser.add_argument(
        "--parent", type=Path, default=None, help="dense SentenceTransformer; the packaged MiniLM by default"
    )
    parser.add_argument("--max-length", type=int, default=64, help="with --prepare: longest text in tokens")
    parser.add_argument("--rows", type=int, default=None, help="with --prepare: most training pairs of each domain")
    parser.add_argument(
        "--titles", action="store_true", help="with --prepare: add what articles of one title say in two languages"
    )
    parser.add_argument("--budget", choices=sorted(BUDGETS), default="screening")
    parser.add_argument("--only", nargs="+", default=None, metavar="ARM", help="with --table: these arms of it")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="with --table: these of the budget's")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--keep", action="store_true", help="keep trained weights, about 100 MB a run")
    parser.add_argument("--no-kit", action="store_true", help="leave the kit's sets out")
    args = parser.parse_args()
    command = "python " + shlex.join([sys.argv[0], *sys.argv[1:]])
    if args.prepare:
        from ablation.inputs import prepare

        from hagmoe_hf.demo import parent_folder

        if args.kit is None:
            parser.error("--prepare needs --kit: pairs that repeat an evaluation text are left out")
        parent = args.parent or parent_folder()
        prepare(args.prepare, args.kit, parent, args.inputs, args.max_length, args.rows, seed=0, titles=args.titles)
    elif args.add_words:
        from ablation.inputs import add_words

        add_words(args.add_words, args.inputs)
    elif args.table:
        from ablation.run import Place, run_table

        budget, kit = BUDGETS[args.budget], not args.no_kit
        unknown = set(args.only or ()) - {arm.name for arm in TABLES[args.table]}
        if unknown:
            names = ", ".join(arm.name for arm in TABLES[args.table])
            parser.error(f"--only {' '.join(sorted(unknown))} is not in table {args.table}; allowed: {names}")
        arms = tuple(arm for arm in TABLES[args.table] if args.only is None or arm.name in args.only)
        place = Place(args.inputs, args.results, args.work, args.device)
        run_table(arms, budget, place, args.minutes, command, kit, args.keep, args.seeds)
    elif args.parting:
        from ablation.findings import add_parting

        for result in args.parting:
            add_parting(result, args.work, args.inputs, command)
    elif args.by_length:
        from ablation.findings import add_lengths

        for result in args.by_length:
            add_lengths(result, args.set, args.lengths, args.work, args.inputs, command)
    elif args.by_merging:
        from ablation.findings import add_merging

        for result in args.by_merging:
            add_merging(result, args.parts, args.work, args.inputs, command)
    elif args.by_memory:
        from ablation.findings import add_memory

        for result in args.by_memory:
            add_memory(result, args.set, args.parts, args.work, args.inputs, command)
    elif args.staying:
        from ablation.findings import add_staying

        for result in args.staying:
            add_staying(result, args.language, args.work, args.inputs, command)
    elif args.pack:
        from ablation.findings import pack_run

        if args.into is None:
            parser.error("--pack needs --into: a new folder")
        pack_run(args.pack, args.into, args.work, args.inputs)
    elif args.score:
        from ablation.run import add_kit_scores

        add_kit_scores(args.into, args.kit, args.score)
    else:
        from ablation.report import write_reports

        write_reports(args.results)


if __name__ == "__main__":
    main()
