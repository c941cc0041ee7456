"""Every module of a HAG-MoE: embeddings, attention, dense and sparse feed-forward blocks, the encoder, its heads.

This file travels to the Hub beside the weights, so it imports nothing but torch, transformers (with the safetensors it
always brings) and its two siblings.
transformers looks for `@use_experts_implementation` in the source of the model's own file: the experts must stay here.

Axes:  B sequences   L tokens   D hidden_size   G groups   E experts   K experts per token   I moe_intermediate_size
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_hagmoe import HagMoeConfig
from .routing_hagmoe import Routing, attention_pool, load_balancing_loss, route

PACKED_INPUT_NAMES = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


@dataclass
class HagMoeModelOutput(ModelOutput):
    """What a [`HagMoeModel`] returns.

    Args:
        last_hidden_state: (B, L, D).
        pooler_output: (B, D), the first token's state through a dense layer and tanh; None without a pooler.
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


class HagMoeEmbeddings(nn.Module):
    """Word, token type and learned position embeddings, summed and normed."""

    def __init__(self, config: HagMoeConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, inputs_embeds: Tensor, token_type_ids: Tensor, position_ids: Tensor) -> Tensor:
        """(B, L, D) word embeddings -> (B, L, D) input of the first layer."""
        embeddings = inputs_embeds + self.token_type_embeddings(token_type_ids)
        embeddings = embeddings + self.position_embeddings(position_ids)
        return self.dropout(self.norm(embeddings))


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


class HagMoeAttention(nn.Module):
    """Bidirectional multi-head self-attention through the attention function that the config names."""

    def __init__(self, config: HagMoeConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) -> (B, L, D) and, where the attention function computes them, weights (B, heads, L, L)."""
        heads_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads_shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(heads_shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads_shape).transpose(1, 2)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        output, weights = attention(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling)
        return self.o_proj(output.reshape(hidden_states.shape)), weights


class HagMoeMLP(nn.Module):
    """A dense feed-forward block: a whole layer's, or the shared expert of a sparse one."""

    def __init__(self, config: HagMoeConfig, intermediate_size: int):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


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
        self.register_buffer("group_bias", torch.zeros(config.n_group) if has_groups else None)
        self.register_buffer("expert_bias", torch.zeros(config.num_experts) if has_choice else None)
        if has_groups and config.group_routing == "sequence":
            self.attention_query = nn.Parameter(torch.empty(config.hidden_size))
        if has_groups:
            self.group_gate = HagMoeGate(config.hidden_size, config.n_group, bias=False)
        if has_choice:
            self.expert_gate = HagMoeGate(config.hidden_size, config.num_experts, bias=False)

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None) -> Routing:
        """Route (B, L, D) hidden states; `token_mask` (B, L) bool is True at real tokens, None when all are."""
        config = self.config
        with maybe_autocast(device_type=hidden_states.device.type, enabled=False):
            states = hidden_states.float()
            group_logits = expert_logits = None
            if self.group_gate is not None:
                group_logits = self.group_gate(self._group_input(states, token_mask))
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

    def _group_input(self, states: Tensor, token_mask: Tensor | None) -> Tensor:
        """What the group gate sees: (B, 1, D), one summary for the sequence, or (B, L, D), each token itself."""
        if self.attention_query is None:
            return states
        return attention_pool(states, self.attention_query.float(), token_mask).unsqueeze(1)


