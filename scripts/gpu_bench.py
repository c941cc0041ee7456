"""Check and time everything on a GPU in one call of a few minutes: `gpu_checks.py`, and speed in bfloat16 and float32.

    python scripts/gpu_bench.py docs/results

Writes `gpu-checks.json` and `gpu-bench.json` into the folder, as it goes: a call that is cut short keeps what it measured,
and the next one into the same folder goes on. No network; the parent is the packaged all-MiniLM-L6-v2, or `--parent FOLDER`,
in float32 whatever it was saved in. After `--minutes` nothing new is begun. `--device cpu` tries the script itself. Figures
carry a hash of the model's code: `fill_readme_tables.py`, which puts them into the README, says when they are stale.

Where the GPU is another machine, take a smaller copy of the parent there:

    python scripts/gpu_bench.py --halve build/half-parent
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where a GPU is, the package need not be installed

import torch
from fill_readme_tables import model_code_hash
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from hagmoe_hf import sentence, upcycle
from hagmoe_hf.benchmark.contestants import nomic_design
from hagmoe_hf.benchmark.measure import interleave, speed_ratios, spread
from hagmoe_hf.benchmark.workloads import query_of, shuffled
from hagmoe_hf.demo import parent_folder, read_corpus
from hagmoe_hf.files import write_text

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCHES, ROUNDS = (32, 128, 512), 20
CHECKS = "checks"
CHECK_SECONDS = 240  # a check that hangs, or that takes the device with it, must not cost the measurements


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


def waits_for_the_device(encoder, batch: dict) -> dict[str, int]:
    """Where in a forward pass the host waits for the GPU, and how often: "file:line" -> waits."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            forward(encoder, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = (f"{Path(one.filename).name}:{one.lineno}" for one in caught if "synchroniz" in str(one.message))
    return dict(Counter(places))


def training_step(model, texts: list[str], device: str) -> Callable[[], None]:
    """A step of the multiple negatives ranking loss over 256 pairs under bfloat16 autocast; tokenised beforehand."""
    loss = MultipleNegativesRankingLoss(model)
    half = len(texts) // 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def features(part: list[str]) -> dict:
        batch = model.preprocess(part)
        return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}

    anchors, positives = features(texts[:half]), features(texts[half:])

    def step() -> None:
        model.train()
        optimizer.zero_grad()
        with torch.autocast(device.split(":")[0], dtype=torch.bfloat16):
            loss([dict(anchors), dict(positives)], None).backward()
        optimizer.step()
        model.eval()

    return step


