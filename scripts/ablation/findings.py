"""What is found about runs that ended and kept their weights, each in a file beside their results."""

import json
from pathlib import Path

from sentence_transformers import SentenceTransformer

from ablation import scoring
from ablation.arms import DENSE
from ablation.inputs import load_pairs
from ablation.lengths import scores_by_length
from ablation.memory import scores_by_memory
from ablation.parting import parting, ranks_by_merging
from ablation.results import run_name
from ablation.run import kept_model, untrained
from ablation.staying import staying
from hagmoe_hf import sentence
from hagmoe_hf.evaluation.kit import KitSet
from hagmoe_hf.files import write_text
from hagmoe_hf.packing import pack


def pack_run(result: Path, folder: Path, work: Path, inputs: Path) -> None:
    """Write the trained model of a run as what differs from its parent."""
    pack(kept_model(json.loads(result.read_text(encoding="utf-8")), work, inputs), inputs / "parent", folder)


def add_parting(result: Path, work: Path, inputs: Path, command: str) -> None:
    """Put what parted experts do to pairs, in one run against the dense parent's, into `parting.json` beside its result."""
    entry, mixture, dense = _with_dense(result, work, inputs)
    start = sentence.encoder_of(untrained(entry, inputs))
    dev = load_pairs(inputs, "dev", entry["budget"]["max_length"], "cpu")
    _add_finding("parting.json", result, entry, parting(mixture, dense, start, dev), command)


def add_lengths(result: Path, kit_set: str, lengths: list[int], work: Path, inputs: Path, command: str) -> None:
    """Put a run's scores of a set (like "retrieval/arxiv_tags") by length of text into `lengths.json` beside its result.

    Raises:
        ValueError: The kit has no such set.
    """
    wanted = _kit_set(inputs, kit_set)
    entry, mixture, dense = _with_dense(result, work, inputs)
    found = {"set": kit_set, "score": scores_by_length(mixture, dense, wanted, lengths)}
    _add_finding("lengths.json", result, entry, found, command)


def _kit_set(inputs: Path, key: str) -> KitSet:
    sets = {one.key: one for one in scoring.kit_sets(inputs / "kit")}
    if key not in sets:
        raise ValueError(f"set {key!r} is not in {inputs / 'kit'}; allowed: {', '.join(sorted(sets))}.")
    return sets[key]


def add_memory(result: Path, kit_set: str, parts: list[float], work: Path, inputs: Path, command: str) -> None:
    """Put a run's scores with parts of its memory, on held-out pairs and a set, into `memory.json` beside its result.

    Raises:
        ValueError: The kit has no such set, or the run no memory.
    """
    wanted = _kit_set(inputs, kit_set)
    entry = json.loads(result.read_text(encoding="utf-8"))
    budget = entry["budget"]
    dev = load_pairs(inputs, "dev", budget["max_length"], "cpu", budget["dev_rows"])
    found = {"parts": scores_by_memory(kept_model(entry, work, inputs), dev, wanted, parts)}
    _add_finding("memory.json", result, entry, found, command, f" {kit_set}")


def add_staying(result: Path, language: str, work: Path, inputs: Path, command: str) -> None:
    """Put how far a run's vectors of held-out texts in a language moved into `staying.json` beside its result."""
    entry = json.loads(result.read_text(encoding="utf-8"))
    budget = entry["budget"]
    dev = load_pairs(inputs, "dev", budget["max_length"], "cpu", budget["dev_rows"])
    parent = sentence.load(str(inputs / "parent"), device="cpu")
    domains = staying(kept_model(entry, work, inputs), parent, dev, language)
    _add_finding("staying.json", result, entry, {"domains": domains}, command, f" {language}")


def add_merging(result: Path, parts: list[float], work: Path, inputs: Path, command: str) -> None:
    """Put a run's held-out macro MRR with its experts merged in part into `merging.json` beside its result."""
    entry = json.loads(result.read_text(encoding="utf-8"))
    budget = entry["budget"]
    dev = load_pairs(inputs, "dev", budget["max_length"], "cpu", budget["dev_rows"])
    found = {"held_out_mrr": ranks_by_merging(kept_model(entry, work, inputs), dev, parts)}
    _add_finding("merging.json", result, entry, found, command)


def _with_dense(result: Path, work: Path, inputs: Path) -> tuple[dict, SentenceTransformer, SentenceTransformer]:
    """A result, its trained model, and the dense parent trained alike; both from kept weights."""
    entry = json.loads(result.read_text(encoding="utf-8"))
    dense = json.loads(result.with_name(_dense_of(entry)).read_text(encoding="utf-8"))
    return entry, kept_model(entry, work, inputs), kept_model(dense, work, inputs)


def _dense_of(entry: dict) -> str:
    return f"{run_name(DENSE, entry['learning_rate'], entry['seed'])}.json"


def _add_finding(name: str, result: Path, entry: dict, found: dict, command: str, about_what: str = "") -> None:
    """Put what was found about a run, or about a part of it, into a file beside its result."""
    path = result.with_name(name)
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    about = {"command": command, "commit": entry["commit"], "dense": Path(_dense_of(entry)).stem}
    known[result.stem + about_what] = {**about, **found}
    write_text(path, json.dumps(known, indent=1) + "\n")
