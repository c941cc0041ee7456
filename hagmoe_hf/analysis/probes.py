"""What routing alone does not show: who weighs in the attention gate, what experts compute, and who would be missed.

Axes:  L tokens of a text   S sparse layers   T sampled tokens   K experts per token   E experts   D hidden_size
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from tqdm.auto import tqdm

from .. import sentence
from ..modeling_hagmoe import HagMoeModel, HagMoeRouter, HagMoeSparseMLP
from ..ngrams_hagmoe import spell_ngrams
from .trace import prompt_of, sparse_encoder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

NEVER = -1e9  # a bias that no probability outweighs; finite, so that the closed groups stay below it


@dataclass(frozen=True)
class TokenView:
    """One text, token by token.

    Attributes:
        tokens: L pieces, as the tokenizer has them.
        expert_index: (S, L) int64, the most probable expert chosen.
        gate_weight: (S, L) float32, the attention gate's weights, which sum to 1; None where groups are not opened by text.
    """

    tokens: tuple[str, ...]
    expert_index: np.ndarray
    gate_weight: np.ndarray | None


@dataclass(frozen=True)
class LearnedNgram:
    """What a memory learned of one n-gram.

    Attributes:
        text: As the tokenizer reads it back.
        shift: Length of what it adds to an embedding.
        count: How often it occurred in the texts that the memory was made from.
    """

    text: str
    shift: float
    count: int


@torch.no_grad()
def strongest_ngrams(model: "SentenceTransformer", most: int = 40) -> list[LearnedNgram]:
    """The n-grams whose rows moved furthest, the furthest first; none where there is no memory.

    Args:
        model: A `SentenceTransformer` around a HAG-MoE.
        most: How many at most; those that never moved are left out.
    """
    memory = cast(HagMoeModel, sentence.encoder_of(model)).ngram_memory
    if memory is None:
        return []
    shifts = memory.rows[1:].float().norm(dim=-1) * memory.config.ngram_memory_scale
    order = shifts.sort(descending=True, stable=True).indices[:most].tolist()
    spelled = spell_ngrams(memory.names)
    return [
        LearnedNgram(model.tokenizer.decode(list(spelled[row])), float(shifts[row]), int(memory.counts[row]))
        for row in order
        if shifts[row] > 0
    ]


@torch.inference_mode()
def token_views(model: "SentenceTransformer", texts: list[str], *, prompt: str | None = None) -> list[TokenView]:
    """Look at a few texts closely, one by one.

    Args:
        model: A `SentenceTransformer` around a HAG-MoE.
        texts: Truncated as the model truncates them.
        prompt: Put before each text; the model's default prompt where None.

    Raises:
        ValueError: The model has no sparse layers.
    """
    encoder = sparse_encoder(model)
    views = []
    for text in texts:
        weights: list[np.ndarray] = []
        hooks = [
            block.router.register_forward_pre_hook(partial(_see_gate, weights))
            for _, block in sparse_blocks(encoder)
            if block.router.attention_query is not None
        ]
        try:
            features = model.preprocess([text], prompt=prompt_of(model, prompt))
            input_ids = features["input_ids"].to(encoder.device)
            output = encoder(input_ids=input_ids, output_expert_index=True)
        finally:
            for hook in hooks:
                hook.remove()
        tokens = tuple(model.tokenizer.convert_ids_to_tokens(input_ids[0].tolist()))
        index = np.stack([layer[:, 0].cpu().numpy() for layer in output.expert_index or ()])
        views.append(TokenView(tokens, index, np.stack(weights) if weights else None))
    return views


def _see_gate(weights: list[np.ndarray], router: HagMoeRouter, inputs: tuple) -> None:
    """Before a router's forward pass over one text: the weights of `routing_hagmoe.attention_pool`."""
    states = (inputs[0] if inputs[3] is None else inputs[3]).float()
    scores = states @ cast(torch.Tensor, router.attention_query).float() * states.shape[-1] ** -0.5
    weights.append(scores.softmax(dim=-1)[0].cpu().numpy())


def sparse_blocks(encoder: HagMoeModel) -> list[tuple[int, HagMoeSparseMLP]]:
    """Layer index and block of every sparse layer."""
    return [(layer, encoder.layers[layer].mlp) for layer in encoder.config.sparse_layers]  # type: ignore[misc]


