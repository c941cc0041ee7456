"""Where the time of one forward pass goes, by layer and by operation; a trace for Perfetto."""

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from .. import sentence
from ..files import write_text


def profile_encoder(model: Any, texts: list[str], output: str | os.PathLike, *, repeats: int = 10) -> dict[str, Any]:
    """Profile a `SentenceTransformer`'s encoder on one batch.

    Args:
        model: The `SentenceTransformer`.
        texts: The batch.
        output: Folder for `trace.json` (open it in ui.perfetto.dev) and `profile.json`.
        repeats: Forward passes.

    Returns:
        Milliseconds per forward pass: `operations` (own time, largest first) and `modules` (with what they contain).
    """
    encoder = sentence.encoder_of(model)
    named = {name: module for name, module in encoder.named_modules() if name and name.count(".") <= 2}
    open_ranges: dict[str, Any] = {}
    handles = []
    for name, module in named.items():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: _enter(open_ranges, name)))
        handles.append(module.register_forward_hook(lambda *_, name=name: _leave(open_ranges, name)))
    features = {key: value for key, value in model.preprocess(texts).items() if isinstance(value, torch.Tensor)}
    try:
        with torch.inference_mode():
            encoder(**features)
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                for _ in range(repeats):
                    encoder(**features)
    finally:
        for handle in handles:
            handle.remove()
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(output / "trace.json"))
    times: dict[str, dict[str, float]] = defaultdict(dict)
    for event in profiler.key_averages():
        is_module = event.key in named
        microseconds = event.cpu_time_total if is_module else event.self_cpu_time_total
        kind = "modules" if is_module else "operations"
        times[kind][event.key] = microseconds / 1000 / repeats
    result = {kind: dict(sorted(values.items(), key=lambda item: -item[1])[:40]) for kind, values in times.items()}
    write_text(output / "profile.json", json.dumps(result, indent=1) + "\n")
    return result


def _enter(open_ranges: dict[str, Any], name: str) -> None:
    open_ranges[name] = record_function(name)
    open_ranges[name].__enter__()


def _leave(open_ranges: dict[str, Any], name: str) -> None:
    open_ranges.pop(name).__exit__(None, None, None)


__all__ = ["profile_encoder"]
