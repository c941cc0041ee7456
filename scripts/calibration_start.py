"""How even and how telling are groups at step 0, with random gates and with gates that start from texts?

    python scripts/calibration_start.py docs/results/calibration-start.json
    python scripts/calibration_start.py docs/results/calibration-pairs.json --pairs PAIRS.parquet

Without pairs: the packaged all-MiniLM-L6-v2 is upcycled with and without calibration on every second text of the bundled
corpus; the others are looked at. Reported by sparse layer: tokens of the most loaded group (or expert) over the mean one's,
and the information in bits that a token's group (its expert, in a flat router) has about its domain.

With pairs (columns domain, anchor, positive, split): gates start from training pairs, as texts alone or as texts that belong
together; the others are looked at. Reported besides: how often a pair's texts use one group, and how often two texts of
different pairs do.
"""

import argparse
import json
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
from sentence_transformers import SentenceTransformer
from tqdm import tqdm

from hagmoe_hf import sentence, upcycle
from hagmoe_hf.analysis import stats
from hagmoe_hf.analysis.stats import LabelLoad
from hagmoe_hf.analysis.summary import summarize
from hagmoe_hf.analysis.texts import Texts
from hagmoe_hf.analysis.trace import label_load, record
from hagmoe_hf.demo import parent_folder, read_corpus
from hagmoe_hf.files import write_text

PAIRS_OF_DOMAIN = {"train": 150, "dev": 100}  # at most
TOKENS = 32
WAYS = {"default": {}, "flat token router": {"n_group": 1}, "sequence router": {"n_group": 8}}


def figures(load: LabelLoad) -> list[dict[str, float]]:
    """One entry for each sparse layer."""
    rows = []
    for layer, counts_SE in zip(load.layers, load.counts, strict=True):
        counts_SG = counts_SE if load.num_groups == 1 else stats.group_counts(counts_SE, load.num_groups)
        loads = {"largest_group": counts_SG.sum(0), "largest_expert": counts_SE.sum(0)}
        row = {name: round(1 + float(stats.max_violation(load_C)), 3) for name, load_C in loads.items()}
        rows.append({"layer": layer, **row, "information": round(stats.mutual_information(counts_SG), 3)})
    return rows


def from_corpus(parent: SentenceTransformer) -> Iterator[tuple[str, str, list]]:
    """Way of routing, start of the gates, figures by layer."""
    texts, domains = read_corpus()
    for way, options in tqdm(WAYS.items()):
        for start, calibration_texts in (("random gates", None), ("gates from texts", texts[::2])):
            model = upcycle(parent, calibration_texts=calibration_texts, **options)
            seen = Texts(tuple(texts[1::2]), tuple(domains[1::2]))
            yield way, start, figures(label_load(record(model, seen), "domain"))


def from_pairs(parent: SentenceTransformer, path: Path) -> Iterator[tuple[str, str, list]]:
    """The same for the default way and pairs of up to `TOKENS` tokens."""
    parent.max_seq_length = TOKENS
    frame = pd.read_parquet(path, columns=["domain", "anchor", "positive", "split"]).sample(frac=1, random_state=0)
    part = {name: frame[frame.split == name].groupby("domain").head(most) for name, most in PAIRS_OF_DOMAIN.items()}
    pairs = list(zip(part["train"].anchor, part["train"].positive, strict=True))
    texts = tuple(part["dev"][["anchor", "positive"]].to_numpy().ravel())
    seen = Texts(texts, tuple(part["dev"].domain.repeat(2)), pairs=np.arange(len(texts)).reshape(-1, 2))
    starts = {"gates from texts": [text for pair in pairs for text in pair], "gates from pairs": pairs}
    for start, calibration_texts in tqdm(starts.items()):
        trace = record(upcycle(parent, calibration_texts=calibration_texts), seen)
        rows = figures(label_load(trace, "domain"))
        for row, layer in zip(rows, summarize(trace)["layers"], strict=True):
            row["one_group"] = {name: round(layer["pairs"][name], 3) for name in ("with_positive", "with_negatives")}
        yield "default", start, rows


def main() -> None:
    """Upcycle, look, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--pairs", type=Path, default=None, metavar="PAIRS", help="parquet of pairs")
    options = parser.parse_args()
    parent = sentence.load(str(parent_folder()), device="cpu")
    found = from_corpus(parent) if options.pairs is None else from_pairs(parent, options.pairs)
    result: dict = {
        "command": f"python scripts/calibration_start.py {options.output}"
        + (f" --pairs {options.pairs.name}" if options.pairs else ""),
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "transformers", "sentence-transformers")},
        "ways": {},
    }
    for way, start, rows in found:
        result["ways"].setdefault(way, {})[start] = rows
    write_text(options.output, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
