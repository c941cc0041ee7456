"""How cost grows with experts, groups, length and batch: one varies, the others stay at the default, the parent in turn."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from .. import sentence
from ..demo import read_corpus
from ..files import write_figure, write_text
from ..upcycling import upcycle
from . import workloads
from .measure import earlier, interleave, machine, paired_ratio, spread

EXPERTS = (4, 8, 16, 32, 64)  # in the default's four groups
GROUPS = (1, 2, 4, 8)  # of the default's eight experts
BLOCK_GROUPS = (1, 2)  # of two experts as large as the parent's blocks, in every layer, as where a language is preserved
LENGTHS = (8, 16, 32, 64, 128, 256)  # tokens of every text
BATCHES = (1, 4, 16, 64, 256)  # texts of mixed length
NUM_TEXTS = 256
BATCH_SIZE = 32
QUERY_TOKENS = 16


def sweep(
    parent: str | os.PathLike,
    output: str | os.PathLike,
    *,
    texts: Sequence[str] | None = None,
    rounds: int = 5,
    threads: int | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Time `encode` of mixtures of several sizes beside their parent; write `sweep.json`, `sweep.md` and `sweep.png`.

    Args:
        parent: A dense `SentenceTransformer` folder.
        output: Folder for the report. Sweeps that are in its `sweep.json` already, from the same command, are not run again.
        texts: At least 256 texts of mixed length; the packaged corpus where None.
        rounds: Timed calls of everything.
        threads: For torch; as many as there are cores where None.
        command: For the report.

    Returns:
        What was written to `sweep.json`: for every sweep and size the seconds of parent and mixture, and the spread of how
        many times as fast the mixture was.

    Raises:
        ValueError: Too few texts, or `rounds` below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}; allowed: 1 or more.")
    mixed = workloads.shuffled(texts or read_corpus()[0])[:NUM_TEXTS]
    if len(mixed) < NUM_TEXTS:
        raise ValueError(f"{len(mixed)} texts given; allowed: {NUM_TEXTS} or more, of mixed length.")
    dense = sentence.load(str(parent), device="cpu")
    sweeps: dict[str, Callable[..., dict[str, Any]]] = {
        "experts": partial(_sizes, changes=[{"num_experts": number} for number in EXPERTS]),
        "groups": partial(_sizes, changes=[{"n_group": number} for number in GROUPS]),
        "groups, one query": partial(_sizes, changes=[{"n_group": number} for number in GROUPS], query=True),
        "groups of whole blocks, one query": _whole_blocks_query,
        "tokens per text": _lengths,
        "texts per batch": _batches,
    }
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    path = output / "sweep.json"
    with workloads.pinned_threads(threads):
        header = {"command": command, **machine()}
        report = earlier(path, header) or {"date": date.today().isoformat(), **header, "sweeps": {}}
        for name, run in sweeps.items():
            if name not in report["sweeps"]:
                report["sweeps"][name] = run(dense, mixed, rounds)
                write_text(path, json.dumps(report, indent=1) + "\n")
    write_text(output / "sweep.md", f"# Sweeps\n\n{markdown(report)}")
    plot(report, output / "sweep.png")
    return report


def _sizes(
    dense: Any, texts: list[str], rounds: int, changes: Sequence[dict[str, Any]], query: bool = False, **shape: Any
) -> dict[str, Any]:
    """What varies is the one option of each of `changes`; `shape` is what does not."""
    models = {"parent": dense} | {str(*change.values()): upcycle(dense, **change, **shape) for change in changes}
    if query:
        texts, rounds = [workloads.query_of(dense.tokenizer, texts, QUERY_TOKENS)], 10 * rounds
    seconds = _seconds(models, texts, BATCH_SIZE, rounds)
    return {size: _beside(seconds["parent"], own) for size, own in seconds.items() if size != "parent"}


def _whole_blocks_query(dense: Any, texts: list[str], rounds: int) -> dict[str, Any]:
    shape = {
        "num_experts": max(BLOCK_GROUPS),
        "sparse_layers": list(range(sentence.encoder_of(dense).config.num_hidden_layers)),
        "shared_expert_fraction": 0.0,
    }
    return _sizes(dense, texts, rounds, [{"n_group": number} for number in BLOCK_GROUPS], query=True, **shape)


def _lengths(dense: Any, texts: list[str], rounds: int) -> dict[str, Any]:
    """Texts joined until they are long enough, and cut at each length by both models' own truncation."""
    models = {"parent": dense, "mixture": upcycle(dense)}
    long = [" ".join(texts[first : first + 16]) for first in range(0, NUM_TEXTS, 4)]
    before, found = dense.max_seq_length, {}
    for length in LENGTHS:
        for model in models.values():
            model.max_seq_length = length
        seconds = _seconds(models, long, BATCH_SIZE, rounds)
        found[str(length)] = _beside(seconds["parent"], seconds["mixture"])
    dense.max_seq_length = before
    return found


