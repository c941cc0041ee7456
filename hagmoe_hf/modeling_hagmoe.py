"""Every module of a HAG-MoE: embeddings, attention, dense and sparse feed-forward blocks, the encoder, its heads.

This file travels to the Hub beside the weights, so it imports nothing but torch, transformers (with the safetensors it
always brings) and its three siblings.
transformers looks for `@use_experts_implementation` in the source of the model's own file: the experts must stay here.

Axes:  B sequences   L tokens   D hidden_size   G groups   E experts   K experts per token   I moe_intermediate_size
       S sequences of a packed batch, which lie one after the other in the rows of (B, L)
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    find_packed_sequence_indices,
    packed_sequence_mask_function,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import cached_file
from transformers.utils.generic import (
    can_return_tuple,
    is_flash_attention_requested,
    maybe_autocast,
    merge_with_config_defaults,
)
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_hagmoe import HagMoeConfig
from .kernels_hagmoe import activate, is_traced, linear, run_experts
from .ngrams_hagmoe import NEVER, ngram_rows
from .routing_hagmoe import (
    Packing,
    RealTokens,
    Routing,
    attention_pool,
    attention_pool_packed,
    follows_in_text,
    load_balancing_loss,
    route,
)

BALANCING_BIASES = "balancing_biases.safetensors"  # beside adapters
MOST_REAL = 0.9  # share of real tokens in a batch, above which leaving out its padding costs more than it saves


@dataclass
class HagMoeModelOutput(ModelOutput):
    """What a [`HagMoeModel`] returns.

    Args:
        last_hidden_state: (B, L, D), zero at padding.
        pooler_output: (B, D), (S, D) for packed input: the state of each text's first token through a dense layer and
            tanh; None without a pooler.
        hidden_states: On request, (B, L, D) after the embeddings and after each layer.
        attentions: On request, (B, heads, L, L) for each layer.
        router_logits: On request, (B*L, E) float32 for each sparse layer: log P(expert) before top-k.
        expert_index: On request, (B*L, K) int64 for each sparse layer: the experts chosen, E at padding.
    """

    last_hidden_state: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    expert_index: tuple[torch.LongTensor, ...] | None = None


@dataclass
class HagMoeMaskedLMOutput(ModelOutput):
    """What a [`HagMoeForMaskedLM`] returns: `loss`, `logits` (B, L, vocab_size), `aux_loss` with router logits, the rest."""

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    aux_loss: Tensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    expert_index: tuple[torch.LongTensor, ...] | None = None


@dataclass
class HagMoeSequenceClassifierOutput(ModelOutput):
    """What a [`HagMoeForSequenceClassification`] returns: as [`HagMoeMaskedLMOutput`], with `logits` (B, labels)."""

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    aux_loss: Tensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    expert_index: tuple[torch.LongTensor, ...] | None = None


@dataclass
class HagMoeTokenClassifierOutput(ModelOutput):
    """What a [`HagMoeForTokenClassification`] returns: `loss` (with labels), `logits` (B, L, labels), and the rest."""

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    aux_loss: Tensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    expert_index: tuple[torch.LongTensor, ...] | None = None


@dataclass
class HagMoeQuestionAnsweringOutput(ModelOutput):
    """What a [`HagMoeForQuestionAnswering`] returns: `loss` (with labels), both logits (B, L), and the rest."""

    loss: torch.FloatTensor | None = None
    start_logits: torch.FloatTensor | None = None
    end_logits: torch.FloatTensor | None = None
    aux_loss: Tensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    expert_index: tuple[torch.LongTensor, ...] | None = None


@dataclass
class HagMoeMultipleChoiceOutput(ModelOutput):
    """What a [`HagMoeForMultipleChoice`] returns: `loss` (with labels), `logits` (B, choices), and the rest."""

    loss: Tensor | None = None
    logits: torch.FloatTensor | None = None
    aux_loss: Tensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    expert_index: tuple[torch.LongTensor, ...] | None = None


class HagMoeLayerNorm(nn.LayerNorm):
    """A layer norm with the config's epsilon, and a bias where the config wants one."""

    def __init__(self, config: HagMoeConfig):
        super().__init__(config.hidden_size, eps=config.layer_norm_eps, bias=config.norm_bias)


class HagMoeEmbeddings(nn.Module):
    """Word, token type and learned position embeddings, as far as the config has them, summed and normed."""

    def __init__(self, config: HagMoeConfig):
        super().__init__()
        self.position_offset = config.position_offset
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = self.token_type_embeddings = None
        if config.position_embedding_type == "absolute":
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        if config.type_vocab_size:
            self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = HagMoeLayerNorm(config)
        dropout = config.hidden_dropout_prob if config.embedding_dropout is None else config.embedding_dropout
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs_embeds: Tensor, token_type_ids: Tensor, position_ids: Tensor) -> Tensor:
        """(B, L, D) word embeddings -> (B, L, D) input of the first layer; positions count from 0 in each text."""
        embeddings = inputs_embeds
        if self.token_type_embeddings is not None:
            embeddings = embeddings + self.token_type_embeddings(token_type_ids)
        if self.position_embeddings is not None:
            embeddings = embeddings + self.position_embeddings(position_ids + self.position_offset)
        return self.dropout(self.norm(embeddings))


class HagMoeNgramMemory(nn.Module):
    """A row for every n-gram that is frequent in the user's texts, added to the embedding of the token where it ends.

    Rows start at 0, and an n-gram that is not known adds nothing. One whose count is 0 is only the beginning of others: its
    row stays 0.

    Source: n-gram embeddings, arXiv 2502.01637 (SCONE); a memory that is looked up instead of computed, arXiv 2412.09764.
    """

    def __init__(self, config: HagMoeConfig):
        super().__init__()
        self.config = config
        self.names: Tensor
        self.counts: Tensor
        self.register_buffer("names", torch.empty(config.ngram_memory_size, dtype=torch.int64))
        self.register_buffer("counts", torch.empty(config.ngram_memory_size, dtype=torch.int64))
        self.rows = nn.Parameter(torch.empty(config.ngram_memory_size + 1, config.hidden_size))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """Refuse names that weights were averaged with: float32 cannot hold them, and a mean of names names nothing."""
        for name in ("names", "counts"):
            given = state_dict.get(prefix + name)
            if given is not None and given.is_floating_point():
                raise ValueError(f"{prefix}{name} is {given.dtype}; allowed: torch.int64, as it is in each of these models.")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, input_ids: Tensor, follows: Tensor) -> Tensor:
        """(B, L) ids -> (B, L, D); `follows` (B, L) bool says which tokens directly follow another one of their text."""
        row = self.rows_at(input_ids, follows)
        states = (F.embedding(row, self.rows, padding_idx=0) * (row > 0).unsqueeze(-1)).sum(dim=0)
        if not torch.is_grad_enabled():
            return states * self.config.ngram_memory_scale
        # Only forward: Adam divides by a gradient's size in any case, and the norm that it is clipped by must not grow
        return states + states.detach() * (self.config.ngram_memory_scale - 1)

    def rows_at(self, input_ids: Tensor, follows: Tensor) -> Tensor:
        """As `forward` -> (order, B, L) int64, the rows of the n-grams that end at each token; 0 for none that learns."""
        # All lengths at once, since a query's time goes into small operations
        found = torch.stack(ngram_rows(input_ids, follows, self.names, self.config.ngram_memory_order, is_traced()))
        return found * (self.counts[(found - 1).clamp(min=0)] > 0)


