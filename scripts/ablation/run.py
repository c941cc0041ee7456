"""Which runs a table needs, one after the other until the minutes are over, each a JSON file as soon as it is done."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from ablation import loop, scoring
from ablation.arms import DENSE, Arm
from ablation.budgets import Budget
from ablation.inputs import Pairs, calibration_pairs, load_pairs
from ablation.loop import Run, Setting
from ablation.models import build
from ablation.results import due, read_results, run_name
from hagmoe_hf import sentence
from hagmoe_hf.files import new_file, write_text
from hagmoe_hf.ngram_memory import give_memory

PACKAGES = ("torch", "transformers", "sentence-transformers")
KEPT_WEIGHTS = "trained.safetensors"
SECONDS_LEFT = {False: 20, True: 75}  # of the minutes, to write down what is there; more where the kit is scored


@dataclass(frozen=True)
class Place:
    """Where runs happen.

    Attributes:
        inputs: Folder that `prepare` made.
        results: Folder of results; those of a budget lie in its sub-folder.
        work: Folder for checkpoints, kept weights and vectors.
        device: Like "cpu" or "cuda".
    """

    inputs: Path
    results: Path
    work: Path
    device: str = "cpu"


def run_table(
    arms: tuple[Arm, ...],
    budget: Budget,
    place: Place,
    minutes: float,
    command: str,
    kit: bool,
    keep: bool = False,
    seeds: Sequence[int] | None = None,
) -> bool:
    """Do what these arms still need.

    Args:
        arms: Of the table, or some of them, where other processes do the others.
        budget: What every arm gets.
        place: Where.
        minutes: After these it stops, with a checkpoint, and the next call goes on; 0 only scores kept runs.
        command: What was typed, for the results.
        kit: Whether to score the kit at the end of every run, and of kept ones that were not scored.
        keep: Whether to keep the trained weights, about 100 MB a run, in `work`.
        seeds: Of the budget, or some of them, where other processes do the others; None for all.

    Returns:
        Whether they are complete.
    """
    deadline = time.monotonic() + 60 * minutes - SECONDS_LEFT[kit]
    inputs, work, device = place.inputs, place.work, place.device
    folder = place.results / budget.name
    load = lru_cache(partial(load_pairs, inputs, "train", budget.max_length, device))
    dev = load_pairs(inputs, "dev", budget.max_length, device, budget.dev_rows)
    texts = calibration_pairs(inputs, budget)
    sets = scoring.kit_sets(inputs / "kit") if kit else []
    scorers = []
    for name, result in read_results(folder).items() if kit else ():
        vectors = work / budget.name / name / "kit.npz"
        wanted = result["arm"]["name"] in {arm.name for arm in arms} and (seeds is None or result["seed"] in seeds)
        if wanted and not result["kit"]:
            if not vectors.is_file() and (vectors.parent / KEPT_WEIGHTS).is_file():
                scoring.record(kept_model(result, work, inputs).to(device), sets, vectors)
            if vectors.is_file():
                scorers.append(score_elsewhere(folder / f"{name}.json", inputs / "kit", vectors))

    def mine() -> list[tuple[Arm, float, int]]:
        return [run for run in due(arms, budget, read_results(folder)) if seeds is None or run[2] in seeds]

    while time.monotonic() < deadline and (todo := mine()):
        arm, rate, seed = todo[0]
        name = run_name(arm, rate, seed)
        start = None
        if budget.follows:
            start = kept_weights(work, budget.follows, run_name(DENSE if arm.branches else arm, rate, seed))
        setting = Setting(arm, budget, rate, seed, inputs, device, start)
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        pairs, own = load(words=arm.trains_on_words), work / budget.name / name
        finished = loop.train(setting, pairs, dev, texts, own, deadline)
        if finished is None:
            break
        run, model = finished
        if keep:
            keep_weights(own, model)
        if kit:
            scoring.record(model, sets, own / "kit.npz")
        write_result(folder / f"{name}.json", setting, run, model, pairs, command)  # last: with it, the run counts as done
        (own / "checkpoint.pt").unlink(missing_ok=True)
        if kit:
            scorers.append(score_elsewhere(folder / f"{name}.json", inputs / "kit", own / "kit.npz"))
        del finished, run, model  # or the next one's peak memory would hold it
    failed = sum(process.wait() != 0 for process in scorers)
    if failed:
        print(f"{failed} runs could not be scored; their vectors are kept, and the next call tries again", flush=True)
    left = len(mine())
    print(f"Budget {budget.name}: {left or 'no'} runs left for now", flush=True)
    return not left


def keep_weights(folder: Path, model: SentenceTransformer) -> None:
    """Write trained weights into a run's folder."""
    with new_file(folder / KEPT_WEIGHTS) as partial:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, partial)