@use_experts_implementation(has_gate=False, has_bias=True)
class HagMoeExperts(nn.Module):
    """The routed experts' weights, stacked, behind transformers' experts interface (eager, grouped_mm, batched_mm, ...)."""

    def __init__(self, config: HagMoeConfig):
        super().__init__()
        self.num_experts = config.num_experts
        width = cast(int, config.moe_intermediate_size)
        self.up_proj = nn.Parameter(torch.empty(config.num_experts, width, config.hidden_size))
        self.up_proj_bias = nn.Parameter(torch.empty(config.num_experts, width))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, width))
        self.down_proj_bias = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
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
        stacks = (self.up_proj, self.up_proj_bias, self.down_proj, self.down_proj_bias)
        for expert, (up, up_bias, down, down_bias) in enumerate(zip(*(stack.unbind(0) for stack in stacks), strict=True)):
            token, slot = torch.where(top_k_index == expert)
            expert_output = F.linear(self.act_fn(F.linear(hidden_states[token], up, up_bias)), down, down_bias)
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
        # The flag makes the stock implementations understand expert id `num_experts` as "no expert": padding costs nothing
        self.experts._is_expert_parallel = True  # type: ignore[assignment]
        # While training, RouterCallback sets it to (output, routing) -> output: it counts, and adds balance gradients
        self.routing_observer: Callable[[Tensor, Routing], Tensor] | None = None
        self.shared_expert = self.output_bias = None
        if config.shared_expert_intermediate_size:
            self.shared_expert = HagMoeMLP(config, config.shared_expert_intermediate_size)
        else:
            self.output_bias = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None) -> Tensor:
        """(B, L, D) -> (B, L, D); `token_mask` (B, L) bool is True at real tokens, None when all are."""
        routing = self.router(hidden_states, token_mask)
        flat_states = hidden_states.reshape(-1, hidden_states.shape[-1])  # (B*L, D)
        routed = self.experts(flat_states, routing.expert_index, routing.expert_weight).view_as(hidden_states)
        common = self.output_bias if self.shared_expert is None else self.shared_expert(hidden_states)
        output = routed + common
        if self.training and self.routing_observer is not None:
            output = self.routing_observer(output, routing)
        return output


class HagMoeLayer(GradientCheckpointingLayer):
    """Attention and a feed-forward block, each followed by dropout, residual sum and layer norm."""

    def __init__(self, config: HagMoeConfig, layer_idx: int):
        super().__init__()
        self.is_sparse = layer_idx in config.sparse_layers
        self.attention = HagMoeAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = HagMoeSparseMLP(config) if self.is_sparse else HagMoeMLP(config, config.intermediate_size)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, token_mask: Tensor | None) -> Tensor:
        """(B, L, D) -> (B, L, D). `attention_mask` is whatever the attention function wants, `token_mask` (B, L) bool."""
        attention_output, _ = self.attention(hidden_states, attention_mask)
        hidden_states = self.attention_norm(hidden_states + self.dropout(attention_output))
        mlp_output = self.mlp(hidden_states, token_mask) if self.is_sparse else self.mlp(hidden_states)
        return self.mlp_norm(hidden_states + self.dropout(mlp_output))