class HagMoeRotaryEmbedding(nn.Module):
    """Rotary positions (arXiv 2104.09864), one set of frequencies for each type of attention layer."""

    def __init__(self, config: HagMoeConfig):
        super().__init__()
        self.config = config
        self.attention_scaling = {}
        for layer_type in config.rope_parameters or {}:
            frequencies, self.attention_scaling[layer_type] = self.frequencies(layer_type)
            self.register_buffer(f"{layer_type}_inv_freq", frequencies, persistent=False)

    def frequencies(self, layer_type: str) -> tuple[Tensor, float]:
        """Inverse frequencies (head_dim / 2,) float32 of a layer type, and the factor on its cosines and sines."""
        parameters = cast(dict, self.config.rope_parameters)[layer_type]
        if parameters["rope_type"] != "default":
            return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](self.config, layer_type=layer_type)
        width = self.config.hidden_size // self.config.num_attention_heads
        return 1.0 / (parameters["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)), 1.0

    def _apply(self, fn, recurse=True):
        """Move with the model, but stay float32: in bfloat16 a late position would be off by whole radians."""
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():
            if buffer.dtype != torch.float32 and not buffer.is_meta:
                frequencies, _ = self.frequencies(name.removesuffix("_inv_freq"))
                setattr(self, name, frequencies.to(buffer.device))
        return self

    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Positions (1 or B, L) -> for each layer type cosines and sines (1 or B, L, 1, head_dim) in the states' dtype."""
        rotations = {}
        with torch.no_grad(), maybe_autocast(device_type=hidden_states.device.type, enabled=False):
            for layer_type, scaling in self.attention_scaling.items():
                angles = position_ids.unsqueeze(-1).float() * self.get_buffer(f"{layer_type}_inv_freq").float()
                angles = torch.cat((angles, angles), dim=-1).unsqueeze(2)
                cosines, sines = angles.cos() * scaling, angles.sin() * scaling
                rotations[layer_type] = (cosines.to(hidden_states.dtype), sines.to(hidden_states.dtype))
        return rotations


def rotate(states: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the halves of (B, L, heads, head_dim) queries or keys against each other, in float32 as ModernBERT does."""
    cosines, sines = rotation
    first, second = states.float().chunk(2, dim=-1)
    return (states.float() * cosines + torch.cat((-second, first), dim=-1) * sines).to(states.dtype)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Plain attention over (B, heads, L, head_dim), as stock BERT computes it; also returns its weights."""
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.dropout(weights.softmax(dim=-1), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class HagMoeLinear(nn.Linear):
    """A linear map that computes a short query faster on CPU."""

    def __init__(self, in_features: int, out_features: int, bias: bool, feeds_linear: bool = False):
        super().__init__(in_features, out_features, bias=bias)
        self.feeds_linear = feeds_linear

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(hidden_states, self.weight, self.bias, feeds_linear=self.feeds_linear)


class HagMoeAttention(nn.Module):
    """Bidirectional multi-head self-attention through the attention function that the config names."""

    def __init__(self, config: HagMoeConfig, layer_type: str):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        # Flash attention counts the token itself, the masks of the other functions do not
        slides = layer_type == "sliding_attention"
        self.sliding_window = cast(int, config.sliding_window) + 1 if slides else None
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)
        self.o_proj = HagMoeLinear(config.hidden_size, config.hidden_size, bias=config.attention_bias)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any,
        rotation: tuple[Tensor, Tensor] | None = None,
        real_tokens: RealTokens | None = None,
        **flash_kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) -> (B, L, D) and, where the attention function computes them, weights (B, heads, L, L).

        With `real_tokens`, (1, T, D) -> (1, T, D), and one mask for each part of the batch that attention runs on.
        """
        heads_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads_shape)
        key = self.k_proj(hidden_states).view(heads_shape)
        value = self.v_proj(hidden_states).view(heads_shape)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        if real_tokens is None:
            output, weights = self._attend(query, key, value, attention_mask, **flash_kwargs)
        else:
            parts = zip(*map(real_tokens.split, (query, key, value)), attention_mask, strict=True)
            output, weights = real_tokens.join([self._attend(*part, **flash_kwargs)[0] for part in parts]), None
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **flash_kwargs
    ) -> tuple[Tensor, Tensor | None]:
        """The attention function on (B, L, heads, head_dim) each: the same shape, and weights where it has them."""
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        return attention(
            self,
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attention_mask,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **flash_kwargs,
        )


class HagMoeMLP(nn.Module):
    """A dense feed-forward block: a whole layer's, or the shared expert of a sparse one."""

    def __init__(self, config: HagMoeConfig, intermediate_size: int):
        super().__init__()
        self.is_gated = config.gated_mlp
        if self.is_gated:
            self.gate_up_proj = HagMoeLinear(config.hidden_size, 2 * intermediate_size, config.mlp_bias, feeds_linear=True)
        else:
            self.up_proj = HagMoeLinear(config.hidden_size, intermediate_size, config.mlp_bias, feeds_linear=True)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = HagMoeLinear(intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        projection = self.gate_up_proj if self.is_gated else self.up_proj
        states = projection(hidden_states)
        gate, up = states.chunk(2, dim=-1) if self.is_gated else (states, None)
        # A hook may have kept the states, and wants them as they were
        inner = self.act_fn(gate) if projection._forward_hooks else activate(self.act_fn, gate)
        return self.down_proj(inner if up is None else inner * up)


class HagMoeGate(nn.Linear):
    """A linear map to logits, in float32 whatever the dtype of the model: rounding here would change who is chosen."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) float32 -> (..., out_features) float32."""
        return F.linear(hidden_states, self.weight.float())


class HagMoeRouter(nn.Module):
    """The attention gate, the group gate and the expert gate; only those that the configuration needs exist."""

    def __init__(self, config: HagMoeConfig):
        super().__init__()
        self.config = config
        self.attention_query = None
        self.group_gate = None
        self.expert_gate = None
        # The biases balance the choice without touching weights or gradients; RouterCallback moves them while training
        self.group_bias: Tensor | None
        self.expert_bias: Tensor | None
        has_groups, has_choice = config.n_group > 1, config.experts_per_group > 1
        zeros = partial(torch.zeros, dtype=torch.float32)  # also in a model that is built in half precision
        self.register_buffer("group_bias", zeros(config.n_group) if has_groups else None)
        self.register_buffer("expert_bias", zeros(config.num_experts) if has_choice else None)
        if has_groups and config.group_routing == "sequence":
            self.attention_query = nn.Parameter(torch.empty(config.hidden_size))
        if has_groups:
            self.group_gate = HagMoeGate(config.hidden_size, config.n_group, bias=False)
        if has_choice:
            self.expert_gate = HagMoeGate(config.hidden_size, config.num_experts, bias=False)

    def _apply(self, fn, recurse=True):
        """Move with the model, but leave the balancing biases float32: half precision would lose the steps they move by."""
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, bias in exact.items():
            moved = self.get_buffer(name)
            if bias.dtype == torch.float32 != moved.dtype:
                setattr(self, name, bias.to(moved.device))
        return self

    def forward(
        self,
        hidden_states: Tensor,
        token_mask: Tensor | None,
        packing: Packing | None = None,
        group_states: Tensor | None = None,
    ) -> Routing:
        """Route (B, L, D) hidden states; `token_mask` (B, L) bool is True at real tokens, None when all are.

        Groups are chosen from `group_states` (B, L, D) where they are given.
        """
        config = self.config
        with maybe_autocast(device_type=hidden_states.device.type, enabled=False):
            states = hidden_states.float()
            group_logits = expert_logits = None
            if self.group_gate is not None:
                seen = states if group_states is None else group_states.float()
                group_logits = self.group_gate(self._group_input(seen, token_mask, packing))
            if self.expert_gate is not None:
                expert_logits = self.expert_gate(states)
            elif group_logits is not None:
                group_logits = group_logits.expand(-1, states.shape[1], -1)
            return route(
                group_logits,
                expert_logits,
                token_mask,
                group_bias=None if self.group_bias is None else self.group_bias.float(),
                expert_bias=None if self.expert_bias is None else self.expert_bias.float(),
                topk_group=config.topk_group,
                top_k=config.num_experts_per_tok,
                combine_rule=config.combine_rule,
                dtype=hidden_states.dtype,
            )

    def _group_input(self, states: Tensor, token_mask: Tensor | None, packing: Packing | None) -> Tensor:
        """What the group gate sees: (B, 1, D), one summary for the sequence, or (B, L, D), each token itself.

        In packed input, too, a token stands for itself, or for its own sequence's summary.
        """
        if self.attention_query is None:
            return states
        if packing is not None:
            return attention_pool_packed(states, self.attention_query.float(), packing)
        return attention_pool(states, self.attention_query.float(), token_mask).unsqueeze(1)


@use_experts_implementation(has_gate=False, has_bias=True)
class HagMoeExperts(nn.Module):
    """The routed experts' weights, stacked, behind transformers' experts interface (eager, grouped_mm, batched_mm, ...)."""

    def __init__(self, config: HagMoeConfig):
        super().__init__()
        self.num_experts = config.num_experts
        width = cast(int, config.moe_intermediate_size)
        self.up_name = "gate_up_proj" if config.gated_mlp else "up_proj"
        up_width = 2 * width if config.gated_mlp else width
        stacks = {self.up_name: (up_width, config.hidden_size), f"{self.up_name}_bias": (up_width,)}
        stacks |= {"down_proj": (config.hidden_size, width), "down_proj_bias": (config.hidden_size,)}
        for name, shape in stacks.items():
            if config.mlp_bias or not name.endswith("_bias"):
                self.register_parameter(name, nn.Parameter(torch.empty(config.num_experts, *shape)))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The eager implementation, one expert after the other.

        `unbind` once instead of `weight[e]` in the loop: the backward of each such slice would allocate a zero tensor of
        the whole stack. An expert without tokens stays in the graph, or DDP would wait for its gradient.

        Args:
            hidden_states: (B*L, D).
            top_k_index: (B*L, K) int64, `num_experts` for "no expert".
            top_k_weights: (B*L, K).

        Returns:
            (B*L, D), the weighted sum over each token's experts.
        """
        output = torch.zeros_like(hidden_states)
        names = (self.up_name, f"{self.up_name}_bias", "down_proj", "down_proj_bias")
        no_bias = (None,) * self.num_experts
        stacks = (getattr(self, name).unbind(0) if hasattr(self, name) else no_bias for name in names)
        for expert, (up, up_bias, down, down_bias) in enumerate(zip(*stacks, strict=True)):
            token, slot = torch.where(top_k_index == expert)
            inner = F.linear(hidden_states[token], up, up_bias)
            inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)  # type: ignore[operator]
            expert_output = F.linear(inner, down, down_bias)
            expert_output = expert_output * top_k_weights[token, slot].unsqueeze(-1)
            output.index_add_(0, token, expert_output.to(output.dtype))
        return output


class HagMoeSparseMLP(nn.Module):
    """A feed-forward block of a shared expert, which every token passes, and routed experts.

    The output bias is added once: by the shared expert, or by the block itself where there is none.
    """

    def __init__(self, config: HagMoeConfig):
        super().__init__()
        self.router = HagMoeRouter(config)
        self.experts = HagMoeExperts(config)
        self.experts.has_gate = config.gated_mlp  # type: ignore[assignment]
        self.experts.has_bias = config.mlp_bias  # type: ignore[assignment]
        # The flag makes the stock implementations understand expert id `num_experts` as "no expert": padding costs nothing
        self.experts._is_expert_parallel = True  # type: ignore[assignment]
        # RouterCallback sets it while training, to (output, routing, packing) -> output: it counts, adds balance gradients
        self.routing_observer: Callable[[Tensor, Routing, Packing | None], Tensor] | None = None
        self.shared_expert = self.output_bias = None
        if config.shared_expert_intermediate_size:
            self.shared_expert = HagMoeMLP(config, config.shared_expert_intermediate_size)
        elif config.mlp_bias:
            self.output_bias = nn.Parameter(torch.empty(config.hidden_size))

    def __getstate__(self) -> dict:
        """Copies and pickles leave the observer behind: it knows the trainer, which cannot be pickled."""
        return {**self.__dict__, "routing_observer": None}

    def forward(
        self,
        hidden_states: Tensor,
        token_mask: Tensor | None,
        packing: Packing | None = None,
        group_states: Tensor | None = None,
    ) -> Tensor:
        """(B, L, D) -> (B, L, D); `token_mask` (B, L) bool is True at real tokens, None when all are."""
        routing = self.router(hidden_states, token_mask, packing, group_states)
        flat_states = hidden_states.reshape(-1, hidden_states.shape[-1])  # (B*L, D)
        held = self.router.config.experts_per_group if self.router.config.preserve_first_group else 0
        routed = run_experts(self.experts, flat_states, routing.expert_index, routing.expert_weight, held)
        routed = routed.view_as(hidden_states)
        common = self.output_bias if self.shared_expert is None else self.shared_expert(hidden_states)
        output = routed if common is None else routed + common
        if self.training and self.routing_observer is not None:
            output = self.routing_observer(output, routing, packing)
        return output


class HagMoeLayer(GradientCheckpointingLayer):
    """Attention and a feed-forward block with dropout and residual sums; norms follow the sums, or precede the blocks."""

    def __init__(self, config: HagMoeConfig, layer_idx: int):
        super().__init__()
        self.is_sparse = layer_idx in config.sparse_layers
        self.norms_first = config.norm_placement == "pre"
        self.layer_type = cast(list, config.layer_types)[layer_idx]
        self.attention = HagMoeAttention(config, self.layer_type)
        # The embeddings come normed, so ModernBERT has no norm before its first attention
        is_normed = self.norms_first and layer_idx == 0
        self.attention_norm = nn.Identity() if is_normed else HagMoeLayerNorm(config)
        self.mlp = HagMoeSparseMLP(config) if self.is_sparse else HagMoeMLP(config, config.intermediate_size)
        self.mlp_norm = HagMoeLayerNorm(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.mlp_dropout = nn.Dropout(config.hidden_dropout_prob if config.mlp_dropout is None else config.mlp_dropout)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any,
        token_mask: Tensor | None,
        rotation: tuple[Tensor, Tensor] | None = None,
        packing: Packing | None = None,
        real_tokens: RealTokens | None = None,
        group_states: Tensor | None = None,
        **flash_kwargs,
    ) -> Tensor:
        """(B, L, D) -> (B, L, D). `attention_mask` is whatever the attention function wants, `token_mask` (B, L) bool."""
        attention_input = self.attention_norm(hidden_states) if self.norms_first else hidden_states
        attention_output, _ = self.attention(attention_input, attention_mask, rotation, real_tokens, **flash_kwargs)
        hidden_states = hidden_states + self.dropout(attention_output)
        if not self.norms_first:
            hidden_states = self.attention_norm(hidden_states)
        mlp_input = self.mlp_norm(hidden_states) if self.norms_first else hidden_states
        mlp_output = self.mlp(mlp_input, token_mask, packing, group_states) if self.is_sparse else self.mlp(mlp_input)
        hidden_states = hidden_states + self.mlp_dropout(mlp_output)
        return hidden_states if self.norms_first else self.mlp_norm(hidden_states)


class HagMoePooler(nn.Module):
    """The state of a text's first token through a dense layer and tanh."""

    def __init__(self, config: HagMoeConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first_states: Tensor) -> Tensor:
        """(B, D) -> (B, D)."""
        return self.dense(first_states).tanh()


class HagMoePreTrainedModel(PreTrainedModel):
    """Weight initialisation, loading, and what the modules can record; the base of every HAG-MoE model."""

    config: HagMoeConfig
    config_class = HagMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HagMoeEmbeddings", "HagMoeLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keep_in_fp32_modules_strict = ["group_bias", "expert_bias"]  # moved by steps that half precision would lose
    _can_record_outputs = {
        "hidden_states": HagMoeLayer,
        "attentions": HagMoeAttention,
        "router_logits": OutputRecorder(HagMoeRouter, index=0),
        "expert_index": OutputRecorder(HagMoeRouter, index=1),
    }

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Where nothing is requested, plain products over sorted tokens on CPU, and `grouped_mm` elsewhere."""
        return super().get_correct_experts_implementation(requested_experts or "segmented_mm")

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save as always; beside adapters, which hold no buffers, also the balancing biases that training moved."""
        if self._hf_peft_config_loaded and kwargs.get("is_main_process", True):
            biases = {name: bias for name, bias in self.named_buffers() if name.endswith(("group_bias", "expert_bias"))}
            os.makedirs(save_directory, exist_ok=True)
            save_file(biases, os.path.join(save_directory, BALANCING_BIASES))
        super().save_pretrained(save_directory, *args, **kwargs)

    def load_adapter(self, peft_model_id=None, *args, **kwargs):
        """Load adapters as always, and the balancing biases that they were trained with.

        A model has one set of biases: with several adapters, those of the one that was loaded last.
        """
        loaded = super().load_adapter(peft_model_id, *args, **kwargs)
        known = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
        given = {**kwargs, **(kwargs.get("adapter_kwargs") or {})}
        where = {name: given[name] for name in known if name in given}
        path = peft_model_id and cached_file(
            peft_model_id, BALANCING_BIASES, _raise_exceptions_for_missing_entries=False, **where
        )
        if path:
            self.load_state_dict(load_file(path), strict=False)
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, HagMoeExperts):
            for name, parameter in module.named_parameters():
                if name.endswith("_bias"):
                    init.zeros_(parameter)
                else:
                    init.normal_(parameter, mean=0.0, std=std)
        elif isinstance(module, HagMoeNgramMemory):
            init.constant_(module.names, NEVER)
            init.ones_(module.counts)
            init.zeros_(module.rows)
        elif isinstance(module, HagMoeRotaryEmbedding):
            for name, buffer in module.named_buffers():
                init.copy_(buffer, module.frequencies(name.removesuffix("_inv_freq"))[0])
        elif isinstance(module, HagMoeSparseMLP) and module.output_bias is not None:
            init.zeros_(module.output_bias)
        elif isinstance(module, HagMoeRouter):
            if module.attention_query is not None:
                init.normal_(module.attention_query, mean=0.0, std=std)
            for bias in (module.group_bias, module.expert_bias):
                if bias is not None:
                    init.zeros_(bias)

    def _encode(self, *args, **kwargs) -> HagMoeModelOutput:
        """A head's call of its encoder; router logits come with the choices, which the load balance term needs."""
        if kwargs.get("output_router_logits", self.config.output_router_logits):
            kwargs["output_expert_index"] = True
        return self.model(*args, **kwargs)

    def _head_output(self, kind: Callable, outputs: HagMoeModelOutput, loss: Tensor | None, **logits: Tensor) -> Any:
        """A head's output of this kind; the load balance term, where there is one, is part of the loss."""
        aux_loss = self._aux_loss(outputs)
        return kind(
            loss=loss if loss is None or aux_loss is None else loss + aux_loss,
            **logits,
            aux_loss=aux_loss,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            expert_index=outputs.expert_index,
        )

    def _aux_loss(self, outputs: HagMoeModelOutput) -> Tensor | None:
        """The load balance term of this batch, meaned over sparse layers and scaled; None without router logits."""
        if not outputs.router_logits or outputs.expert_index is None:
            return None
        terms = []
        for router_logits, expert_index in zip(outputs.router_logits, outputs.expert_index, strict=True):
            num_experts = router_logits.shape[-1]
            real = expert_index[:, 0] < num_experts
            num_tokens = real.sum().clamp(min=1)
            load = F.one_hot(expert_index[real], num_experts).sum(dim=(0, 1)) / (num_tokens * expert_index.shape[-1])
            terms.append(load_balancing_loss(router_logits[real], load, num_tokens))
        return self.config.router_aux_loss_coef * torch.stack(terms).mean()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Load as `PreTrainedModel.from_pretrained` does, and refuse weights that are damaged or not finite.

        Raises:
            ValueError: A weights file is truncated or damaged, or a weight holds NaN or infinity; the message names it.
        """
        source = str(pretrained_model_name_or_path)
        with naming_damaged_weights(source):
            loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        refuse_non_finite(loaded[0] if isinstance(loaded, tuple) else loaded, source)
        return loaded

    def push_to_hub(self, *args, **kwargs):  # type: ignore[override]
        """Push as `PreTrainedModel.push_to_hub` does, with this code beside the weights, for `trust_remote_code=True`.

        Only here, not whenever a model is saved: a local folder would carry code that nobody asked for.
        """
        had = getattr(self.config, "auto_map", None)
        task = type(self).__name__.removeprefix("HagMoe").removeprefix("Model")
        type(self).register_for_auto_class(f"AutoModel{task}")
        type(self.config).register_for_auto_class("AutoConfig")
        try:
            return super().push_to_hub(*args, **kwargs)
        finally:
            type(self)._auto_class = type(self.config)._auto_class = None
            vars(self.config).pop("auto_map", None)  # it may have failed before there was one
            if had is not None:
                self.config.auto_map = had


@contextmanager
def naming_damaged_weights(source: str) -> Iterator[None]:
    """Turn safetensors' error, which does not say where, into one that names `source`.

    Raises:
        ValueError: A safetensors file inside the block was truncated or damaged.
    """
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"A weights file of {source} is damaged ({error}); allowed: a whole safetensors file.") from error


def refuse_non_finite(model: nn.Module, source: str) -> None:
    """Raise where a weight or a balancing bias of `model` holds NaN or infinity, which would silently spoil every vector.

    Raises:
        ValueError: Names the first such weight and `source`.
    """
    for name, parameter in chain(model.named_parameters(), model.named_buffers()):
        tensor = parameter.detach()
        # A sum is one pass over memory and keeps NaN and infinity; subclasses (quantised, sharded) check themselves
        is_plain = type(tensor) is Tensor and tensor.is_floating_point() and not tensor.is_meta
        if is_plain and not torch.isfinite(tensor.sum(dtype=torch.float32)):
            raise ValueError(f"{name} in {source} holds NaN or infinity; allowed: finite weights only.")


class HagMoeModel(HagMoePreTrainedModel):
    """The encoder: embeddings, layers with dense or sparse feed-forward blocks, and a pooler."""

    def __init__(self, config: HagMoeConfig, add_pooling_layer: bool | None = None):
        super().__init__(config)
        self.embeddings = HagMoeEmbeddings(config)
        self.ngram_memory = HagMoeNgramMemory(config) if config.ngram_memory_size else None
        self.rotary_emb = HagMoeRotaryEmbedding(config) if config.position_embedding_type == "rope" else None
        self.layers = nn.ModuleList(HagMoeLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.final_norm = HagMoeLayerNorm(config) if config.norm_placement == "pre" else None
        has_pooler = config.has_pooler if add_pooling_layer is None else add_pooling_layer
        self.pooler = HagMoePooler(config) if has_pooler else None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The word embeddings, (vocab_size, D)."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings."""
        self.embeddings.word_embeddings = cast(nn.Embedding, value)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs,
    ) -> HagMoeModelOutput:
        """Encode texts.

        Args:
            input_ids: (B, L) int64 in [0, vocab_size).
            attention_mask: (B, L), non-zero at real tokens; all tokens are real where it is None.
            token_type_ids: (B, L) int64 in [0, type_vocab_size); zeros where None.
            position_ids: (B or 1, L) int64, counted from 0 in every family; where None, counted from each text's first
                real token, so that padding on the left changes nothing. Without an attention_mask, positions that
                restart within a row mark packed texts, as everywhere in transformers.
            inputs_embeds: (B, L, D) word embeddings instead of `input_ids`.
            kwargs: `output_hidden_states`, `output_attentions`, `output_router_logits`, `output_expert_index`,
                `return_dict`; for packed texts `cu_seq_lens_q` (S + 1,) int, their boundaries in one row, with
                `max_length_q`, or `seq_idx` (B, L) int, which changes where a text begins; anything else is ignored,
                since sentence-transformers passes its own features along.

        Returns:
            A `HagMoeModelOutput`.

        Raises:
            ValueError: Shapes that do not fit, a text longer than its positions, or packed texts with an attention_mask.
            IndexError: An id outside its embedding table (checked on CPU only: elsewhere it would cost a synchronisation).
        """
        texts = input_ids if inputs_embeds is None else inputs_embeds
        if texts is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("Exactly one of input_ids and inputs_embeds must be given.")
        self._check_inputs(texts, input_ids, attention_mask, token_type_ids, position_ids, kwargs)

        packing = find_packing(texts, attention_mask, position_ids, kwargs)
        token_mask = None if attention_mask is None else attention_mask.to(texts.device) != 0
        if token_mask is not None and token_mask.device.type == "cpu" and not is_traced() and token_mask.all():
            token_mask = attention_mask = None  # a query, most often: there is nothing to leave out
        if position_ids is not None:
            positions: Tensor = position_ids
        elif packing is not None:
            positions = packing.positions()
        else:
            positions = _positions_from_first_real_token(token_mask, texts)
        self._check_positions(positions)
        if self.config.position_offset and position_ids is None and packing is None and input_ids is not None:
            positions = _without_padding_ids(positions, token_mask, input_ids, self.config.position_offset - 1)
        token_types = _zeros(texts) if token_type_ids is None else token_type_ids
        real_tokens = self._real_tokens(token_mask, kwargs)
        if real_tokens is not None:
            positions = real_tokens.unpad(positions.expand(real_tokens.shape))
            token_types, packing = real_tokens.unpad(token_types.expand(real_tokens.shape)), real_tokens.packing()
        tokens = texts if real_tokens is None else real_tokens.unpad(texts)
        word_states = self.embeddings.word_embeddings(tokens) if inputs_embeds is None else tokens
        hidden_states = self.embeddings(word_states, token_types, positions)
        if self.ngram_memory is not None:
            if input_ids is None:
                raise ValueError(
                    f"inputs_embeds is given to a model with ngram_memory_size={self.config.ngram_memory_size}; allowed: "
                    "input_ids, since embeddings do not say which n-grams they are."
                )
            follows = follows_in_text(tokens, token_mask, packing, real_tokens)
            hidden_states = hidden_states + self.ngram_memory(tokens, follows).to(hidden_states.dtype)

        rotations = {} if self.rotary_emb is None else self.rotary_emb(hidden_states, positions)
        layer_masks = self._layer_masks(hidden_states, attention_mask, packing, real_tokens)
        flash_kwargs = {} if packing is None else self._flash_kwargs(packing, kwargs)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                layer_masks[layer.layer_type],
                token_mask if real_tokens is None else None,
                rotations.get(layer.layer_type),
                packing,
                real_tokens,
                word_states if self.config.group_input == "word_embeddings" else None,
                **flash_kwargs,
            )
        if self.final_norm is not None:
            hidden_states = self.final_norm(hidden_states)
        if real_tokens is not None:
            hidden_states, packing = real_tokens.pad(hidden_states), None
        elif token_mask is not None:
            hidden_states = hidden_states.masked_fill(~token_mask.unsqueeze(-1), 0)
        pooled = None if self.pooler is None else self.pooler(pool_texts(hidden_states, token_mask, packing, "cls"))
        return HagMoeModelOutput(last_hidden_state=hidden_states, pooler_output=pooled)

    def _real_tokens(self, token_mask: Tensor | None, kwargs: dict) -> RealTokens | None:
        """Where real tokens are, if leaving padding out is possible and worth its copies."""
        if token_mask is None or token_mask.device.type != "cpu" or is_traced():
            return None
        flags = (f"output_{name}" for name in self._can_record_outputs)
        is_recorded = any(kwargs.get(flag, getattr(self.config, flag, False)) for flag in flags)
        if is_recorded or self.config._attn_implementation not in ("sdpa", "eager"):
            return None
        if "sliding_attention" in (self.config.layer_types or ()) and has_holes(token_mask):
            return None  # a window counts what lies in between
        if not 0 < int(token_mask.sum()) < MOST_REAL * token_mask.numel():
            return None
        return RealTokens.from_mask(token_mask, is_tracing=False)

    def _layer_masks(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        packing: Packing | None,
        real_tokens: RealTokens | None,
    ) -> dict:
        """For each type of layer what the attention function wants; packed texts get a block for each text.

        With `real_tokens`, one mask for each part of the batch that attention runs on.
        """
        layer_types = dict.fromkeys(self.config.layer_types or ())
        if real_tokens is None:
            same_text = None if packing is None else packed_sequence_mask_function(packing.sequence_index)
            return {kind: self._mask(kind, hidden_states, attention_mask, same_text) for kind in layer_types}
        mask = attention_mask if real_tokens.equal is None else None
        likes = [hidden_states.new_empty(*shape, 0) for shape in real_tokens.attention_shapes]
        return {kind: [self._mask(kind, like, mask) for like in likes] for kind in layer_types}

    def _mask(self, layer_type: str, like: Tensor, attention_mask: Tensor | None, same_text: Callable | None = None) -> Any:
        """What the attention function wants for a (B, L, ...) tensor in a layer of this type."""
        makers = {
            "full_attention": create_bidirectional_mask,
            "sliding_attention": create_bidirectional_sliding_window_mask,
        }
        return makers[layer_type](
            config=self.config, inputs_embeds=like, attention_mask=attention_mask, and_mask_function=same_text
        )

    def _flash_kwargs(self, packing: Packing, kwargs: dict) -> dict:
        """The boundaries of packed texts, which flash attention takes instead of a mask."""
        if not is_flash_attention_requested(self.config):
            return {}
        boundaries, length = kwargs.get("cu_seq_lens_q"), packing.sequence_index.numel()
        if boundaries is None:
            end = torch.tensor([length], device=packing.sequence_index.device)
            boundaries = torch.cat((packing.starts(), end)).int()
        longest = kwargs.get("max_length_q") or length
        return {
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": longest,
            "max_length_k": longest,
        }

    def _check_inputs(self, texts, input_ids, attention_mask, token_type_ids, position_ids, kwargs) -> None:
        """Everything that can be told from shapes, and on CPU from ids, before it becomes a wrong vector."""
        config, batch_shape = self.config, texts.shape[:2]
        length = batch_shape[1]
        if length == 0:
            raise ValueError(f"The input has shape {tuple(batch_shape)}; allowed: at least one token per text.")
        boundaries, longest = kwargs.get("cu_seq_lens_q"), config.max_text_length
        is_packed = boundaries is not None or kwargs.get("seq_idx") is not None
        may_be_packed = is_packed or (position_ids is not None and attention_mask is None)
        longest_text = kwargs.get("max_length_q") if may_be_packed else length
        if longest is not None and longest_text is not None and longest_text > longest:
            raise ValueError(
                f"The input is {longest_text} tokens long; allowed: at most {longest} (max_position_embeddings="
                f"{config.max_position_embeddings}). Truncate it in the tokenizer (truncation=True, max_length=...)."
            )
        if is_packed and attention_mask is not None:
            raise ValueError(
                "attention_mask is given with cu_seq_lens_q or seq_idx; allowed: one of them. Packed texts have no "
                "padding, so leave the attention_mask out."
            )
        if boundaries is not None:
            fits = boundaries.dim() == 1 and boundaries.shape[0] >= 2 and batch_shape[0] == 1
            if fits and boundaries.device.type == "cpu" and not torch.compiler.is_compiling():
                fits = bool(boundaries[0] == 0 and boundaries[-1] == length and (boundaries.diff() > 0).all())
            if not fits:
                raise ValueError(
                    f"cu_seq_lens_q={boundaries} does not fit an input of shape {tuple(batch_shape)}; allowed: rising "
                    "boundaries from 0 to the number of tokens, and one row."
                )
        if attention_mask is not None and attention_mask.shape != batch_shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; allowed: {tuple(batch_shape)}, one entry per "
                "token, because the router must know which tokens of a text are real."
            )
        if not torch.compiler.is_compiling():
            _check_ids("input_ids", input_ids, "vocab_size", config.vocab_size)
            _check_ids("token_type_ids", token_type_ids, "type_vocab_size", max(config.type_vocab_size, 1))

    def _check_positions(self, position_ids: Tensor) -> None:
        """Positions decide how long a text may be, also where several lie in one row."""
        longest = self.config.max_text_length
        if longest is not None and not torch.compiler.is_compiling():
            _check_ids("position_ids", position_ids, "longest text", longest)


