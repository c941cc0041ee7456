"""Who is timed: saved SentenceTransformer folders, and the ways to run them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from .. import kernels_hagmoe, modeling_hagmoe, sentence
from ..configuration_hagmoe import HagMoeConfig
from ..files import new_folder
from ..modeling_hagmoe import HagMoeModel
from ..upcycling import upcycle

PARENT, MIXTURE = "parent", "mixture"


@dataclass(frozen=True)
class Contestant:
    """A model and how it runs.

    Attributes:
        name: In tables and plots.
        folder: A saved `SentenceTransformer`.
        experts: The experts implementation; the default one where None.
        as_stock: Whether the encoder computes padding and plain products, as stock encoders do.
        file_name: An exported file in the folder's `onnx`, for ONNX Runtime.
    """

    name: str
    folder: str
    experts: str | None = None
    as_stock: bool = False
    file_name: str | None = None

    def load(self) -> Any:
        """The `SentenceTransformer`, on CPU."""
        if self.file_name is not None:
            from ..graphs import load

            return load(self.folder, self.file_name, threads=torch.get_num_threads())
        options = {} if self.experts is None else {"experts_implementation": self.experts}
        return sentence.load(self.folder, device="cpu", model_kwargs=options)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run what is inside the block in this contestant's way."""
        if not self.as_stock:
            yield
            return
        ours = modeling_hagmoe.MOST_REAL, modeling_hagmoe.activate, kernels_hagmoe.FEW_TOKENS
        modeling_hagmoe.MOST_REAL = 0.0  # every batch counts as full: padding is computed
        modeling_hagmoe.activate = lambda act_fn, states: act_fn(states)
        kernels_hagmoe.FEW_TOKENS = range(0)
        try:
            yield
        finally:
            modeling_hagmoe.MOST_REAL, modeling_hagmoe.activate, kernels_hagmoe.FEW_TOKENS = ours


def line_up(
    parent: str | os.PathLike, work: str | os.PathLike, mixture: str | os.PathLike | None = None
) -> list[Contestant]:
    """The parent, a mixture of it in several ways, and nomic-embed-text-v2-moe's design at the parent's width.

    Args:
        parent: A dense `SentenceTransformer` folder.
        work: Folder for the models that are made here; those that are there already are used again.
        mixture: A mixture to time instead of the parent upcycled by the default recipe.

    Returns:
        The parent first, the mixture second.

    Raises:
        ValueError: `mixture` is none.
    """
    parent, work = str(parent), Path(work)
    if mixture is not None:
        config = AutoConfig.from_pretrained(mixture, subfolder=sentence.encoder_subfolder(str(mixture)))
        if config.model_type != HagMoeConfig.model_type:
            raise ValueError(f"mixture={str(mixture)!r} is a {config.model_type!r}; allowed: a HAG-MoE.")
    own = work / "mixture"
    if mixture is None and not own.is_dir():
        _save(upcycle(parent), own)
    folder = str(own if mixture is None else mixture)
    nomic = work / "nomic-design"
    if not nomic.is_dir():
        _save(nomic_design(parent), nomic)
    return [
        Contestant(PARENT, parent),
        Contestant(MIXTURE, folder),
        Contestant("mixture, grouped_mm experts", folder, "grouped_mm"),
        Contestant("mixture, as stock transformers (grouped_mm)", folder, "grouped_mm", as_stock=True),
        Contestant("nomic design, this package", str(nomic)),
        Contestant("nomic design, as stock transformers (grouped_mm)", str(nomic), "grouped_mm", as_stock=True),
        Contestant("nomic design, as stock transformers (eager)", str(nomic), "eager", as_stock=True),
    ]


def exported(file: Path) -> Contestant:
    """An ONNX file inside a `SentenceTransformer` folder, `FOLDER/onnx/FILE.onnx`.

    Raises:
        FileNotFoundError: There is no such file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is no file; allowed: an exported model, FOLDER/onnx/FILE.onnx.")
    return Contestant(f"mixture, ONNX Runtime ({file.stem})", str(file.parent.parent), file_name=file.name)


def nomic_design(parent: str) -> Any:
    """The parent with nomic-embed-text-v2-moe's feed-forward blocks, at random: top-2 of 8 full experts, every second layer.

    Source: arXiv 2502.07972; the checkpoint's config has moe_every_n_layers=2, num_experts=8, moe_top_k=2.
    """
    dense = sentence.load(parent, device="cpu")
    like_parent = sentence.encoder_of(upcycle(dense)).config.to_dict()
    layers = like_parent["num_hidden_layers"]
    config = HagMoeConfig.from_dict(
        like_parent
        | {
            "mlp_layer_types": ["sparse" if layer % 2 else "dense" for layer in range(layers)],
            "n_group": 1,
            "topk_group": 1,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "combine_rule": "softmax",
            "shared_expert_intermediate_size": 0,
            "moe_intermediate_size": like_parent["intermediate_size"],
        }
    )
    torch.manual_seed(0)
    return sentence.with_encoder(dense, HagMoeModel(config).eval(), "Random weights, for timing.")


def _save(model: Any, folder: Path) -> None:
    with new_folder(folder) as partial:
        model.save(str(partial), create_model_card=False)


__all__ = ["MIXTURE", "PARENT", "Contestant", "exported", "line_up", "nomic_design"]