class HagMoePooler(nn.Module):
    """The first token's state through a dense layer and tanh."""

    def __init__(self, config: HagMoeConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, L, D) -> (B, D)."""
        return self.dense(hidden_states[:, 0]).tanh()


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

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, HagMoeExperts):
            init.normal_(module.up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
            init.zeros_(module.up_proj_bias)
            init.zeros_(module.down_proj_bias)
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

    def _aux_loss(self, outputs: HagMoeModelOutput) -> Tensor | None:
        """The load balance term of this batch, meaned over sparse layers and scaled; None without router logits."""
        if not outputs.router_logits or outputs.expert_index is None:
            return None
        terms = []
        for router_logits, expert_index in zip(outputs.router_logits, outputs.expert_index, strict=True):
            num_experts = router_logits.shape[-1]
            real = expert_index[:, 0] < num_experts
            load = F.one_hot(expert_index[real], num_experts).float().mean(dim=(0, 1))
            terms.append(load_balancing_loss(router_logits[real], load, real.sum()))
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
    """Raise where a weight of `model` holds NaN or infinity, which would silently spoil every vector.

    Raises:
        ValueError: Names the first such weight and `source`.
    """
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        # A sum is one pass over memory and keeps NaN and infinity; subclasses (quantised, sharded) check themselves
        is_plain = type(tensor) is Tensor and tensor.is_floating_point() and not tensor.is_meta
        if is_plain and not torch.isfinite(tensor.sum(dtype=torch.float32)):
            raise ValueError(f"{name} in {source} holds NaN or infinity; allowed: finite weights only.")


class HagMoeModel(HagMoePreTrainedModel):
    """The encoder: embeddings, layers with dense or sparse feed-forward blocks, and a pooler."""

    def __init__(self, config: HagMoeConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = HagMoeEmbeddings(config)
        self.layers = nn.ModuleList(HagMoeLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.pooler = HagMoePooler(config) if add_pooling_layer else None
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
            position_ids: (B or 1, L) int64; where None, counted from each text's first real token, so that padding on
                the left changes nothing.
            inputs_embeds: (B, L, D) word embeddings instead of `input_ids`.
            kwargs: `output_hidden_states`, `output_attentions`, `output_router_logits`, `output_expert_index`,
                `return_dict`; anything else is ignored, since sentence-transformers passes its own features along.

        Returns:
            A `HagMoeModelOutput`.

        Raises:
            ValueError: Shapes that do not fit, a text longer than `max_position_embeddings`, or packed input.
            IndexError: An id outside its embedding table (checked on CPU only: elsewhere it would cost a synchronisation).
        """
        texts = input_ids if inputs_embeds is None else inputs_embeds
        if texts is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("Exactly one of input_ids and inputs_embeds must be given.")
        self._check_inputs(texts.shape[:2], input_ids, attention_mask, token_type_ids, position_ids, kwargs)

        token_mask = None if attention_mask is None else attention_mask.to(texts.device) != 0
        word_states = self.embeddings.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        hidden_states = self.embeddings(
            word_states,
            _zeros(texts) if token_type_ids is None else token_type_ids,
            _positions_from_first_real_token(token_mask, texts) if position_ids is None else position_ids,
        )
        layer_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )
        for layer in self.layers:
            hidden_states = layer(hidden_states, layer_mask, token_mask)
        pooled = None if self.pooler is None else self.pooler(hidden_states)
        return HagMoeModelOutput(last_hidden_state=hidden_states, pooler_output=pooled)

    def _check_inputs(self, batch_shape, input_ids, attention_mask, token_type_ids, position_ids, kwargs) -> None:
        """Everything that can be told from shapes, and on CPU from ids, before it becomes a wrong vector."""
        config = self.config
        length = batch_shape[1]
        if length == 0:
            raise ValueError(f"The input has shape {tuple(batch_shape)}; allowed: at least one token per text.")
        if length > config.max_position_embeddings:
            raise ValueError(
                f"The input is {length} tokens long; allowed: at most max_position_embeddings="
                f"{config.max_position_embeddings}. Truncate it in the tokenizer (truncation=True, max_length=...)."
            )
        packed = [name for name in PACKED_INPUT_NAMES if kwargs.get(name) is not None]
        if packed:
            raise ValueError(
                f"Packed input ({', '.join(packed)}) is not supported: pass a padded batch with its attention_mask (in "
                "sentence-transformers: model[0].unpad_inputs = False)."
            )
        if attention_mask is not None and attention_mask.shape != batch_shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; allowed: {tuple(batch_shape)}, one entry per "
                "token, because the router must know which tokens of a text are real."
            )
        if not torch.compiler.is_compiling():
            _check_ids("input_ids", input_ids, "vocab_size", config.vocab_size)
            _check_ids("token_type_ids", token_type_ids, "type_vocab_size", config.type_vocab_size)
            _check_ids("position_ids", position_ids, "max_position_embeddings", config.max_position_embeddings)
            if position_ids is not None and attention_mask is None and (position_ids.diff(dim=-1) != 1).any():
                raise ValueError(
                    "position_ids restart within a row and there is no attention_mask: that is packed input, which is not "
                    "supported. Pass a padded batch with its attention_mask."
                )


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


class HagMoeMaskedLMHead(nn.Module):
    """A dense layer with activation and norm, then a decoder that shares the word embeddings' weights."""

    def __init__(self, config: HagMoeConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, vocab_size)."""
        return self.decoder(self.norm(self.act_fn(self.dense(hidden_states))))


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
        loss, aux_loss = None, self._aux_loss(outputs)
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            loss = loss if aux_loss is None else loss + aux_loss
        return HagMoeMaskedLMOutput(
            loss=loss,
            logits=logits,
            aux_loss=aux_loss,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            expert_index=outputs.expert_index,
        )


class HagMoeForSequenceClassification(HagMoePreTrainedModel):
    """The encoder with a linear classifier (or regressor) over the pooled first token, as stock BERT has it."""

    def __init__(self, config: HagMoeConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = HagMoeModel(config)
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(dropout)
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
        logits = self.classifier(self.dropout(outputs.pooler_output))
        loss, aux_loss = None, self._aux_loss(outputs)
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
            loss = loss if aux_loss is None else loss + aux_loss
        return HagMoeSequenceClassifierOutput(
            loss=loss,
            logits=logits,
            aux_loss=aux_loss,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            expert_index=outputs.expert_index,
        )


__all__ = [
    "HagMoeForMaskedLM",
    "HagMoeForSequenceClassification",
    "HagMoeMaskedLMOutput",
    "HagMoeModel",
    "HagMoeModelOutput",
    "HagMoePreTrainedModel",
    "HagMoeSequenceClassifierOutput",
]