def find_packing(texts: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, kwargs: dict) -> Packing | None:
    """What `HagMoeModel.forward`'s arguments say about packed texts; None where each row holds one text.

    Args:
        texts: (B, L) ids or (B, L, D) embeddings.
        attention_mask: As in `HagMoeModel.forward`; packed texts have none.
        position_ids: As in `HagMoeModel.forward`.
        kwargs: May hold `cu_seq_lens_q` (S + 1,), or `seq_idx` (B, L).
    """
    if kwargs.get("cu_seq_lens_q") is not None:
        return Packing.from_lengths(kwargs["cu_seq_lens_q"].to(texts.device), texts.shape[1])
    row_index = kwargs.get("seq_idx")
    if row_index is None and position_ids is not None and attention_mask is None:
        row_index = find_packed_sequence_indices(position_ids)  # None where positions never restart
    if row_index is None:
        return None
    return Packing.from_row_index(row_index.to(texts.device).expand(texts.shape[0], -1), is_tracing(row_index))


def has_holes(token_mask: Tensor) -> bool:
    """Whether a text's real tokens do not follow each other: (B, L) bool."""
    edges_B = (token_mask[:, 1:] & ~token_mask[:, :-1]).sum(dim=-1) + token_mask[:, 0]
    return bool((edges_B > 1).any())


