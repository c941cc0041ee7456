"""Bulk encoding of real texts, killed twice with kill -9, against one plain `encode` of the same texts.

    python scripts/bulk_check.py PAIRS.parquet docs/results/bulk-check.json --random-layers 3 --every 10

Upcycles all-MiniLM-L6-v2, or with `--random-layers` a small random encoder with its tokenizer (rows and restarts are what is
checked, so meaning is not needed), and moves the experts apart (freshly upcycled ones are equal). Takes texts spread over
PAIRS (columns `anchor` and `positive`), writes them to four files, and starts `hagmoe encode`; kills it, with its children,
at a third and at two thirds; starts it a third time, and lets it end. Then compares: ids of all rows, in order; the vectors
of every `--every`-th row with a plain `encode` that has never seen a shard. The script itself goes on where it was stopped.
"""

import argparse
import hashlib
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch
from export_check import move_apart
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import BertConfig, BertModel

from hagmoe_hf import upcycle
from hagmoe_hf.demo import parent_folder
from hagmoe_hf.files import write_text

SHARD_ROWS = 4000
FILES = 4
LARGEST_DIFFERENCE = 1e-5


def mixture(layers: int | None) -> SentenceTransformer:
    """The upcycled parent, or with `layers` a small random mixture with its tokenizer; experts differ."""
    parent = SentenceTransformer(str(parent_folder()), device="cpu")
    if layers is not None:
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": layers}
        config = BertConfig(**{**parent[0].model.config.to_dict(), **sizes, "initializer_range": 0.3})
        parent[0].model = BertModel(config).eval()
        parent[1] = Pooling(config.hidden_size)
    return move_apart(upcycle(parent))


def write_input(pairs: Path, count: int, folder: Path) -> None:
    """`count` texts spread over the pairs, in `FILES` files, each with an id made of its row and its content."""
    table = pq.read_table(pairs, columns=["anchor", "positive"])
    texts = pa.chunked_array([*table["anchor"].chunks, *table["positive"].chunks])
    texts = texts.take(pa.array(np.linspace(0, len(texts) - 1, count).astype(np.int64))).to_pylist()
    ids = [f"{row}-{hashlib.sha256(text.encode()).hexdigest()[:16]}" for row, text in enumerate(texts)]
    folder.mkdir(parents=True)
    for number in range(FILES):
        part = slice(number * count // FILES, (number + 1) * count // FILES)
        pq.write_table(pa.table({"id": ids[part], "text": texts[part]}), folder / f"texts-{number}.parquet")


def shards(out: Path) -> int:
    """How many shards are whole."""
    return len(list(out.glob("shards/[0-9]*.parquet")))


def run(model: Path, texts: Path, out: Path, max_seq_length: int, kill_at: int | None) -> dict:
    """Run the command to its end, or kill it and its children as soon as `kill_at` shards are whole."""
    command = [sys.executable, str(Path(__file__).parent / "encode.py"), str(model), str(texts), "--out", str(out)]
    command += [
        "--id-column",
        "id",
        "--max-seq-length",
        str(max_seq_length),
        "--shard-rows",
        str(SHARD_ROWS),
        "--batch-size",
        "128",
    ]
    before, start = shards(out), time.monotonic()
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True)
    if kill_at is not None:
        while process.poll() is None and shards(out) < kill_at:
            time.sleep(0.05)
        time.sleep(1.0)  # into the next shard
        os.killpg(process.pid, signal.SIGKILL)
    printed, _ = process.communicate()
    return {
        "returncode": process.returncode,
        "shards_before": before,
        "shards_after": shards(out),
        "seconds": time.monotonic() - start,
        "printed": printed.splitlines(),
    }


def straight(model: Path, texts: list[str], folder: Path, max_seq_length: int, chunk: int = 5000) -> np.ndarray:
    """Plain `encode` of `texts`; chunks are kept, so that this script can be stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder = SentenceTransformer(str(model), device="cpu")
    encoder.max_seq_length = max_seq_length
    parts = []
    for start in range(0, len(texts), chunk):
        file = folder / f"{start:08d}.npy"
        if not file.exists():
            partial = folder / f"partial-{start}.npy"
            np.save(partial, encoder.encode(texts[start : start + chunk]))
            partial.rename(file)
        parts.append(np.load(file))
    return np.concatenate(parts)


def main() -> None:
    """Encode, kill, encode, kill, encode, compare, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--texts", type=int, default=200_000)
    parser.add_argument("--random-layers", type=int)
    parser.add_argument("--max-seq-length", type=int, default=32)
    parser.add_argument("--every", type=int, default=1, help="compare the vectors of every n-th row")
    parser.add_argument("--work", type=Path, default=Path("build/bulk"))
    args = parser.parse_args()
    model, texts, out, notes = (args.work / name for name in ("model", "texts", "vectors", "runs.json"))
    args.work.mkdir(parents=True, exist_ok=True)
    if not model.is_dir():
        mixture(args.random_layers).save_pretrained(str(args.work / "model-partial"))
        (args.work / "model-partial").rename(model)
    if not texts.is_dir():
        write_input(args.pairs, args.texts, args.work / "texts-partial")
        (args.work / "texts-partial").rename(texts)
    runs = json.loads(notes.read_text(encoding="utf-8")) if notes.exists() else []
    total = FILES * -(-(args.texts // FILES) // SHARD_ROWS)
    for kill_at in (total // 3, 2 * total // 3, None)[len(runs) :]:
        runs.append(run(model, texts, out, args.max_seq_length, kill_at))
        write_text(notes, json.dumps(runs, indent=1))

    read = ds.dataset(texts, format="parquet").to_table()
    files = sorted(out.glob("shards/*.parquet"))
    got = pa.concat_tables(pq.read_table(file) for file in files)
    picked = np.arange(0, args.texts, args.every)
    expected = straight(
        model, read["text"].take(pa.array(picked)).to_pylist(), args.work / f"straight-{args.every}", args.max_seq_length
    )
    vectors = pc.list_flatten(got["vector"]).to_numpy().reshape(len(got), -1)[picked]
    largest = float(np.abs(vectors - expected).max())
    result = {
        "command": shlex.join(["python", "scripts/bulk_check.py", "PAIRS.parquet", *sys.argv[2:]]),
        "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()} CPU, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}, shared with other work",
        "versions": {name: version(name) for name in ("torch", "transformers", "sentence-transformers", "pyarrow")},
        "model": "all-MiniLM-L6-v2, upcycled"
        if args.random_layers is None
        else f"{args.random_layers} random layers of width 64, upcycled",
        "max_seq_length": args.max_seq_length,
        "input_rows": len(read),
        "shards": len(files),
        "shard_rows": SHARD_ROWS,
        "killed_with": "SIGKILL, to the whole process group",
        "runs": runs,
        "output_rows": len(got),
        "rows_numbered_in_order": bool(pc.all(pc.equal(got["row"], pa.array(np.arange(len(got))))).as_py()),
        "ids_equal_in_order": got["id"].to_pylist() == read["id"].to_pylist(),
        "partial_files_left": len(list(out.glob("shards/.*"))),
        "vectors_compared": len(picked),
        "largest_difference_from_plain_encode": largest,
        "bound": LARGEST_DIFFERENCE,
    }
    result["passed"] = bool(
        result["output_rows"] == result["input_rows"] == args.texts
        and result["rows_numbered_in_order"]
        and result["ids_equal_in_order"]
        and largest <= LARGEST_DIFFERENCE
        and [entry["returncode"] for entry in runs] == [-signal.SIGKILL, -signal.SIGKILL, 0]
    )
    write_text(args.output, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()
