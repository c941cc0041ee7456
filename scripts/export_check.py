"""Measure an exported mixture: differences from torch, int8's loss on the kit, and the speed of `encode`.

    python scripts/export_check.py docs/results/export.json --work build/export --kit
    python scripts/export_check.py docs/results/export.json --work build/export --speed TEXTS --rounds 4

Upcycles all-MiniLM-L6-v2 and moves its experts apart (freshly upcycled ones are equal, so that a token sent to the wrong
expert would not show), exports it in float32 and int8, and adds what was asked for to the JSON. TEXTS is a parquet file of
pairs with a column `anchor` and one `positive`, or a text file with one text a line. The speed is measured in turns,
A B A B, in one process.
"""

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from hagmoe_hf import upcycle
from hagmoe_hf.demo import parent_folder, read_corpus
from hagmoe_hf.export import FLOAT_FILE, INT8_FILE, LARGEST_DIFFERENCE, export, load
from hagmoe_hf.files import write_text

NOISE = 0.1  # of a weight's standard deviation, added to each expert
PACKAGES = ("torch", "transformers", "sentence-transformers", "onnx", "onnxscript", "onnxruntime")


@torch.no_grad()
def move_apart(mixture: SentenceTransformer, seed: int = 0) -> SentenceTransformer:
    """Add noise to each expert, in place, so that they differ."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in mixture[0].model.named_parameters():
        if ".experts." in name:
            parameter.add_(NOISE * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return mixture


def kit_scores(folder: Path, output: Path, names: list[str]) -> dict:
    """Scores of torch float32 and of both graphs on the shipped kit, 0 to 100, and the differences of their means."""
    from hagmoe_hf.evaluation.kit import SHIPPED, find_sets
    from hagmoe_hf.evaluation.models import candidate
    from hagmoe_hf.evaluation.runner import score_models
    from hagmoe_hf.evaluation.tasks import local_task

    tasks = [local_task(kit_set) for kit_set in find_sets(SHIPPED) if not names or kit_set.key in names]
    models = {"torch float32": SentenceTransformer(str(folder), device="cpu"), "int8": load(folder, INT8_FILE)}
    candidates = [candidate(model, label) for label, model in models.items()]
    scores = score_models(candidates, tasks, output, show_progress_bar=True)
    table = {
        label: {task: 100 * score.score for task, score in of_model.items()}
        for label, of_model in zip(models, scores, strict=True)
    }
    means = {label: statistics.mean(of_model.values()) for label, of_model in table.items()}
    return {"scores": table, "mean": means, "int8_minus_float32": means["int8"] - means["torch float32"]}


def read_texts(path: Path, limit: int) -> list[str]:
    """Texts of a file, spread over it."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(path)
        if "split" in table.column_names:
            table = table.filter(pyarrow.compute.equal(table["split"], "dev"))
        texts = [text for name in ("anchor", "positive") for text in table[name].to_pylist()]
    else:
        texts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return texts[:: max(1, len(texts) // limit)][:limit]


def speed(folder: Path, texts: list[str], rounds: int, threads: int) -> dict:
    """Texts per second of `encode`, the models in turns; the ratio to the parent of each round."""
    torch.set_num_threads(threads)
    models = {
        "parent, torch float32": SentenceTransformer(str(parent_folder()), device="cpu"),
        "mixture, ONNX int8": load(folder, INT8_FILE, threads=threads),
        "mixture, ONNX float32": load(folder, FLOAT_FILE, threads=threads),
    }
    for model in models.values():
        model.encode(texts[:256])
    rates: dict[str, list[float]] = {label: [] for label in models}
    for _ in range(rounds):
        for label, model in models.items():
            start = time.perf_counter()
            model.encode(texts, batch_size=32)
            rates[label].append(len(texts) / (time.perf_counter() - start))
    first = rates["parent, torch float32"]
    ratios = {label: [rate / base for rate, base in zip(of_model, first, strict=True)] for label, of_model in rates.items()}
    tokenizer = models["parent, torch float32"].tokenizer
    lengths = [len(ids) for ids in tokenizer(texts, truncation=True)["input_ids"]]
    return {
        "texts": len(texts),
        "tokens_median": float(np.median(lengths)),
        "tokens_mean": float(np.mean(lengths)),
        "threads": threads,
        "batch_size": 32,
        "texts_per_second": rates,
        "over_parent": ratios,
        "median_over_parent": {label: statistics.median(values) for label, values in ratios.items()},
    }


def main() -> None:
    """Export if that was not done yet, measure what was asked for, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--work", type=Path, default=Path("build/export"))
    parser.add_argument("--kit", action="store_true")
    parser.add_argument("--tasks", nargs="+", default=[], help="of the kit; all by default")
    parser.add_argument("--speed", type=Path, metavar="TEXTS")
    parser.add_argument("--limit", type=int, default=1000, help="texts")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    folder = arguments.work / "mixture"
    if not folder.is_dir():
        export(
            move_apart(upcycle(SentenceTransformer(str(parent_folder()), device="cpu"))), folder, read_corpus()[0], int8=True
        )
    result = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.is_file() else {}
    result["parent"] = "all-MiniLM-L6-v2"
    result["machine"] = f"{platform.machine()} CPU"
    result["versions"] = {name: version(name) for name in PACKAGES}
    result["bound_float32"] = LARGEST_DIFFERENCE
    result["export"] = json.loads((folder / "export_report.json").read_text(encoding="utf-8"))
    command = shlex.join(["python", "scripts/export_check.py", *sys.argv[1:]])
    if arguments.kit:
        result["kit"] = {"command": command, "date": date.today().isoformat()}
        result["kit"] |= kit_scores(folder, arguments.work / "kit", arguments.tasks)
    if arguments.speed:
        texts = read_texts(arguments.speed, arguments.limit)
        result["speed"] = {"command": command.replace(str(arguments.speed), arguments.speed.name)}
        result["speed"] |= {"date": date.today().isoformat()} | speed(folder, texts, arguments.rounds, arguments.threads)
    write_text(arguments.output, json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: result.get(key) for key in ("kit", "speed")}, indent=2))


if __name__ == "__main__":
    main()
