"""Run texts through a model and record where their tokens went.

A trace is a folder of flat arrays, written as the texts go by and mapped into memory when read: ten bytes per token with two
sparse layers, and a vector per text. A killed run goes on with the batch that it was in.

Axes:  N texts   T tokens   S sparse layers   K experts per token   E experts   D width of a vector
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import sentence
from ..files import write_text
from ..modeling_hagmoe import HagMoeModel, HagMoeSparseMLP
from ..routing_hagmoe import Routing
from .stats import LabelLoad, counts_per_label, counts_per_text
from .texts import Texts, label_ids

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

META = "trace.json"
SAVE_EVERY = 16  # batches between two points to go on from


@dataclass(frozen=True)
class Trace:
    """What a model did with texts.

    Attributes:
        texts: The texts, in the order of the arrays (long ones first).
        layers: (S,) index of each sparse layer.
        num_experts: E.
        num_groups: Expert groups; experts `g * E / num_groups` and following belong to group `g`.
        group_routing: "sequence" or "token": who opens groups.
        text_start: (N + 1,) int64, where each text's tokens begin, and T.
        token_id: (T,) int32.
        expert_index: (T, S, K) uint8, most probable first.
        expert_probability: (T, S, K) float16, P(expert) of the chosen ones before any top-k.
        mean_probability: (N, S, E) float32, P(expert) of every expert, meaned over each text's tokens.
        vector: (N, D) float32 sentence vectors.
    """

    texts: Texts
    layers: tuple[int, ...]
    num_experts: int
    num_groups: int
    group_routing: str
    text_start: np.ndarray
    token_id: np.ndarray
    expert_index: np.ndarray
    expert_probability: np.ndarray
    mean_probability: np.ndarray
    vector: np.ndarray

    @property
    def position(self) -> np.ndarray:
        """(T,) int64: how many tokens of its text precede each token."""
        return np.arange(self.text_start[-1]) - np.repeat(self.text_start[:-1], np.diff(self.text_start))


def label_load(trace: Trace, kind: str) -> LabelLoad:
    """Count which experts took the tokens of each domain, or of each language.

    Args:
        trace: What was recorded.
        kind: "domain" or "language".

    Raises:
        ValueError: The texts have no such labels.
    """
    known = {"domain": trace.texts.domains, "language": trace.texts.languages}
    labels = known[kind]
    if labels is None:
        have = [name for name, values in known.items() if values is not None]
        raise ValueError(f"The texts have no {kind} labels; allowed: one of those they have, {have}.")
    names, label_N = label_ids(labels)
    counts = [
        counts_per_label(counts_per_text(layer_index, trace.text_start, trace.num_experts), label_N, len(names))
        for layer_index in np.moveaxis(trace.expert_index, 1, 0)
    ]
    return LabelLoad(kind, names, trace.layers, trace.num_groups, np.stack(counts))


@torch.inference_mode()
def record(
    model: "SentenceTransformer",
    texts: Texts,
    folder: str | os.PathLike | None = None,
    *,
    batch_size: int = 32,
    prompt: str | None = None,
    show_progress_bar: bool = False,
) -> Trace:
    """Run texts through a model and record its routing and its vectors.

    Args:
        model: A `SentenceTransformer` around a HAG-MoE.
        texts: The texts, truncated as the model truncates them.
        folder: Where the trace is kept; with that of an interrupted run of the same model and texts, the run goes on, and a
            finished one is only read. In memory where None.
        batch_size: Texts per forward pass; it changes the speed and nothing else.
        prompt: Put before each text; the model's default prompt where None.
        show_progress_bar: Whether to show one.

    Raises:
        ValueError: The model has no sparse layers, or `folder` holds a trace of something else.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            options: dict[str, Any] = {"batch_size": batch_size, "prompt": prompt, "show_progress_bar": show_progress_bar}
            mapped = record(model, texts, temporary, **options)
            loaded: dict[str, Any] = {name: np.array(getattr(mapped, name)) for name in _dtypes(0) if name != "length"}
            return replace(mapped, **loaded)
    encoder = sparse_encoder(model)
    config = encoder.config
    prompt = prompt_of(model, prompt)
    # Long texts first, as `encode` does: like lengths share a batch, and too little memory shows at once
    texts = texts.take(np.argsort([-len(text) for text in texts.texts], kind="stable"))
    num_layers, count = len(config.sparse_layers), len(texts.texts)
    shapes = {
        "length": (),
        "token_id": (),
        "expert_index": (num_layers, config.num_experts_per_tok),
        "expert_probability": (num_layers, config.num_experts_per_tok),
        "mean_probability": (num_layers, config.num_experts),
        "vector": (model.get_embedding_dimension(),),
    }
    about = {"model": sentence.fingerprint(model), "texts": _hash(texts.texts), "prompt": prompt}
    model.eval()
    with (
        _Arrays(Path(folder), about, shapes, _dtypes(config.num_experts)) as arrays,
        _routings_of(encoder) as routings,
        tqdm(total=count, initial=arrays.done, desc="Tracing", unit=" texts", disable=not show_progress_bar) as bar,
    ):
        while arrays.done < count:
            batch = list(texts.texts[arrays.done : arrays.done + batch_size])
            features = model.preprocess(batch, prompt=prompt)
            features = {
                name: value.to(encoder.device) if torch.is_tensor(value) else value for name, value in features.items()
            }
            vectors = model(dict(features))["sentence_embedding"]
            arrays.append(len(batch), _rows(features, routings, vectors, config.num_experts))
            routings.clear()
            bar.update(len(batch))
    mapped_arrays = arrays.read()
    text_start = np.concatenate([[0], np.cumsum(mapped_arrays.pop("length"), dtype=np.int64)])
    return Trace(
        texts,
        tuple(config.sparse_layers),
        config.num_experts,
        config.n_group,
        config.group_routing,
        text_start,
        **mapped_arrays,
    )


