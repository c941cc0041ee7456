"""How good a model is: ranking held-out pairs while training, the kit's sets at the end.

Both in float32, as a user would run the model. The kit is scored by the package's own tasks in a process of its own, from
vectors recorded here, so that a GPU goes on training while CPUs fit classifiers and clusters.
"""

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import InputModule
from torch import Tensor

from ablation.inputs import Pairs
from ablation.routers import DOMAIN_OF_SET, EXPERT_OF_DOMAIN, FixedRouter, set_domain
from hagmoe_hf import HagMoeModel, sentence, upcycle
from hagmoe_hf.evaluation.kit import KitSet, find_sets
from hagmoe_hf.files import new_file
from hagmoe_hf.modeling_hagmoe import HagMoeRouter
from hagmoe_hf.training.monitor import max_violation

BATCH_SIZE = 64


@torch.inference_mode()
def dev_scores(model: SentenceTransformer, dev: Pairs) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Rank held-out positives, and look where the tokens go.

    Args:
        model: In eval mode.
        dev: Held-out pairs.

    Returns:
        Domain -> mean reciprocal rank of a pair's positive among the positives of its domain; and for every sparse layer
        with a learned router MaxVio of its experts and groups, and the information (nats) that a token's group (its expert,
        where there is one group) has about its domain.
    """
    encoder = sentence.encoder_of(model)
    counted: dict[str, list[Tensor]] = {}  # layer -> for each domain (E,) choices
    domain_number = 0

    def count(name: str, index: Tensor, num_experts: int) -> None:
        counts = counted.setdefault(name, [torch.zeros(num_experts + 1) for _ in dev.domains])
        counts[domain_number] += torch.bincount(index.flatten(), minlength=num_experts + 1).cpu()

    routers = {name.split(".")[1]: module for name, module in encoder.named_modules() if isinstance(module, HagMoeRouter)}
    hooks = [
        router.register_forward_hook(
            lambda module, _, routing, n=name: count(n, routing.expert_index, module.config.num_experts)
        )
        for name, router in routers.items()
    ]
    ranks = {}
    for domain_number, domain in enumerate(dev.domains):
        if domain in EXPERT_OF_DOMAIN:
            set_domain(encoder, domain)
        rows = np.arange(*dev.first_rows[domain_number : domain_number + 2])
        anchors, positives = _vectors(model, dev, rows)
        similarity = anchors @ positives.T
        rank = (similarity > similarity.diagonal()[:, None]).sum(-1) + 1
        ranks[domain] = float((1 / rank).mean())
    for hook in hooks:
        hook.remove()
    return ranks, {name: _routing(torch.stack(counted[name]), routers[name].config.n_group) for name in counted}


def _vectors(model: SentenceTransformer, pairs: Pairs, rows: np.ndarray) -> list[Tensor]:
    """Unit vectors (rows, D) of anchors and of positives."""
    columns: list[list[Tensor]] = [[], []]
    for first in range(0, len(rows), BATCH_SIZE):
        for column, features in zip(columns, pairs.features(rows[first : first + BATCH_SIZE]), strict=True):
            column.append(torch.nn.functional.normalize(model(features)["sentence_embedding"], dim=-1))
    return [torch.cat(column) for column in columns]


def _routing(counts_SE: Tensor, groups: int) -> dict[str, float]:
    """Figures of one layer from (domains, E + 1) choices, padding last."""
    counts_SE = counts_SE[:, :-1]
    counts_SG = counts_SE if groups == 1 else counts_SE.unflatten(-1, (groups, -1)).sum(-1)
    joint = counts_SG / counts_SG.sum()
    independent = joint.sum(0, keepdim=True) * joint.sum(1, keepdim=True)
    information = torch.where(joint > 0, joint * (joint / independent.clamp(min=1e-12)).clamp(min=1e-12).log(), 0.0).sum()
    violation = {
        name: float(max_violation(c.sum(0)[None])[0]) for name, c in (("experts", counts_SE), ("groups", counts_SG))
    }
    return {
        "max_vio_experts": violation["experts"],
        "max_vio_groups": violation["groups"],
        "information": float(information),
    }


class RecordedVectors(InputModule):
    """A SentenceTransformer module that knows the vectors of certain texts.

    Args:
        texts: Different from each other.
        vectors: (texts, D) float32.
    """

    def __init__(self, texts: list[str], vectors: Tensor):
        super().__init__()
        self.row = {text: row for row, text in enumerate(texts)}
        self.register_buffer("vectors", vectors)
        self.tokenizer = SimpleNamespace(get_vocab=dict)  # there is none; a fingerprint asks for its words

    def preprocess(self, inputs: list[str], prompt: str | None = None, **kwargs) -> dict[str, Tensor]:
        """Texts -> their rows.

        Raises:
            KeyError: A text was not recorded.
        """
        return {"row": torch.tensor([self.row[(prompt or "") + text] for text in inputs])}

    def forward(self, features: dict[str, Tensor], **kwargs) -> dict[str, Tensor]:
        """Rows -> vectors."""
        return {**features, "sentence_embedding": self.vectors[features["row"]]}

    def get_embedding_dimension(self) -> int:
        """D."""
        return self.vectors.shape[1]

    def save(self, output_path: str, *args, **kwargs) -> None:
        """Never needed: it is made of a file already."""


def kit_sets(folder: Path) -> list[KitSet]:
    """The sets of a kit that the score's table knows; a set that it does not know is an error.

    Raises:
        ValueError: The true domain of a set is not stated in `DOMAIN_OF_SET`.
    """
    sets = list(find_sets(folder))
    for kit_set in sets:
        if _task_name(kit_set) not in DOMAIN_OF_SET:
            raise ValueError(f"{kit_set.key} has no domain; allowed: those of DOMAIN_OF_SET in {set_domain.__module__}.")
    return sets


def _task_name(kit_set: KitSet) -> str:
    return f"{kit_set.kind}.{kit_set.name}"


def set_texts(kit_set: KitSet) -> list[str]:
    """Every text of a set once."""
    found: dict[str, None] = {}

    def see(values: Iterable) -> None:
        for value in values:
            if isinstance(value, str):
                found[value] = None
            elif isinstance(value, list):
                see(value)

    for rows in kit_set.read().values():
        for row in rows:
            see(value for field, value in row.items() if field not in ("_id", "query-id", "corpus-id", "label", "lang"))
    return list(found)


def record(model: SentenceTransformer, sets: list[KitSet], path: Path) -> None:
    """Write the vectors of every text of every set; a text in two sets is encoded once, unless its domain routes it."""
    if model.device.type == "cpu" and not isinstance(sentence.encoder_of(model), HagMoeModel):
        model = upcycle(model)  # the same vectors, and on a CPU much sooner: a mixture computes no padding
    model.eval()
    is_routed = any(isinstance(module, FixedRouter) for module in model.modules())
    known: dict[str, np.ndarray] = {}
    arrays = {}
    for kit_set in sets:
        texts = set_texts(kit_set)
        if is_routed:
            set_domain(sentence.encoder_of(model), DOMAIN_OF_SET[_task_name(kit_set)])
            known = {}
        new = [text for text in texts if text not in known]
        if new:
            vectors = model.encode(new, batch_size=256, convert_to_numpy=True, show_progress_bar=False)
            known.update(zip(new, vectors.astype(np.float32), strict=True))
        arrays[_task_name(kit_set)] = np.stack([known[text] for text in texts])
    with new_file(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def score_recorded(kit: Path, vectors: Path, label: str) -> dict[str, dict]:
    """Scores of recorded vectors by the tasks of `hagmoe evaluate`.

    Args:
        kit: Folder of the sets.
        vectors: What `record` wrote.
        label: What messages call the model.

    Returns:
        Task name -> `{"score": 0 to 1, "languages": {language: score}}`.

    Raises:
        ImportError: mteb is missing.
    """
    from hagmoe_hf.evaluation.models import candidate
    from hagmoe_hf.evaluation.runner import score_models
    from hagmoe_hf.evaluation.tasks import local_task

    results = {}
    with np.load(vectors) as file:
        for kit_set in kit_sets(kit):
            name = _task_name(kit_set)
            model = SentenceTransformer(
                modules=[RecordedVectors(set_texts(kit_set), torch.from_numpy(file[name]))], device="cpu"
            )
            score = score_models([candidate(model, label)], [local_task(kit_set)], vectors.with_suffix(""), batch_size=1024)[
                0
            ][name]
            results[name] = {"score": score.score, "languages": dict(score.languages)}
    return results
