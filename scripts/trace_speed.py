"""Measure what recording costs: texts through `record` against the same texts through plain `encode`, in turns.

    python scripts/trace_speed.py docs/results/trace-speed.json --tokens 1000000

A model is upcycled from all-MiniLM-L6-v2 and runs the bundled corpus over and over, in blocks: A (encode) B (record) A B
..., in one process, each going first in turn, so that whatever else the machine does falls on both. Also checked: equal
vectors.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tqdm import tqdm

from hagmoe_hf import upcycle
from hagmoe_hf.analysis.texts import Texts
from hagmoe_hf.analysis.trace import record
from hagmoe_hf.demo import parent_folder, read_corpus
from hagmoe_hf.files import write_text

BLOCK_TOKENS = 20_000


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    args = parser.parse_args()
    model = upcycle(SentenceTransformer(str(parent_folder()), device="cpu"))
    corpus, _ = read_corpus()
    tokens = [len(ids) for ids in model.tokenizer(corpus, truncation=True, max_length=model.max_seq_length)["input_ids"]]
    random = np.random.default_rng(0)
    blocks: list[list[str]] = []
    total = 0
    while total < args.tokens:
        block: list[str] = []
        goal = total + BLOCK_TOKENS
        while total < goal:
            row = int(random.integers(len(corpus)))
            block.append(corpus[row])
            total += tokens[row]
        blocks.append(block)
    record(model, Texts(tuple(blocks[0][:64])))
    model.encode(blocks[0][:64])
    seconds: dict[str, list[float]] = {"encode": [], "record": []}
    recorded, difference = 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        for number, block in enumerate(tqdm(blocks, unit="block")):
            texts = Texts(tuple(block))
            results: dict[str, Any] = {}
            for kind in ("encode", "record") if number % 2 else ("record", "encode"):
                start = time.perf_counter()
                results[kind] = model.encode(block) if kind == "encode" else record(model, texts, f"{folder}/{number}")
                seconds[kind].append(time.perf_counter() - start)
            trace = results["record"]
            recorded += len(trace.token_id)
            order = np.argsort([-len(text) for text in block], kind="stable")
            difference = max(difference, float(np.abs(trace.vector - results["encode"][order]).max()))
            size = sum(path.stat().st_size for path in Path(folder).rglob("*.bin"))
            # After each block: on a busy machine a part is worth more than nothing, and says how much it is
            result = summary(seconds, recorded, difference, size)
            result = {"command": f"python scripts/trace_speed.py {args.output} --tokens {args.tokens}", **result}
            write_text(args.output, json.dumps(result, indent=1) + "\n")
    print(args.output.read_text(encoding="utf-8"))


def summary(seconds: dict[str, list[float]], recorded: int, difference: float, size: int) -> dict:
    """What the blocks so far show, from seconds per block, tokens, largest difference of vectors, and bytes on disk."""
    ratios = [one / other for one, other in zip(seconds["encode"], seconds["record"], strict=True)]
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)",
        "load_average": os.getloadavg(),
        "versions": {name: version(name) for name in ("torch", "transformers", "sentence-transformers")},
        "tokens": recorded,
        "blocks": len(ratios),
        "encode_tokens_per_second": recorded / sum(seconds["encode"]),
        "record_tokens_per_second": recorded / sum(seconds["record"]),
        "throughput_over_encode": sum(seconds["encode"]) / sum(seconds["record"]),
        "throughput_over_encode_by_block": {"median": statistics.median(ratios), "smallest": min(ratios)},
        "largest_difference_of_vectors": difference,
        "trace_bytes_per_token": size / recorded,
        "peak_memory_of_process_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
