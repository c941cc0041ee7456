"""Train a mixture briefly on several domains; ask whether its experts specialise more than chance and more than fresh ones.

    python scripts/specialization.py PAIRS.parquet build/specialization docs/results/specialization.json

PAIRS.parquet holds pairs with the columns domain, lang, anchor, positive and split (train or dev). The report of the trained
model is build/specialization/trained/report.html, that of the untouched mixture build/specialization/fresh/report.html.
"""

import argparse
import json
import platform
import shutil
from datetime import date
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from sentence_transformers import SentenceTransformer

from hagmoe_hf import upcycle
from hagmoe_hf.analysis.report import analyze
from hagmoe_hf.analysis.texts import read_texts
from hagmoe_hf.demo import parent_folder
from hagmoe_hf.files import write_text
from hagmoe_hf.training.run import main as train

STEPS, BATCH, LENGTH = 60, 24, 32
PER_DOMAIN = 400  # rows of each domain to train on
DEV_TEXTS = 1200
TASK = "sts/wordsim353"  # of the kit, scored with each expert taken out


def split_file(pairs: Path, folder: Path) -> tuple[Path, Path]:
    """A few rows of every domain to train on, and unseen ones to look at."""
    table = pq.read_table(pairs)
    names = sorted(pc.unique(table["domain"]).to_pylist())
    parts: dict[str, list[pa.Table]] = {"train": [], "dev": []}
    for split, rows in parts.items():
        for name in names:
            part = table.filter(pc.and_(pc.equal(table["domain"], name), pc.equal(table["split"], split)))
            step = max(part.num_rows // PER_DOMAIN, 1)  # the file is sorted by language: take rows from all over
            rows.append(part.take(list(range(0, part.num_rows, step))[:PER_DOMAIN]))
    files = folder / "train.parquet", folder / "dev.parquet"
    for file, rows in zip(files, parts.values(), strict=True):
        # Without the language: it is that of a pair, whose two texts may be in two
        pq.write_table(pa.concat_tables(rows).select(["domain", "anchor", "positive"]), file)
    return files


def main() -> None:
    """Upcycle, train, look inside before and after, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    train_file, dev_file = split_file(args.pairs, args.folder)
    fresh, run = args.folder / "mixture", args.folder / "run"
    if not fresh.exists():
        mixture = upcycle(SentenceTransformer(str(parent_folder()), device="cpu"))
        mixture.max_seq_length = LENGTH  # before and after are to see the same tokens
        mixture.save_pretrained(str(fresh))
    options = {
        "model": fresh,
        "train_data": train_file,
        "columns": "anchor positive",
        "domain_column": "domain",
        "temperature": 2,
        "max_length": LENGTH,
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 2e-4,
        "save_steps": STEPS // 3,
        "logging_steps": 5,
        "output_dir": run,
    }
    train([word for name, value in options.items() for word in (f"--{name}", *str(value).split())] + ["--resume"])
    texts = read_texts([str(dev_file)], max_texts=DEV_TEXTS)
    checkpoints = sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    after = {"parent": str(parent_folder()), "checkpoints": [str(path) for path in checkpoints], "importance_task": TASK}
    looks: dict[str, dict] = {"fresh": {}, "trained": after}
    models = {"fresh": fresh, "trained": run / "model"}
    command = f"python scripts/specialization.py PAIRS.parquet {args.folder} {args.output}"
    result = {
        "command": command,
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "transformers", "sentence-transformers")},
        "training": {key: str(value) for key, value in options.items() if key not in ("model", "train_data", "output_dir")},
    }
    for name, more in looks.items():
        summary = analyze(str(models[name]), texts, args.folder / name, show_progress_bar=True, command=command, **more)
        result[name] = {
            "findings": summary["findings"],
            "texts": summary["texts"],
            "tokens": summary["tokens"],
            "layers": [
                {key: layer[key] for key in ("layer", "load", "information", "consistency", "pairs")}
                for layer in summary["layers"]
            ],
            "neighbours": summary["neighbours"],
            **{key: summary[key] for key in ("drift", "saturation", "importance") if key in summary},
        }
    write_text(args.output, json.dumps(result, indent=1) + "\n")
    shutil.copyfile(args.folder / "trained/domain_experts.png", args.output.with_suffix(".png"))
    print(json.dumps({name: result[name]["findings"] for name in looks}, indent=1))


if __name__ == "__main__":
    main()
