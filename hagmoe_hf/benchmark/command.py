"""The body of `hagmoe benchmark`: one run over all workloads, written as it goes."""

import json
import os
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from ..demo import read_corpus
from ..files import write_text
from . import workloads
from .contestants import Contestant, line_up
from .measure import earlier, machine
from .profiling import profile_encoder
from .report import markdown, plot

ENCODE_BATCHES = (32, 128)
NUM_TEXTS = 256  # 64 pairs take half of them


def benchmark(
    parent: str | os.PathLike,
    output: str | os.PathLike,
    *,
    mixture: str | os.PathLike | None = None,
    others: Sequence[Contestant] = (),
    texts: Sequence[str] | None = None,
    rounds: int = 9,
    threads: int | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Time a mixture beside its parent, stock experts and nomic-embed-text-v2-moe's design; write a report.

    Args:
        parent: A dense `SentenceTransformer` folder.
        output: Folder for `benchmark.json`, `benchmark.md`, `benchmark.png` and the models made for timing. Workloads that
            are in its `benchmark.json` already, from the same command, are not run again.
        mixture: A mixture to time; the parent upcycled by the default recipe where None.
        others: Further contestants, like an exported model.
        texts: At least 256 texts of mixed length; the packaged corpus where None.
        rounds: Timed calls per contestant of the longer workloads; queries take ten times as many.
        threads: For torch; as many as there are cores where None.
        command: For the report.

    Returns:
        What was written to `benchmark.json`.

    Raises:
        ValueError: Too few texts, or `rounds` below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}; allowed: 1 or more.")
    mixed = _mixed(texts)
    if len(mixed) < NUM_TEXTS:
        raise ValueError(f"{len(mixed)} texts given; allowed: {NUM_TEXTS} or more, of mixed length.")
    mixed = mixed[:NUM_TEXTS]
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    with workloads.pinned_threads(threads):
        contestants = [*line_up(parent, output / "models", mixture), *others]
        trainable = contestants[:3]  # a step takes long, and the others have other weights to train
        models = {c.name: c.load() for c in contestants}

        tasks: dict[str, Callable[[], Any]] = {
            f"encode, batch {size}": partial(workloads.encode, models, contestants, mixed, size, rounds)
            for size in ENCODE_BATCHES
        }
        for tokens in workloads.QUERY_TOKENS:
            run = partial(workloads.query, models, contestants, mixed, tokens, 10 * rounds)
            tasks[f"one query, {tokens} tokens"] = run
        tasks["training step"] = partial(
            workloads.training_step, models, trainable, mixed, NUM_TEXTS // 4, max(rounds // 2, 1)
        )
        tasks["loading and memory"] = partial(workloads.load_and_memory, contestants, mixed, 32, 1)

        path = output / "benchmark.json"
        header = {"command": command, **machine(), "contestants": [c.name for c in contestants]}
        report = earlier(path, header) or {"date": date.today().isoformat(), **header, "workloads": {}}
        for name, task in tasks.items():
            if name not in report["workloads"]:
                report["workloads"][name] = task()
                write_text(path, json.dumps(report, indent=1) + "\n")
    write_text(output / "benchmark.md", f"# Speed beside the parent\n\n{markdown(report)}")
    plot(report, output / "benchmark.png")
    return report


def profile_mixture(
    parent: str | os.PathLike,
    output: str | os.PathLike,
    *,
    mixture: str | os.PathLike | None = None,
    texts: Sequence[str] | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Profile one batch of 32 texts through the mixture; arguments as for `benchmark`, results in `output`/profile."""
    model = line_up(parent, Path(output) / "models", mixture)[1].load()
    with workloads.pinned_threads(threads):
        return profile_encoder(model, _mixed(texts)[:32], Path(output) / "profile")


def _mixed(texts: Sequence[str] | None) -> list[str]:
    return workloads.shuffled(texts or read_corpus()[0])


__all__ = ["benchmark", "profile_mixture"]
