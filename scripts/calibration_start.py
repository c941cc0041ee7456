"""How even and how telling are groups at step 0, with random gates and with gates that start from texts?

    python scripts/calibration_start.py docs/results/calibration-start.json

The packaged all-MiniLM-L6-v2 is upcycled with and without calibration on every second text of the bundled corpus; the others
are looked at. Reported by sparse layer: tokens of the most loaded group (or expert) over the mean one's, and the information
in nats that a token's group (its expert, in a flat router) has about its domain.
"""

import argparse
import json
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hagmoe_hf import sentence, upcycle
from hagmoe_hf.analysis.trace import DomainLoad, domain_load
from hagmoe_hf.demo import parent_folder, read_corpus
from hagmoe_hf.files import write_text

WAYS = {"default": {}, "flat token router": {"n_group": 1}, "sequence router": {"n_group": 8}}


def figures(load: DomainLoad) -> list[dict[str, float]]:
    """One entry for each sparse layer."""
    rows = []
    for layer, counts_SE in zip(load.layers, load.counts, strict=True):
        by_group = counts_SE.reshape(len(counts_SE), load.num_groups, -1).sum(-1)
        counts_SG = counts_SE if load.num_groups == 1 else by_group
        joint = counts_SG / counts_SG.sum()
        independent = joint.sum(0, keepdims=True) * joint.sum(1, keepdims=True)
        logs = np.log(np.divide(joint, independent, out=np.ones_like(joint), where=joint > 0))
        loads = {"largest_group": counts_SG.sum(0), "largest_expert": counts_SE.sum(0)}
        row = {name: round(float(load_C.max() / load_C.mean()), 3) for name, load_C in loads.items()}
        rows.append({"layer": layer, **row, "information": round(float((joint * logs).sum()), 3)})
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
            load = domain_load(sentence.encoder_of(model), model.tokenizer, texts[1::2], domains[1::2])
            result["ways"].setdefault(way, {})[start] = figures(load)
    write_text(output, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
