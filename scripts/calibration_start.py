"""How even and how telling are groups at step 0, with random gates and with gates that start from texts?

    python scripts/calibration_start.py docs/results/calibration-start.json

The packaged all-MiniLM-L6-v2 is upcycled with and without calibration on every second text of the bundled corpus; the others
are looked at. Reported by sparse layer: tokens of the most loaded group (or expert) over the mean one's, and the information
in bits that a token's group (its expert, in a flat router) has about its domain.
"""

import argparse
import json
from datetime import date
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from hagmoe_hf import sentence, upcycle
from hagmoe_hf.analysis import stats
from hagmoe_hf.analysis.stats import LabelLoad
from hagmoe_hf.analysis.texts import Texts
from hagmoe_hf.analysis.trace import label_load, record
from hagmoe_hf.demo import parent_folder, read_corpus
from hagmoe_hf.files import write_text

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


def main() -> None:
    """Upcycle, look, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    texts, domains = read_corpus()
    parent = sentence.load(str(parent_folder()), device="cpu")
    result: dict = {
        "command": f"python scripts/calibration_start.py {output}",
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "transformers", "sentence-transformers")},
        "texts": {"to calibrate with": len(texts[::2]), "to look at": len(texts[1::2])},
        "ways": {},
    }
    for way, options in tqdm(WAYS.items()):
        for start, calibration_texts in (("random gates", None), ("gates from texts", texts[::2])):
            model = upcycle(parent, calibration_texts=calibration_texts, **options)
            seen = Texts(tuple(texts[1::2]), tuple(domains[1::2]))
            load = label_load(record(model, seen), "domain")
            result["ways"].setdefault(way, {})[start] = figures(load)
    write_text(output, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