def prompt_of(model: "SentenceTransformer", prompt: str | None) -> str | None:
    """What `encode` puts before each text: `prompt`, or the model's default one where it is None."""
    return (model.prompts.get(model.default_prompt_name or "") or None) if prompt is None else prompt


def sparse_encoder(model: "SentenceTransformer") -> HagMoeModel:
    """The HAG-MoE inside a `SentenceTransformer`.

    Raises:
        ValueError: It is another model, or one without sparse layers.
    """
    encoder = sentence.encoder_of(model)
    base = getattr(encoder, encoder.base_model_prefix, encoder)
    if not getattr(base.config, "sparse_layers", None):
        raise ValueError(
            f"{type(encoder).__name__} has no sparse layers, so there is no routing to look at; allowed: a HAG-MoE, which "
            "`hagmoe upcycle` makes of a dense model."
        )
    return cast(HagMoeModel, base)


@contextmanager
def _routings_of(encoder: HagMoeModel) -> Iterator[list[Routing]]:
    """A list that receives what every router decides, layer by layer.

    Not `output_router_logits`: asked for outputs of (B*L) rows, the model would have to compute its padding, too.
    """
    routings: list[Routing] = []

    def keep(router, inputs, routing: Routing) -> None:
        routings.append(routing)

    blocks = [cast(HagMoeSparseMLP, encoder.layers[layer].mlp) for layer in encoder.config.sparse_layers]
    hooks = [block.router.register_forward_hook(keep) for block in blocks]
    try:
        yield routings
    finally:
        for hook in hooks:
            hook.remove()


