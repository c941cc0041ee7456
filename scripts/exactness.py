"""Measure how exactly an upcycled model reproduces its parent, for every way of routing.

    python scripts/exactness.py docs/results/exactness.json

Upcycles all-MiniLM-L6-v2, makes the routers decide hard (gates times 100, so that probabilities are near 0 and 1), encodes
the bundled corpus, and writes the largest absolute difference of the sentence vectors, beside what decided it.
"""

import argparse
import json
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tqdm import tqdm

from hagmoe_hf import upcycle
from hagmoe_hf.demo import LARGEST_DIFFERENCE, parent_folder, read_corpus
from hagmoe_hf.files import write_text

MODES = {
    "default: groups by sequence, 2 sparse layers": {},
    "groups by token": {"group_routing": "token"},
    "two open groups": {"topk_group": 2},
    "flat token router": {"n_group": 1},
    "sequence router (one expert per group)": {"n_group": 8},
    "two experts per token": {"num_experts_per_tok": 2},
    "two experts, normalized weights": {"n_group": 1, "num_experts_per_tok": 2, "combine_rule": "normalized"},
    "no shared expert": {"shared_expert_fraction": 0.0},
    "all layers sparse": {"sparse_layers": range(6)},
}
HARDNESS = 100.0  # factor on every gate


@torch.no_grad()
def route_hard(mixture: SentenceTransformer) -> float:
    """Multiply all gates by `HARDNESS`; return the smallest median probability of a chosen expert over the sparse layers."""
    encoder = mixture[0].model
    for name, parameter in encoder.named_parameters():
        if ".router." in name:
            parameter.mul_(HARDNESS)
    texts, _ = read_corpus()
    batch = mixture.tokenizer(texts[:64], padding=True, truncation=True, return_tensors="pt")
    output = encoder(**batch, output_router_logits=True)
    real = batch["attention_mask"].flatten().bool()
    return min(float(logits[real].exp().amax(-1).median()) for logits in output.router_logits)


def measure(parent: SentenceTransformer, parent_vectors: np.ndarray, texts: list[str], options: dict) -> dict:
    """Upcycle with `options`, route hard, encode; what came out."""
    mixture = upcycle(parent, **options)
    confidence = route_hard(mixture)
    difference = np.abs(mixture.encode(texts, batch_size=32) - parent_vectors).max()
    report = mixture.upcycling_report
    return {
        "largest_difference": float(difference),
        "median_probability_of_chosen_expert": confidence,
        "sparse_layers": list(report.sparse_layers),
        "total_parameters": report.total_parameters,
        "active_parameters": report.active_parameters,
        "active_over_parent": report.active_parameters / report.parent_parameters,
    }


def main() -> None:
    """Measure every mode and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    texts, _ = read_corpus()
    parent = SentenceTransformer(str(parent_folder()), device="cpu")
    parent_vectors = parent.encode(texts, batch_size=32)
    rows = {mode: measure(parent, parent_vectors, texts, options) for mode, options in tqdm(MODES.items())}
    result = {
        "command": f"python scripts/exactness.py {output}",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()} CPU, float32",
        "versions": {name: version(name) for name in ("torch", "transformers", "sentence-transformers")},
        "parent": "all-MiniLM-L6-v2",
        "texts": len(texts),
        "bound": LARGEST_DIFFERENCE,
        "modes": rows,
    }
    write_text(output, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
