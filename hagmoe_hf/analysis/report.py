"""The whole way: trace, statistics, pictures, and one page that needs nothing else. What `hagmoe analyze` calls.

OUT/trace/       the recorded routing, from which an interrupted run goes on      OUT/*.png      the pictures
OUT/report.html  the page, pictures included                                     OUT/report.json  every number
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import sentence
from ..files import write_text
from . import stats
from .page import page
from .pictures import draw, example_texts
from .probes import expert_outputs, importance, strongest_ngrams, token_views
from .summary import Summary, findings, sample_rows, summarize
from .texts import Texts
from .trace import record, sparse_encoder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PACKAGES = ("hagmoe_hf", "torch", "transformers", "sentence-transformers", "numpy")
PROBE_TEXTS = 256  # texts that are looked at again: by checkpoints, by the parent
CKA_TEXTS = 64


def analyze(
    model: str,
    texts: Texts,
    output: str | os.PathLike,
    *,
    parent: str | None = None,
    checkpoints: Sequence[str] = (),
    importance_task: str | None = None,
    batch_size: int = 32,
    prompt: str | None = None,
    seed: int = 0,
    show_progress_bar: bool = False,
    command: str = "",
) -> Summary:
    """Look inside a mixture: where texts go, whether experts specialise, how alike they are; write report, pictures, JSON.

    The same call goes on where a killed one stopped: the trace lies under `output`/trace.

    Args:
        model: A local folder or a Hub id of a HAG-MoE.
        texts: What to run through it.
        output: Folder of the report; it may hold that of an earlier run.
        parent: The dense model it came from, to see how far the vectors have turned away.
        checkpoints: Earlier states of the model in time, to see when the choices settled.
        importance_task: A set of the evaluation kit (KIND/SET), to see whom it would miss.
        batch_size: Texts per forward pass; it changes the speed and nothing else.
        prompt: Put before each text; the model's default prompt where None.
        seed: Of shuffles, samples and the map.
        show_progress_bar: Whether to show one.
        command: What the report says it was made by.

    Returns:
        Every number, as in report.json.

    Raises:
        ValueError: The model has no sparse layers, `output` holds the trace of something else, an unknown task, or a
            checkpoint of another shape.
        ImportError: An optional package is missing; the message names what to install.
        OSError: There is no such model.
    """
    output = Path(output)
    score = _kit_score(importance_task, output, batch_size) if importance_task else None
    loaded = sentence.load(model)
    sparse_encoder(loaded)
    options: dict[str, Any] = {"batch_size": batch_size, "prompt": prompt, "show_progress_bar": show_progress_bar}
    trace = record(loaded, texts, output / "trace", **options)
    pieces = {index: piece for piece, index in loaded.tokenizer.get_vocab().items()}
    summary = summarize(trace, pieces, seed=seed)
    summary |= {
        "model": model,
        "command": command,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    rows = sample_rows(trace, seed, PROBE_TEXTS)
    probe = Texts(tuple(trace.texts.texts[row] for row in rows))
    outputs = expert_outputs(loaded, list(probe.texts[:CKA_TEXTS]), seed=seed, prompt=prompt)
    summary["cka"] = [[[stats.linear_cka(one, other) for other in layer] for one in layer] for layer in outputs]
    summary["ngrams"] = [asdict(ngram) for ngram in strongest_ngrams(loaded)]
    if parent is not None:
        before = sentence.load(parent).encode(list(probe.texts), batch_size=batch_size, prompt=prompt)
        now = loaded.encode(list(probe.texts), batch_size=batch_size, prompt=prompt)
        summary["drift"] = stats.drift(now, before)
    if checkpoints:
        summary["saturation"] = _saturation(loaded, checkpoints, probe, output, options)
    if score is not None:
        whole, lost = importance(loaded, score, show_progress_bar=show_progress_bar)
        summary["importance"] = {"task": importance_task, "whole": whole, "lost": lost.tolist()}
    summary["findings"] = findings(summary)
    views = token_views(loaded, example_texts(trace), prompt=prompt)
    sections = draw(trace, summary, views, output, seed=seed, training_log=_training_log(checkpoints))
    write_text(output / "report.json", json.dumps(summary, indent=1) + "\n")
    write_text(output / "report.html", page(summary, sections, output))
    return summary


def _kit_score(task: str, output: Path, batch_size: int) -> Callable[["SentenceTransformer"], float]:
    """A model's main score on a set of the kit that ships; scores are kept, so that an interrupted run goes on."""
    from ..evaluation.kit import SHIPPED, find_sets
    from ..evaluation.models import candidate
    from ..evaluation.runner import score_models
    from ..evaluation.tasks import local_task

    sets = {kit_set.key: kit_set for kit_set in find_sets(SHIPPED)}
    if task not in sets:
        raise ValueError(f"importance_task={task!r} is not possible; allowed: {sorted(sets)}.")
    kit_task = local_task(sets[task])

    def score(model: "SentenceTransformer") -> float:
        scores = score_models([candidate(model, "masked")], [kit_task], output / "importance", batch_size=batch_size)
        return scores[0][kit_task.metadata.name].score

    return score


def _saturation(
    model: "SentenceTransformer", checkpoints: Sequence[str], probe: Texts, output: Path, options: dict[str, Any]
) -> Summary:
    final = record(model, probe, **options)
    shares = []
    for checkpoint in checkpoints:
        earlier = sentence.load(checkpoint)
        # Two runs may both have a checkpoint-500, and the next time other texts or another prompt may be looked at
        about = f"{sentence.fingerprint(earlier)} {probe.texts} {options['prompt']}"
        key = hashlib.sha256(about.encode()).hexdigest()[:16]
        early = record(earlier, probe, output / "checkpoints" / f"{Path(checkpoint).name}-{key}", **options)
        if early.expert_index.shape != final.expert_index.shape:
            raise ValueError(
                f"checkpoint {checkpoint} chose {early.expert_index.shape} (tokens, sparse layers, experts per token); "
                f"allowed: {final.expert_index.shape}, as the model itself."
            )
        pairs = zip(np.moveaxis(early.expert_index, 1, 0), np.moveaxis(final.expert_index, 1, 0), strict=True)
        shares.append([stats.saturation(*pair) for pair in pairs])
    return {"checkpoints": [Path(checkpoint).name for checkpoint in checkpoints], "shares": shares}


def _training_log(checkpoints: Sequence[str]) -> list[dict] | None:
    """What the trainer logged up to the last checkpoint; None where it does not say."""
    state = Path(checkpoints[-1]) / "trainer_state.json" if checkpoints else None
    return json.loads(state.read_text(encoding="utf-8"))["log_history"] if state and state.is_file() else None