def pool_texts(hidden_states: Tensor, token_mask: Tensor | None, packing: Packing | None, pooling: str) -> Tensor:
    """One state for each text: its first real token's ("cls"), or the mean over its real tokens ("mean").

    Args:
        hidden_states: (B, L, D).
        token_mask: (B, L) bool, True at real tokens; None when all are.
        packing: Which text each token belongs to; None where each row holds one.
        pooling: "cls" or "mean".

    Returns:
        (B, D), or (S, D) for packed texts.
    """
    if packing is not None and packing.is_exact:
        flat_states, text = hidden_states.flatten(0, 1), packing.sequence_index.flatten()
        if pooling == "cls":
            return flat_states[packing.starts()]
        sums = flat_states.new_zeros(packing.size, flat_states.shape[-1]).index_add(0, text, flat_states)
        return sums / text.bincount(minlength=packing.size).unsqueeze(-1)
    if pooling == "mean":
        if token_mask is None:
            return hidden_states.mean(dim=1)
        weight = token_mask.to(hidden_states.dtype)
        return (hidden_states * weight.unsqueeze(-1)).sum(dim=1) / weight.sum(dim=1, keepdim=True).clamp(min=1)
    if token_mask is None:
        return hidden_states[:, 0]
    first = token_mask.int().argmax(dim=-1).view(-1, 1, 1).expand(-1, 1, hidden_states.shape[-1])
    return hidden_states.gather(1, first).squeeze(1)


