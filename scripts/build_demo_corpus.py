"""Rebuild `hagmoe_hf/demo/corpus.jsonl`: a small multi-domain corpus of real texts under permissive licences.

    python scripts/build_demo_corpus.py PAIRS.parquet hagmoe_hf/demo/corpus.jsonl

PAIRS.parquet has the columns domain, lang, positive, source, license, split. Only rows of the held-out `dev` split are
taken, so that the corpus never overlaps with training data, and only texts whose licence lets anyone redistribute them.
"""

import argparse
import json
from pathlib import Path

import pandas as pd

from hagmoe_hf.files import write_text

PERMISSIVE = {"WordNet-3.0", "BSD-3", "Apache-2.0", "MIT", "PSF-2.0", "CC-BY-4.0", "PostgreSQL", "public-domain"}
SHORTEST, LONGEST = 12, 1500  # characters
UNDECODABLE = "\N{REPLACEMENT CHARACTER}"


def choose(pairs: pd.DataFrame, per_domain: int, seed: int) -> pd.DataFrame:
    """At most `per_domain` distinct texts of every domain, drawn with `seed`, languages mixed as they come."""
    texts = pairs[(pairs.split == "dev") & pairs.license.isin(PERMISSIVE)].rename(columns={"positive": "text"})
    texts = texts[texts.text.str.len().between(SHORTEST, LONGEST) & ~texts.text.str.contains(UNDECODABLE)]
    texts = texts.drop_duplicates("text")
    drawn = [group.sample(min(per_domain, len(group)), random_state=seed) for _, group in texts.groupby("domain")]
    return pd.concat(drawn).sort_values(["domain", "lang", "text"])[["domain", "lang", "text", "source", "license"]]


def main() -> None:
    """Read the pairs, choose, write to a temporary name, rename."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--per-domain", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    corpus = choose(pd.read_parquet(args.pairs), args.per_domain, args.seed)
    rows = corpus.to_dict("records")
    write_text(args.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{len(corpus)} texts: {corpus.groupby('domain').size().to_dict()}")


if __name__ == "__main__":
    main()