def _batches(dense: Any, texts: list[str], rounds: int) -> dict[str, Any]:
    models = {"parent": dense, "mixture": upcycle(dense)}
    seconds = {size: _seconds(models, texts, size, rounds) for size in BATCHES}
    return {str(size): _beside(both["parent"], both["mixture"]) for size, both in seconds.items()}


def _seconds(models: Mapping[str, Any], texts: list[str], batch_size: int, rounds: int) -> dict[str, list[float]]:
    runs = {
        name: partial(model.encode, texts, batch_size=batch_size, show_progress_bar=False) for name, model in models.items()
    }
    return interleave(runs, rounds, description=f"{len(texts)} texts, batches of {batch_size}")


def _beside(parent: list[float], own: list[float]) -> dict[str, Any]:
    return {"parent seconds": spread(parent), "seconds": spread(own), "speed": paired_ratio(own, parent)}


def markdown(report: dict[str, Any]) -> str:
    """A table of the speeds against the parent, a line for each size."""
    versions = ", ".join(f"{package} {number}" for package, number in report["versions"].items())
    lines = [
        f"Made by `{report['command']}` on {report['date']}: {report['processor']}, {report['threads']} threads, {versions}."
        " `encode` of the mixture against its parent, in turn: median of the paired ratios, quartiles in brackets."
        f" One query has {QUERY_TOKENS} tokens.",
        "",
        "| what varies | size | times as fast as the parent |",
        "|---|---|---|",
    ]
    for name, sizes in report["sweeps"].items():
        for size, result in sizes.items():
            ratio = result["speed"]
            cell = f"{ratio['median']:.2f} [{ratio['lower quartile']:.2f}, {ratio['upper quartile']:.2f}]"
            lines.append(f"| {name} | {size} | {cell} |")
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    """One panel for each sweep: median, a band between the quartiles, and the parent as a line.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install hagmoe_hf[plots]") from error
    figure = Figure(figsize=(2.8 * len(report["sweeps"]), 2.8), layout="constrained")
    axes = figure.subplots(1, len(report["sweeps"]), sharey=True, squeeze=False)[0]
    for axis, (name, sizes) in zip(axes, report["sweeps"].items(), strict=True):
        ratios = {part: [result["speed"][part] for result in sizes.values()] for part in next(iter(sizes.values()))["speed"]}
        ticks = range(len(sizes))
        axis.fill_between(ticks, ratios["lower quartile"], ratios["upper quartile"], color="#b8c0c8")
        axis.plot(ticks, ratios["median"], color="#1b6ca8", marker="o")
        axis.axhline(1.0, color="k", linestyle="--", linewidth=1)
        axis.set_xticks(ticks, sizes)
        axis.set_xlabel(name)
    axes[0].set_ylim(bottom=0)  # last, since it ends the scaling to what is drawn, in all panels
    axes[0].set_ylabel("times as fast as the parent")
    write_figure(figure, path)


__all__ = ["markdown", "plot", "sweep"]
