"""Build the training pairs from the packages that their texts come from, and keep them apart from the kit.

    python scripts/fetch_sources.py build/sources
    python scripts/build_kit.py build/sources build/kit
    python scripts/build_pairs.py build/sources build/kit build/pairs.parquet

Two walls stand between pairs and kit: articles, packages, terms and manual sections of the kit are held out by a hash of
their name, and every pair that still repeats a text of the kit, or a quarter of its 8-word shingles, is dropped.
"""

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pandas as pd
from corpora import pairs
from corpora.pairs import Pair
from corpora.sources import Sources
from corpora.text import normalise, squeeze, unit_hash

from hagmoe_hf.evaluation.decontamination import KitTexts, is_contaminated, kit_texts
from hagmoe_hf.evaluation.kit import find_sets
from hagmoe_hf.files import new_file

BITEXT = ("software-bitext", "ui-bitext")  # the same translation may belong to several texts
MOST_MESSAGES = 2000  # ui-bitext, per language
DEV_SHARE = 0.01

Generator = Callable[[Sources], Iterator[Pair]]


def collect(generators: Sequence[Generator], sources: Sources, kit: KitTexts) -> list[Pair]:
    """Clean, de-duplicate and decontaminate what the generators yield, and print what was dropped and why."""
    kept: list[Pair] = []
    seen: set[tuple[str, str]] = set()
    messages: Counter[str] = Counter()
    for generator in generators:
        fate: dict[str, Counter[str]] = defaultdict(Counter)
        for raw in generator(sources):
            pair = clean(raw)
            reason = rejection(pair, seen, messages, kit)
            fate[pair.domain][reason or "kept"] += 1
            if reason is None:
                words = normalise(pair.anchor), normalise(pair.positive)
                seen |= {words, ("positive", words[1])}
                messages[pair.lang] += pair.domain == "ui-bitext"
                kept.append(pair)
        for domain, counts in fate.items():
            print(f"{generator.__name__} {domain}: {dict(counts)}", flush=True)
    return kept


def clean(pair: Pair) -> Pair:
    """Without rulers and markup that the sources' own format left, white space squeezed outside of code."""
    anchor, positive = pair.anchor.strip(), pair.positive.strip()
    if pair.domain.endswith("docs"):
        positive = re.sub(r"[=\-_*~+|#^]{3,}|(?<!\w)::(?!\w)", " ", positive)
        anchor = anchor.replace("``", "")
    if pair.domain != "code":
        anchor, positive = squeeze(anchor), squeeze(positive)
    return pair._replace(anchor=anchor, positive=positive, key=pair.key[-80:])


def rejection(pair: Pair, seen: set[tuple[str, str]], messages: Counter[str], kit: KitTexts) -> str | None:
    """Why a pair is dropped, None where it is kept."""
    anchor, positive = normalise(pair.anchor), normalise(pair.positive)
    if len(pair.anchor) < 2 or len(pair.positive) < 8 or len(positive) < 6 or anchor == positive:
        return "too short, or twice the same"
    if pair.domain == "ui-bitext" and messages[pair.lang] >= MOST_MESSAGES:
        return "language is full"
    if (anchor, positive) in seen or (pair.domain not in BITEXT and ("positive", positive) in seen):
        return "seen before"
    if is_contaminated(pair.anchor, pair.positive, kit):
        return "in the kit"
    return None


def table(kept: Sequence[Pair]) -> pd.DataFrame:
    """The pairs in an order that does not depend on the sources' order, with the split of each."""
    frame = pd.DataFrame(kept, columns=Pair._fields)
    frame["split"] = ["dev" if unit_hash("dev" + key) < DEV_SHARE else "train" for key in frame.key]
    order = [unit_hash(f"{anchor}|{positive}") for anchor, positive in zip(frame.anchor, frame.positive, strict=True)]
    return frame.assign(order=order).sort_values("order").drop(columns="order").reset_index(drop=True)


def main() -> None:
    """Read the sources, keep what is apart from the kit, write to a temporary name, rename."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, help="what fetch_sources.py made")
    parser.add_argument("kit", type=Path, help="what build_kit.py made, all sets of it")
    parser.add_argument("output", type=Path)
    names = [generator.__name__ for generator in pairs.ALL]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="SOURCE", help=", ".join(names))
    args = parser.parse_args()
    chosen = [generator for generator in pairs.ALL if generator.__name__ in args.only]
    frame = table(collect(chosen, Sources(args.sources), kit_texts(find_sets(args.kit))))
    with new_file(args.output) as partial:
        frame.to_parquet(partial, compression="zstd", index=False)
    print(f"{len(frame)} pairs: {frame.groupby('domain').size().to_dict()}")


if __name__ == "__main__":
    main()