@torch.inference_mode()
def expert_outputs(
    model: "SentenceTransformer", texts: list[str], *, max_tokens: int = 512, seed: int = 0, prompt: str | None = None
) -> list[np.ndarray]:
    """Give every expert of a layer the same tokens, whoever they were routed to.

    Args:
        model: A `SentenceTransformer` around a HAG-MoE.
        texts: Encoded in one batch; a few dozen are enough.
        max_tokens: T, a random sample of their real tokens.
        seed: Of the sample.
        prompt: Put before each text; the model's default prompt where None.

    Returns:
        For each sparse layer (E, T, D) float32 outputs, without the shared expert's.

    Raises:
        ValueError: The model has no sparse layers.
    """
    encoder = sparse_encoder(model)
    blocks = [block for _, block in sparse_blocks(encoder)]
    inputs: list[torch.Tensor] = []
    hooks = [block.register_forward_pre_hook(partial(_see_states, inputs)) for block in blocks]
    try:
        features = model.preprocess(texts, prompt=prompt_of(model, prompt))
        encoder(**{name: value.to(encoder.device) for name, value in features.items() if torch.is_tensor(value)})
    finally:
        for hook in hooks:
            hook.remove()
    chosen = torch.randperm(len(inputs[0]), generator=torch.Generator().manual_seed(seed))[:max_tokens].to(inputs[0].device)
    outputs = []
    for block, states in zip(blocks, inputs, strict=True):
        states_TD = states[chosen]
        weight = torch.ones(len(chosen), 1, dtype=states.dtype, device=states.device)
        index = torch.zeros(len(chosen), 1, dtype=torch.long, device=states.device)
        experts = [block.experts(states_TD, index + expert, weight) for expert in range(encoder.config.num_experts)]
        outputs.append(torch.stack(experts).float().cpu().numpy())
    return outputs


def _see_states(seen: list[torch.Tensor], block: HagMoeSparseMLP, inputs: tuple) -> None:
    """Before a sparse block's forward pass: the (T, D) states of its real tokens; the model may have left padding out."""
    states, token_mask = inputs[:2]
    seen.append(states.flatten(0, 1) if token_mask is None else states[token_mask])


@contextmanager
def without_expert(model: "SentenceTransformer", layer: int, expert: int) -> Iterator[None]:
    """Take an expert out while the block runs: its tokens go to the next best one that their group allows.

    Args:
        model: A `SentenceTransformer` around a HAG-MoE.
        layer: Index of a sparse layer.
        expert: 0 to E - 1.

    Raises:
        ValueError: No such layer or expert, or tokens need all experts of their open groups.

    Source: pruning without retraining as in arXiv 2402.14800, one expert at a time.
    """
    encoder = sparse_encoder(model)
    config = encoder.config
    if layer not in config.sparse_layers or not 0 <= expert < config.num_experts:
        raise ValueError(
            f"layer={layer}, expert={expert} is not possible; allowed: layers {config.sparse_layers}, experts 0 to "
            f"{config.num_experts - 1}."
        )
    router = dict(sparse_blocks(encoder))[layer].router
    per_group, open_groups, taken = config.experts_per_group, config.topk_group, config.num_experts_per_tok
    has_spare = open_groups < config.n_group if per_group == 1 else taken < open_groups * per_group
    if not has_spare:
        raise ValueError(
            f"num_experts_per_tok={taken} of {open_groups} open groups of {per_group}: none can be taken out; allowed: "
            "routers with an expert to spare."
        )
    # The bias of a group of one takes the whole group out; it is used for choosing only, as is an expert's
    bias = router.group_bias if per_group == 1 else router.expert_bias
    assert bias is not None
    before = bias.clone()
    try:
        bias[expert] = NEVER
        yield
    finally:
        bias.copy_(before)


def importance(
    model: "SentenceTransformer", score: Callable[["SentenceTransformer"], float], *, show_progress_bar: bool = False
) -> tuple[float, np.ndarray]:
    """How much a score falls when one expert is taken out.

    Args:
        model: A `SentenceTransformer` around a HAG-MoE.
        score: Of a model; larger is better.
        show_progress_bar: Whether to show one, a step per expert and layer.

    Returns:
        The whole model's score, and (S, E) float64 what is lost without each expert.

    Raises:
        ValueError: As `without_expert`.
    """
    config = sparse_encoder(model).config
    whole = score(model)
    lost = np.zeros((len(config.sparse_layers), config.num_experts))
    cases = [(row, layer, expert) for row, layer in enumerate(config.sparse_layers) for expert in range(config.num_experts)]
    for row, layer, expert in tqdm(cases, desc="Masking", unit="expert", disable=not show_progress_bar):
        with without_expert(model, layer, expert):
            lost[row, expert] = whole - score(model)
    return whole, lost