def _check_ids(name: str, ids: Tensor | None, table: str, size: int) -> None:
    if ids is None or ids.device.type != "cpu":
        return
    low, high = ids.min().item(), ids.max().item()
    if low < 0 or high >= size:
        raise IndexError(f"{name} holds {low if low < 0 else high}; allowed: 0 to {size - 1} ({table}={size}).")


def _zeros(texts: Tensor) -> Tensor:
    """(B, L) int64 zeros for (B, L) ids or (B, L, D) embeddings."""
    return torch.zeros(texts.shape[:2], dtype=torch.long, device=texts.device)


def _positions_from_first_real_token(token_mask: Tensor | None, texts: Tensor) -> Tensor:
    """Positions (1 or B, L) that start at 0 at each text's first real token, for (B, L) ids or (B, L, D) embeddings."""
    positions = torch.arange(texts.shape[1], device=texts.device).unsqueeze(0)
    if token_mask is None:
        return positions
    return (positions - token_mask.int().argmax(dim=-1, keepdim=True)).clamp(min=0)


def _without_padding_ids(positions: Tensor, token_mask: Tensor | None, input_ids: Tensor, padding_id: int) -> Tensor:
    """Positions (B, L) as RoBERTa counts them: a padding id within a text is not counted, and stands before the first."""
    is_padding = input_ids == padding_id if token_mask is None else (input_ids == padding_id) & token_mask
    return (positions - is_padding.int().cumsum(dim=-1)).masked_fill(is_padding, -1)