def tasks(parent_name: str, device: str, rounds: int) -> dict[str, Callable[[], object]]:
    """Every measurement, by name."""
    parent = sentence.load(parent_name, device=device, model_kwargs={"dtype": torch.float32})
    models = {"parent": parent, "mixture": upcycle(parent).to(device), "nomic design": nomic_design(parent_name).to(device)}
    texts = shuffled(read_corpus()[0])
    is_cuda = device.startswith("cuda")

    def in_dtype(dtype: torch.dtype) -> dict:
        return {name: sentence.encoder_of(model).to(dtype) for name, model in models.items()}

    def encoders(batch_size: int, dtype: torch.dtype) -> dict:
        batch = parent.tokenizer(texts[:batch_size], padding=True, truncation=True, return_tensors="pt").to(device)
        functions = {name: partial(forward, encoder, batch) for name, encoder in in_dtype(dtype).items()}
        return timed(functions, device, rounds)

    def query(dtype: torch.dtype) -> dict:
        return timed({name: partial(forward, *one) for name, one in queries(dtype).items()}, device, 5 * rounds)

    def compiled_query(dtype: torch.dtype) -> dict:
        torch.compiler.reset()
        functions = {}
        for name, (encoder, batch) in queries(dtype).items():
            functions[name] = partial(forward, encoder, batch)
            graph = torch.compile(encoder, mode="reduce-overhead", fullgraph=True)  # on a GPU, a CUDA graph
            functions[f"{name}, compiled"] = partial(forward, graph, batch)
        states = {name: function().float().clone() for name, function in functions.items()}
        differences = {name: float((states[f"{name}, compiled"] - states[name]).abs().max()) for name in models}
        result = timed(functions, device, 5 * rounds)
        skipped = dict(torch._dynamo.utils.counters["inductor"]).get("cudagraph_skips", 0)
        return result | {"compiled against eager": differences, "CUDA graphs skipped": skipped}

    def queries(dtype: torch.dtype) -> dict[str, tuple]:
        batch = parent.tokenizer([query_of(parent.tokenizer, texts, 16)], return_tensors="pt").to(device)
        return {name: (encoder, batch) for name, encoder in in_dtype(dtype).items()}

    def encode(dtype: torch.dtype) -> dict:
        in_dtype(dtype)
        functions = {n: partial(m.encode, texts, batch_size=128, show_progress_bar=False) for n, m in models.items()}
        return timed(functions, device, max(rounds // 4, 1))

    def training() -> dict:
        in_dtype(torch.float32)
        functions = {name: training_step(model, texts[:512], device) for name, model in models.items()}
        result = timed(functions, device, max(rounds // 2, 1))
        return result | {"peak bytes beyond weights and optimizer": peaks(functions)}

    def peaks(functions: dict[str, Callable[[], None]]) -> dict[str, int]:
        found = {}
        for name, function in functions.items() if is_cuda else ():
            for model in models.values():
                model.zero_grad(set_to_none=True)
            before = torch.cuda.memory_allocated()  # weights and optimizer states of all of them
            torch.cuda.reset_peak_memory_stats()
            function()
            found[name] = torch.cuda.max_memory_allocated() - before
        return found

    def waiting(dtype: torch.dtype) -> dict[str, dict[str, int]]:
        batch = parent.tokenizer(texts[:32], padding=True, truncation=True, return_tensors="pt").to(device)
        functions = in_dtype(dtype) if is_cuda else {}
        return {name: waits_for_the_device(encoder, batch) for name, encoder in functions.items()}

    found: dict[str, Callable[[], object]] = {}
    for name, dtype in DTYPES.items():
        found[f"what makes the host wait, {name}"] = partial(waiting, dtype)
        for size in BATCHES:
            found[f"forward, {size} padded texts, {name}"] = partial(encoders, size, dtype)
        found[f"encode, {len(texts)} texts, {name}"] = partial(encode, dtype)
        found[f"one query of 16 tokens, {name}"] = partial(query, dtype)
    found["training step, 256 pairs, bfloat16 autocast"] = training
    # Last, since a CUDA graph that fails may spoil the process; in bfloat16, since stock grouped products take a path in
    # float32 that waits for the GPU, which a graph must not
    return found | {"one query of 16 tokens, compiled, bfloat16": partial(compiled_query, torch.bfloat16)}


def halve(parent_name: str, folder: Path) -> None:
    """Save a parent in half precision: half the size, and other vectors than its own by that rounding."""
    sentence.load(parent_name, device="cpu", model_kwargs={"dtype": torch.float16}).save(
        str(folder), create_model_card=False
    )


def run_checks(path: Path, parent_name: str, device: str) -> dict[str, float]:
    """`gpu_checks.py` in a process of its own."""
    words = [str(Path(__file__).with_name("gpu_checks.py")), str(path), "--parent", parent_name, "--device", device]
    start = time.monotonic()
    subprocess.run([sys.executable, *words], check=True, timeout=CHECK_SECONDS, stdout=subprocess.DEVNULL)
    return {"took seconds": time.monotonic() - start}


def write(path: Path, result: dict) -> None:
    """Replace `path` at once."""
    write_text(path, json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Check, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the two JSON files; with --halve, for the parent")
    parser.add_argument("--parent", type=Path, default=None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--halve", action="store_true", help="save the parent in half precision, and no more")
    args = parser.parse_args()
    parent_name = str(args.parent or parent_folder())
    if args.halve:
        halve(parent_name, args.output)
        return
    deadline = time.monotonic() + 60 * args.minutes
    args.output.mkdir(parents=True, exist_ok=True)
    words = [f"--parent {args.parent}"] if args.parent else []
    command = " ".join([f"python scripts/gpu_bench.py {args.output} --device {args.device}", *words])
    header = {
        "machine": torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device,
        "versions": {name: version(name) for name in ("torch", "transformers", "sentence-transformers")},
        "code": model_code_hash(),
        "rounds": args.rounds,
    }
    path = args.output / "gpu-bench.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    goes_on = all(earlier.get(key) == value for key, value in header.items())
    result = earlier if goes_on else {"date": date.today().isoformat(), "command": command, **header, "measured": {}}
    *measurements, (compiled, last) = tasks(parent_name, args.device, args.rounds).items()
    checks = partial(run_checks, args.output / "gpu-checks.json", parent_name, args.device)
    for name, task in [*measurements, (CHECKS, checks), (compiled, last)]:
        if "did not run" not in result["measured"].get(name, {"did not run": ""}):
            continue
        if time.monotonic() > deadline:
            print(f"{args.minutes:g} minutes are over: the next call goes on with {name!r}", flush=True)
            break
        try:
            result["measured"][name] = task()
        except Exception as error:  # one measurement that a machine cannot do must not cost the others
            result["measured"][name] = {"did not run": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        write(path, result)
        print(name, json.dumps(result["measured"][name])[:300], flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)
        main()
