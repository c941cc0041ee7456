"""Tables and a plot of what was timed. Nothing here sees a model or a clock."""

import os
from pathlib import Path
from typing import Any

from ..files import write_figure


def timed(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The workloads with a speed for each contestant."""
    flat = {name: result for name, result in report["workloads"].items() if "speed against the parent" in result}
    if "loading and memory" in report["workloads"]:
        flat["loading"] = report["workloads"]["loading and memory"]["loading"]
    return flat


def markdown(report: dict[str, Any]) -> str:
    """A table of speeds against the parent, one of seconds, and one of memory."""
    names, results = report["contestants"], timed(report)
    versions = ", ".join(f"{package} {number}" for package, number in report["versions"].items())
    head, rule = " | ".join(results), "|---|" + "---|" * len(results)
    lines = [
        f"Made by `{report['command']}` on {report['date']}: {report['processor']}, {report['threads']} threads, "
        f"{versions}. Contestants ran in turn: median of the paired ratios, quartiles in brackets. Above 1 is faster.",
        "",
        f"| speed against the parent | {head} |",
        rule,
    ]
    for name in names:
        cells = [_ratio(result["speed against the parent"].get(name), result["rounds"]) for result in results.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"| milliseconds, median | {head} |", rule]
    for name in names:
        cells = [_milliseconds(result["seconds"].get(name)) for result in results.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    memory = report["workloads"].get("loading and memory", {}).get("memory")
    if memory:
        lines += ["", f"| {memory['what']} | MB | times the parent's |", "|---|---|---|"]
        for name in names:
            megabytes, ratio = memory["bytes"][name]["median"] / 1e6, memory["times the parent's"][name]
            lines.append(f"| {name} | {megabytes:.1f} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], path: str | os.PathLike) -> Path:
    """One panel per workload, one bar per contestant, quartiles as whiskers, the parent as a line.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install hagmoe_hf[plots]") from error
    results = timed(report)
    names = report["contestants"][::-1]
    columns = min(len(results), 4)
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(2.6 * columns + 3, rows * (0.36 * len(names) + 0.9)), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for axis, (workload, result) in zip(axes, results.items(), strict=False):
        for row, name in enumerate(names):
            ratio = result["speed against the parent"].get(name)
            if ratio is None:
                continue
            median, low, high = ratio["median"], ratio["lower quartile"], ratio["upper quartile"]
            dark = name == "mixture"
            axis.barh(
                row,
                median,
                color="#1b6ca8" if dark else "#b8c0c8",
                xerr=[[median - low], [high - median]],
                ecolor="#222222",
                capsize=3,
            )
            axis.text(0.04, row, f"{median:.2f}", va="center", fontsize=8, color="w" if dark else "k")
        axis.axvline(1.0, color="k", linestyle="--", linewidth=1)
        axis.set_title(workload, fontsize=9)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        axis.set_xlim(left=0)
    for axis in axes[len(results) :]:
        axis.set_visible(False)
    figure.supxlabel("times as fast as the parent", fontsize=9)
    return write_figure(figure, path)


def _ratio(ratio: dict[str, float] | None, rounds: int) -> str:
    if ratio is None:
        return ""
    if rounds == 1:  # which has no spread
        return f"{ratio['median']:.2f}"
    return f"{ratio['median']:.2f} [{ratio['lower quartile']:.2f}, {ratio['upper quartile']:.2f}]"


def _milliseconds(seconds: dict[str, float] | None) -> str:
    return "" if seconds is None else f"{1000 * seconds['median']:.1f}"


__all__ = ["markdown", "plot", "timed"]
