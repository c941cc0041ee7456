"""Timing in turn (A B A B ...), so that whatever else the machine does hits every contestant alike."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm


def interleave(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    contexts: Mapping[str, Callable[[], AbstractContextManager]] | None = None,
    warm_up: int = 1,
    description: str = "",
) -> dict[str, list[float]]:
    """Call every function once a round and take the time.

    Args:
        functions: What to time, by name.
        rounds: Timed calls of each.
        contexts: For each name what to enter around its calls, outside of the clock.
        warm_up: Calls of each beforehand, untimed.
        description: Of the progress bar; "" for none.

    Returns:
        Seconds, `rounds` for each name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in tqdm(range(warm_up + rounds), desc=description, disable=not description, leave=False):
        for name, function in functions.items():
            with (contexts or {}).get(name, nullcontext)():
                start = time.perf_counter()
                function()
                elapsed = time.perf_counter() - start
            if turn >= warm_up:
                seconds[name].append(elapsed)
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"lower quartile": low, "median": median, "upper quartile": high}


def speed_ratios(seconds: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """For every contestant the spread of `base`'s time over its own, round by round: above 1 it is the faster one."""
    return {name: paired_ratio(values, seconds[base]) for name, values in seconds.items()}


def paired_ratio(own: list[float], other: list[float]) -> dict[str, float]:
    """The spread of how many times as fast `own` was as `other`, round by round."""
    return spread([b / a for a, b in zip(own, other, strict=True)])


def percentile(values: list[float], share: float) -> float:
    """The value below which a share of `values` lies, the nearest one from above."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def machine() -> dict[str, object]:
    """The machine and the versions that a figure belongs to."""
    versions = {}
    for package in ("torch", "transformers", "sentence-transformers", "onnxruntime"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        # The features tell more than the name where the processor is a virtual one
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
    }


def earlier(path: Path, header: dict[str, Any]) -> dict[str, Any] | None:
    """What an interrupted run of the same kind on the same machine has written."""
    if not path.is_file():
        return None
    report = json.loads(path.read_text(encoding="utf-8"))
    return report if all(report.get(key) == json.loads(json.dumps(value)) for key, value in header.items()) else None


__all__ = ["earlier", "interleave", "machine", "paired_ratio", "percentile", "speed_ratios", "spread"]
