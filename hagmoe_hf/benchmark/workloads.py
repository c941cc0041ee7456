"""What is timed: encoding a corpus, answering one query, a training step, loading, memory."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .contestants import Contestant
from .measure import interleave, paired_ratio, percentile, speed_ratios, spread

QUERY_TOKENS = (8, 16, 64)
Workload = dict[str, Any]  # {"unit": ..., "speed": {contestant: spread}, "median": {contestant: ...}, ...}


def encode(models: dict[str, Any], contestants: Sequence[Contestant], texts: Sequence[str], batch_size: int, rounds: int):
    """Throughput of `SentenceTransformer.encode` over texts of mixed length."""
    seconds = _in_turn(
        contestants,
        lambda name: models[name].encode(texts, batch_size=batch_size, show_progress_bar=False),
        rounds,
        f"encode, batch {batch_size}",
    )
    return _result(seconds, contestants, f"{len(texts)} texts of mixed length, batches of {batch_size}")


def query(models: dict[str, Any], contestants: Sequence[Contestant], texts: Sequence[str], tokens: int, rounds: int):
    """Latency of `SentenceTransformer.encode` for one text of so many tokens, special ones included."""
    text = query_of(models[contestants[0].name].tokenizer, texts, tokens)
    seconds = _in_turn(
        contestants,
        lambda name: models[name].encode(text, show_progress_bar=False),
        rounds,
        f"one query of {tokens} tokens",
    )
    result = _result(seconds, contestants, f"one query of {tokens} tokens")
    result["p95 seconds"] = {name: percentile(values, 0.95) for name, values in seconds.items()}
    return result


def training_step(
    models: dict[str, Any], contestants: Sequence[Contestant], texts: Sequence[str], batch_size: int, rounds: int
):
    """One optimizer step of the multiple negatives ranking loss over pairs of mixed length, in the stock trainer's order."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    anchors, positives = list(texts[:batch_size]), list(texts[batch_size : 2 * batch_size])
    steps: dict[str, Callable[[], None]] = {}
    for contestant in contestants:
        steps[contestant.name] = _step(models[contestant.name], MultipleNegativesRankingLoss, anchors, positives)
    seconds = _in_turn(contestants, lambda name: steps[name](), rounds, f"training step, {batch_size} pairs")
    for contestant in contestants:
        models[contestant.name].eval()
    return _result(seconds, contestants, f"training step, {batch_size} pairs of mixed length")


def load_and_memory(contestants: Sequence[Contestant], texts: Sequence[str], batch_size: int, repeats: int):
    """Seconds to load, and memory in bytes that encoding takes beyond the loaded model, each in a process of its own."""
    seconds: dict[str, list[float]] = {c.name: [] for c in contestants}
    memory: dict[str, list[float]] = {c.name: [] for c in contestants}
    request = {"texts": list(texts), "batch_size": batch_size, "threads": torch.get_num_threads()}
    for _ in range(repeats):
        for contestant in contestants:
            child = subprocess.run(
                [sys.executable, "-m", "hagmoe_hf.benchmark.child"],
                input=json.dumps(request | {"contestant": vars(contestant)}),
                capture_output=True,
                text=True,
                check=False,
            )
            if child.returncode:
                raise RuntimeError(f"The process that measures {contestant.name!r} failed:\n{child.stderr[-2000:]}")
            answer = json.loads(child.stdout.splitlines()[-1])
            seconds[contestant.name].append(answer["load seconds"])
            memory[contestant.name].append(answer["bytes"])
    load = _result(seconds, contestants, "loading")
    peak = {name: spread(values) for name, values in memory.items()}
    base = peak[contestants[0].name]["median"]
    ratio = {name: value["median"] / base for name, value in peak.items()}
    what = f"peak memory while encoding {len(texts)} texts in batches of {batch_size}, beyond the loaded model"
    return {"loading": load, "memory": {"what": what, "bytes": peak, "times the parent's": ratio}}


def query_of(tokenizer: Any, texts: Sequence[str], tokens: int) -> str:
    """The first beginning of a text that has exactly so many tokens.

    Raises:
        ValueError: No text is long enough.
    """
    for text in texts:
        words = text.split()
        for end in range(1, len(words) + 1):
            length = len(tokenizer(" ".join(words[:end]))["input_ids"])
            if length == tokens:
                return " ".join(words[:end])
            if length > tokens:
                break
    raise ValueError(f"No text begins with {tokens} tokens; allowed: texts that are long enough.")


def _step(model: Any, loss_class: type, anchors: list[str], positives: list[str]) -> Callable[[], None]:
    loss = loss_class(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)  # the weights, and with them the work, stay the same

    def step() -> None:
        model.train()
        optimizer.zero_grad()
        loss([model.preprocess(anchors), model.preprocess(positives)], None).backward()
        optimizer.step()

    return step


def _in_turn(contestants: Sequence[Contestant], run: Callable[[str], object], rounds: int, description: str):
    functions = {c.name: (lambda name=c.name: run(name)) for c in contestants}
    contexts = {c.name: c.running for c in contestants}
    return interleave(functions, rounds, contexts=contexts, description=description)


def _result(seconds: dict[str, list[float]], contestants: Sequence[Contestant], what: str) -> Workload:
    return {
        "what": what,
        "rounds": len(next(iter(seconds.values()))),
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "speed against the parent": speed_ratios(seconds, contestants[0].name),
        "mixture against": {name: paired_ratio(seconds[contestants[1].name], values) for name, values in seconds.items()},
    }


def shuffled(texts: Sequence[str], seed: int = 0) -> list[str]:
    """Texts in an order in which every batch is of mixed domain and length."""
    mixed = list(texts)
    random.Random(seed).shuffle(mixed)
    return mixed


@contextmanager
def pinned_threads(threads: int | None) -> Iterator[None]:
    """Let torch use so many threads inside the block; as many as there are cores where None."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


__all__ = ["QUERY_TOKENS", "encode", "load_and_memory", "pinned_threads", "query", "query_of", "shuffled", "training_step"]
