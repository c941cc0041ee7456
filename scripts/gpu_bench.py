"""Check and time everything on a GPU in one call of a few minutes: `gpu_checks.py`, then speed in bfloat16 and float32.

    python scripts/gpu_bench.py docs/results

Writes `gpu-checks.json` and `gpu-bench.json` into the folder, the second as it goes: a call that is cut short keeps what it
measured, and the next one goes on. No network; the parent is the packaged all-MiniLM-L6-v2 (or `--parent FOLDER`).
`--device cpu` tries the script itself. Figures carry a hash of the model's code, by which `fill_readme_tables.py` tells when
they are stale.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from fill_readme_tables import model_code_hash
from gpu_checks import check
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from hagmoe_hf import sentence, upcycle
from hagmoe_hf.benchmark.contestants import nomic_design
from hagmoe_hf.benchmark.measure import interleave, speed_ratios, spread
from hagmoe_hf.benchmark.workloads import query_of, shuffled
from hagmoe_hf.demo import parent_folder, read_corpus

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCHES, ROUNDS = (32, 128, 512), 20


def synchronised(function: Callable[[], object], device: str) -> Callable[[], None]:
    """`function`, done only when the device is."""

    def run() -> None:
        function()
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    return run


def timed(functions: dict[str, Callable[[], object]], device: str, rounds: int) -> dict:
    """Seconds and speed against the first function, called in turn."""
    calls = {name: synchronised(function, device) for name, function in functions.items()}
    seconds = interleave(calls, rounds, warm_up=3)
    base = next(iter(functions))
    return {"seconds": {name: spread(values) for name, values in seconds.items()}, "speed": speed_ratios(seconds, base)}


def forward(encoder, batch: dict) -> torch.Tensor:
    """One pass without gradients."""
    with torch.inference_mode():
        return encoder(**batch).last_hidden_state


def waits_for_the_device(encoder, batch: dict) -> str:
    """What in a forward pass makes the host wait, "" for nothing."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward(encoder, batch)
    except RuntimeError as error:
        return str(error).splitlines()[0][:200]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def training_step(model, texts: list[str], device: str) -> Callable[[], None]:
    """A step of the multiple negatives ranking loss over 256 pairs under bfloat16 autocast."""
    loss = MultipleNegativesRankingLoss(model)
    half = len(texts) // 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def features(part: list[str]) -> dict:
        batch = model.preprocess(part)
        return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}

    def step() -> None:
        model.train()
        optimizer.zero_grad()
        with torch.autocast(device.split(":")[0], dtype=torch.bfloat16):
            loss([features(texts[:half]), features(texts[half:])], None).backward()
        optimizer.step()
        model.eval()

    return step


def tasks(parent_name: str, device: str, rounds: int) -> dict[str, Callable[[], object]]:
    """Every measurement, by name."""
    parent = sentence.load(parent_name, device=device)
    models = {"parent": parent, "mixture": upcycle(parent).to(device), "nomic design": nomic_design(parent_name).to(device)}
    texts = shuffled(read_corpus()[0])
    is_cuda = device.startswith("cuda")

    def in_dtype(dtype: torch.dtype) -> dict:
        return {name: sentence.encoder_of(model).to(dtype) for name, model in models.items()}

    def encoders(batch_size: int, dtype: torch.dtype) -> dict:
        batch = parent.tokenizer(texts[:batch_size], padding=True, truncation=True, return_tensors="pt").to(device)
        functions = {name: partial(forward, encoder, batch) for name, encoder in in_dtype(dtype).items()}
        return timed(functions, device, rounds)

    def query(dtype: torch.dtype, compiled: bool) -> dict:
        text = query_of(parent.tokenizer, texts, 16)
        batch = parent.tokenizer([text], return_tensors="pt").to(device)
        functions = {name: partial(forward, encoder, batch) for name, encoder in in_dtype(dtype).items()}
        for name, encoder in in_dtype(dtype).items() if compiled else ():  # with a GPU, as CUDA graphs
            graph = torch.compile(encoder, mode="reduce-overhead", fullgraph=True)
            functions[f"{name}, compiled"] = partial(forward, graph, batch)
        return timed(functions, device, 5 * rounds)

    def encode(dtype: torch.dtype) -> dict:
        in_dtype(dtype)
        functions = {n: partial(m.encode, texts, batch_size=128, show_progress_bar=False) for n, m in models.items()}
        return timed(functions, device, max(rounds // 4, 1))

    def training() -> dict:
        in_dtype(torch.float32)
        functions = {name: training_step(model, texts[:512], device) for name, model in models.items()}
        result = timed(functions, device, max(rounds // 2, 1))
        return result | {"peak bytes": peaks(functions)}

    def peaks(functions: dict[str, Callable[[], None]]) -> dict[str, int]:
        found = {}
        for name, function in functions.items() if is_cuda else ():
            torch.cuda.reset_peak_memory_stats()
            function()
            found[name] = torch.cuda.max_memory_allocated()
        return found

    def waiting() -> dict[str, str]:
        batch = parent.tokenizer(texts[:32], padding=True, truncation=True, return_tensors="pt").to(device)
        functions = in_dtype(torch.bfloat16) if is_cuda else {}
        return {name: waits_for_the_device(encoder, batch) for name, encoder in functions.items()}

    found: dict[str, Callable[[], object]] = {"what makes the host wait": waiting}
    for name, dtype in DTYPES.items():
        for size in BATCHES:
            found[f"forward, {size} padded texts, {name}"] = partial(encoders, size, dtype)
        found[f"encode, {len(texts)} texts, {name}"] = partial(encode, dtype)
        found[f"one query of 16 tokens, {name}"] = partial(query, dtype, compiled=False)
        found[f"one query of 16 tokens, compiled, too, {name}"] = partial(query, dtype, compiled=True)
    return found | {"training step, 256 pairs, bfloat16 autocast": training}


def write(path: Path, result: dict) -> None:
    """Replace `path` at once."""
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def main() -> None:
    """Check, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the two JSON files")
    parser.add_argument("--parent", type=Path, default=None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    parent_name = str(args.parent or parent_folder())
    command = f"python scripts/gpu_bench.py {args.output} --device {args.device}"
    header = {
        "command": command,
        "machine": torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device,
        "versions": {name: version(name) for name in ("torch", "transformers", "sentence-transformers")},
        "code": model_code_hash(),
    }
    path = args.output / "gpu-bench.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    goes_on = all(earlier.get(key) == value for key, value in header.items())
    result = earlier if goes_on else {"date": date.today().isoformat(), **header, "measured": {}}
    checks = args.output / "gpu-checks.json"
    if not (goes_on and checks.exists()):
        write(checks, check(parent_name, args.device, command))
    for name, task in tasks(parent_name, args.device, args.rounds).items():
        if name in result["measured"]:
            continue
        try:
            result["measured"][name] = task()
        except RuntimeError as error:  # one measurement that a machine cannot do must not cost the others
            result["measured"][name] = {"did not run": str(error).splitlines()[0][:200]}
        write(path, result)
        print(name, json.dumps(result["measured"][name])[:300], flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)
        main()