def kept_weights(work: Path, budget: str, name: str) -> Path:
    """Where the trained weights of a run lie.

    Raises:
        FileNotFoundError: They were not kept.
    """
    path = work / budget / name / KEPT_WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; allowed: runs that were made with --keep.")
    return path


def kept_model(result: dict, work: Path, inputs: Path) -> SentenceTransformer:
    """The trained model of a result, made again from its kept weights.

    Raises:
        FileNotFoundError: They were not kept.
    """
    name = run_name(Arm(**result["arm"]), result["learning_rate"], result["seed"])
    path = kept_weights(work, result["budget"]["name"], name)
    weights = load_file(path)
    model = untrained(result, inputs)
    memory = {name.rpartition(".")[2]: tensor for name, tensor in weights.items() if ".ngram_memory." in name}
    if memory:
        encoder = sentence.encoder_of(model)
        encoder.config.ngram_memory_scale = result["arm"]["memory_scale"]
        give_memory(encoder, memory["names"], memory["counts"])
    model.load_state_dict(weights)
    return model.eval()


def untrained(result: dict, inputs: Path) -> SentenceTransformer:
    """The model of a result before training, but for where its gates started, and without its memory; on the CPU."""
    arm = replace(Arm(**result["arm"]), dense_share=0.0, calibrated=False, memory=0)
    return build(arm, inputs / "parent", [], result["seed"], "cpu")


def score_elsewhere(result: Path, kit: Path, vectors: Path) -> subprocess.Popen:
    """Score recorded vectors in another process, which adds them to the result."""
    script = Path(sys.argv[0]).resolve()
    words = [sys.executable, str(script), "--score", str(vectors), "--into", str(result), "--kit", str(kit)]
    return subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""})


def add_kit_scores(result: Path, kit: Path, vectors: Path) -> None:
    """Put the kit's scores into a result file."""
    entry = json.loads(result.read_text(encoding="utf-8"))
    entry["kit"] = scoring.score_recorded(kit, vectors, result.stem)
    write_text(result, json.dumps(entry, indent=1) + "\n")
    vectors.unlink(missing_ok=True)


def write_result(path: Path, setting: Setting, run: Run, model: SentenceTransformer, pairs: Pairs, command: str) -> None:
    """Write down a run: what it was, what came of it, and where."""
    encoder = sentence.encoder_of(model)
    config = getattr(encoder, "config", None)
    total = encoder.num_parameters()
    counts = config.parameter_counts() if hasattr(config, "parameter_counts") else None
    gpu = setting.device != "cpu"
    entry = {
        "arm": dataclasses.asdict(setting.arm),
        "budget": dataclasses.asdict(setting.budget),
        "learning_rate": setting.learning_rate,
        "seed": setting.seed,
        "parameters": {"total": total, "active": total - (counts.total - counts.active) if counts else total},
        "inputs": {"pairs": int(pairs.first_rows[-1]), "manifest": fingerprint(setting)},
        "curve": run.curve,
        "seconds": round(run.seconds, 1),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if gpu else 1024 * getrusage(RUSAGE_SELF).ru_maxrss,
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} thread(s)",
        "versions": {name: version(name) for name in PACKAGES},
        "commit": os.environ.get("HAGMOE_COMMIT") or _git_commit(),
        "code": code_hash(),
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "kit": None,
    }
    write_text(path, json.dumps(entry, indent=1) + "\n")


def fingerprint(setting: Setting) -> str:
    """Twelve hex digits of the inputs' manifest: equal inputs, equal fingerprint."""
    return hashlib.sha256((setting.inputs / "manifest.json").read_bytes()).hexdigest()[:12]


def code_hash() -> str:
    """Twelve hex digits of the package's and the apparatus's sources: a commit may be rewritten, these say what ran."""
    root = Path(__file__).parents[2]
    sources = sorted([*(root / "hagmoe_hf").rglob("*.py"), *Path(__file__).parent.glob("*.py")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


def _git_commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"