def _rows(features: dict[str, Any], routings: list[Routing], vectors: Tensor, num_experts: int) -> dict[str, np.ndarray]:
    """One batch as rows of the trace's arrays; padding, if a router saw any, is left out."""
    token_ids = features["input_ids"].flatten()
    mask = features.get("attention_mask")
    if mask is None:  # packed: one row, no padding
        lengths = features["cu_seq_lens_q"].diff().long()
    else:
        token_ids, lengths = token_ids[mask.flatten() != 0], (mask != 0).sum(dim=1)
    real = routings[0].expert_index[:, 0] < num_experts
    index_TSK = torch.stack([routing.expert_index[real] for routing in routings], dim=1)
    probs_TSE = torch.stack([routing.router_logits[real] for routing in routings], dim=1).exp()
    text_T = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    sums_NSE = probs_TSE.new_zeros(len(lengths), *probs_TSE.shape[1:]).index_add(0, text_T, probs_TSE)
    tensors = {
        "length": lengths,
        "token_id": token_ids,
        "expert_index": index_TSK,
        "expert_probability": probs_TSE.gather(-1, index_TSK),
        "mean_probability": sums_NSE / lengths.clamp(min=1)[:, None, None],
        "vector": vectors.float(),
    }
    dtypes = _dtypes(num_experts)
    return {name: tensor.cpu().numpy().astype(dtypes[name]) for name, tensor in tensors.items()}


def _dtypes(num_experts: int) -> dict[str, type]:
    return {
        "length": np.int32,
        "token_id": np.int32,
        "expert_index": np.uint8 if num_experts <= 256 else np.uint16,
        "expert_probability": np.float16,
        "mean_probability": np.float32,
        "vector": np.float32,
    }


def _hash(texts: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)} {text}\n".encode())
    return digest.hexdigest()


class _Arrays:
    """The growing files of a trace, one per array, and how many texts all of them hold for certain."""

    def __init__(self, folder: Path, about: dict[str, Any], shapes: dict[str, tuple], dtypes: dict[str, type]):
        self.folder, self.about, self.shapes, self.dtypes = folder, about, shapes, dtypes
        self.done = self._since_saved = 0
        self._rows = dict.fromkeys(shapes, 0)
        if (folder / META).is_file():
            meta = json.loads((folder / META).read_text(encoding="utf-8"))
            if meta["about"] != about:
                raise ValueError(
                    f"{folder} holds the trace of another model, other texts or another prompt; allowed: a new folder, or "
                    "that of the same run."
                )
            self.done, self._rows = meta["done"], meta["rows"]
        elif folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no trace; allowed: a new folder, or that of the same run.")

    def __enter__(self) -> "_Arrays":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._files = {name: (self.folder / f"{name}.bin").open("ab") for name in self.shapes}
        for name, file in self._files.items():
            promised, there = self._rows[name] * self._row_bytes(name), file.tell()
            if there < promised:
                raise ValueError(f"{file.name} has {there} bytes; allowed: at least {promised}. Remove {self.folder}.")
            file.truncate(promised)  # a killed run may have written more than it said
        return self

    def __exit__(self, *error: object) -> None:
        self._save()
        for file in self._files.values():
            file.close()

    def append(self, texts: int, rows: dict[str, np.ndarray]) -> None:
        """Add one batch."""
        for name, array in rows.items():
            self._files[name].write(array.tobytes())
        for name, array in rows.items():
            self._rows[name] += len(array)
        self.done += texts
        self._since_saved += 1
        if self._since_saved >= SAVE_EVERY:
            self._save()

    def read(self) -> dict[str, np.ndarray]:
        """Every array, mapped into memory."""
        return {
            name: np.memmap(self.folder / f"{name}.bin", self.dtypes[name], "r", shape=(self._rows[name], *shape))
            for name, shape in self.shapes.items()
        }

    def _row_bytes(self, name: str) -> int:
        return int(np.prod(self.shapes[name], dtype=np.int64)) * np.dtype(self.dtypes[name]).itemsize

    def _save(self) -> None:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())  # before the promise that they hold so many rows
        meta = {"about": self.about, "done": self.done, "rows": self._rows}
        write_text(self.folder / META, json.dumps(meta) + "\n")
        self._since_saved = 0