class HagMoeTransformHead(nn.Module):
    """A dense layer, activation and norm before a decoder, or before a classifier as ModernBERT has them."""

    def __init__(self, config: HagMoeConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.classifier_bias)
        self.act_fn = ACT2FN[config.classifier_activation or config.hidden_act]
        self.norm = HagMoeLayerNorm(config)

    def forward(self, states: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.norm(self.act_fn(self.dense(states)))


class HagMoeMaskedLMHead(HagMoeTransformHead):
    """A dense layer with activation and norm, then a decoder that shares the word embeddings' weights."""

    def __init__(self, config: HagMoeConfig):
        super().__init__(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=config.decoder_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, vocab_size)."""
        return self.decoder(super().forward(hidden_states))


class HagMoeForMaskedLM(HagMoePreTrainedModel):
    """The encoder with a masked-language-modelling head."""

    _tied_weights_keys = {"lm_head.decoder.weight": "model.embeddings.word_embeddings.weight"}

    def __init__(self, config: HagMoeConfig):
        super().__init__(config)
        self.model = HagMoeModel(config, add_pooling_layer=False)
        self.lm_head = HagMoeMaskedLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """The decoder, (vocab_size, D)."""
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the decoder."""
        self.lm_head.decoder = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> HagMoeMaskedLMOutput:
        """Predict tokens; inputs as for [`HagMoeModel`], `labels` is (B, L) int64 with -100 where there is none."""
        outputs = self._encode(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return self._head_output(HagMoeMaskedLMOutput, outputs, loss, logits=logits)


class HagMoeClassifierDropout(nn.Dropout):
    """The config's dropout before a classifier."""

    def __init__(self, config: HagMoeConfig):
        super().__init__(config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout)


class HagMoeForSequenceClassification(HagMoePreTrainedModel):
    """The encoder with a linear classifier (or regressor) over one state for each text, as its family pools it."""

    def __init__(self, config: HagMoeConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        has_transform = config.classifier_head == "transform"
        self.model = HagMoeModel(config, add_pooling_layer=not has_transform)
        self.head = HagMoeTransformHead(config) if has_transform else None
        self.dropout = HagMoeClassifierDropout(config)
        self.classifier = nn.Linear(config.hidden_size, cast(int, config.num_labels))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> HagMoeSequenceClassifierOutput:
        """Classify texts; inputs as for [`HagMoeModel`], `labels` is (B,), or (B, labels) for several at once."""
        outputs = self._encode(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        pooled = _pooled_for_classifier(self, outputs, attention_mask, position_ids, kwargs)
        logits = self.classifier(self.dropout(pooled))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return self._head_output(HagMoeSequenceClassifierOutput, outputs, loss, logits=logits)


class HagMoeForTokenClassification(HagMoePreTrainedModel):
    """The encoder with a linear classifier over every token."""

    def __init__(self, config: HagMoeConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = HagMoeModel(config, add_pooling_layer=False)
        self.head = HagMoeTransformHead(config) if config.classifier_head == "transform" else None
        self.dropout = HagMoeClassifierDropout(config)
        self.classifier = nn.Linear(config.hidden_size, cast(int, config.num_labels))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> HagMoeTokenClassifierOutput:
        """Classify tokens; inputs as for [`HagMoeModel`], `labels` is (B, L) int64 with -100 where there is none."""
        outputs = self._encode(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        states = outputs.last_hidden_state if self.head is None else self.head(outputs.last_hidden_state)
        logits = self.classifier(self.dropout(states))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, config=self.config, **kwargs)
        return self._head_output(HagMoeTokenClassifierOutput, outputs, loss, logits=logits)


class HagMoeForQuestionAnswering(HagMoePreTrainedModel):
    """The encoder with a linear layer that finds where in the text an answer begins and ends."""

    def __init__(self, config: HagMoeConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = HagMoeModel(config, add_pooling_layer=False)
        has_transform = config.classifier_head == "transform"
        self.head = HagMoeTransformHead(config) if has_transform else None
        self.dropout = HagMoeClassifierDropout(config) if has_transform else nn.Identity()  # as the families have it
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs,
    ) -> HagMoeQuestionAnsweringOutput:
        """Find spans; inputs as for [`HagMoeModel`], `start_positions` and `end_positions` are (B,) int64."""
        outputs = self._encode(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        states = outputs.last_hidden_state if self.head is None else self.head(outputs.last_hidden_state)
        start_logits, end_logits = self.qa_outputs(self.dropout(states)).unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        return self._head_output(
            HagMoeQuestionAnsweringOutput, outputs, loss, start_logits=start_logits, end_logits=end_logits
        )


class HagMoeForMultipleChoice(HagMoePreTrainedModel):
    """The encoder with a linear layer that scores each of several choices."""

    def __init__(self, config: HagMoeConfig):
        super().__init__(config)
        has_transform = config.classifier_head == "transform"
        self.model = HagMoeModel(config, add_pooling_layer=not has_transform)
        self.head = HagMoeTransformHead(config) if has_transform else None
        self.dropout = HagMoeClassifierDropout(config)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> HagMoeMultipleChoiceOutput:
        """Score choices; inputs as for [`HagMoeModel`] but (B, choices, L), `labels` is (B,) int64 in [0, choices)."""
        texts = input_ids if inputs_embeds is None else inputs_embeds
        if texts is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("Exactly one of input_ids and inputs_embeds must be given.")
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        flat_inputs = [None if tensor is None else tensor.flatten(0, 1) for tensor in inputs]
        outputs = self._encode(*flat_inputs, **kwargs)
        pooled = _pooled_for_classifier(self, outputs, flat_inputs[1], flat_inputs[3], kwargs)
        logits = self.classifier(self.dropout(pooled)).view(texts.shape[:2])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits, labels.to(logits.device))
        return self._head_output(HagMoeMultipleChoiceOutput, outputs, loss, logits=logits)


def _pooled_for_classifier(model, outputs: HagMoeModelOutput, attention_mask, position_ids, kwargs: dict) -> Tensor:
    """(B, D), (S, D) for packed texts: what the model's classifier sees of each text before its dropout."""
    if model.head is None:
        return cast(Tensor, outputs.pooler_output)
    states = cast(Tensor, outputs.last_hidden_state)
    token_mask = None if attention_mask is None else attention_mask.to(states.device) != 0
    packing = find_packing(states, attention_mask, position_ids, kwargs)
    return model.head(pool_texts(states, token_mask, packing, model.config.classifier_pooling))


__all__ = [
    "HagMoeForMaskedLM",
    "HagMoeForMultipleChoice",
    "HagMoeForQuestionAnswering",
    "HagMoeForSequenceClassification",
    "HagMoeForTokenClassification",
    "HagMoeMaskedLMOutput",
    "HagMoeModel",
    "HagMoeModelOutput",
    "HagMoeMultipleChoiceOutput",
    "HagMoePreTrainedModel",
    "HagMoeQuestionAnsweringOutput",
    "HagMoeSequenceClassifierOutput",
    "HagMoeTokenClassifierOutput",
]
