"""Timing in turn (A B A B ...), so that whatever else the machine does hits every contestant alike."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version

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
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor() -> str:
    """The processor's features tell more than its name where it is a virtual one."""
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


__all__ = ["interleave", "machine", "paired_ratio", "percentile", "speed_ratios", "spread"]
