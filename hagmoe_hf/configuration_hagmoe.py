"""The numbers of a HAG-MoE: its shape, its mixture, their validation, and how many parameters that makes.

The shape switches cover the encoder families people run: BERT (the defaults), RoBERTa, ModernBERT and NomicBERT.

This file travels to the Hub beside the weights, so it imports nothing but transformers, and huggingface_hub, which
transformers stands on.
"""

from typing import Any, ClassVar, Literal, NamedTuple

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

# Kinds of rotary positions whose frequencies do not depend on how long the other texts of a batch are
STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
WIDTH_MULTIPLE = 8  # grouped matrix products need rows of 16 bytes: 8 numbers of two bytes each


class ParameterCounts(NamedTuple):
    """Parameters of a `HagMoeModel`. "Active" is what one token passes: of the routed experts, only those chosen."""

    total: int
    active: int
    embedding: int  # the lookup tables (words, positions, token types), part of both numbers above
    memory: int = 0  # the n-gram memory, part of `total` alone: a token looks up a few of its rows and multiplies with none

    @property
    def total_non_embedding(self) -> int:
        """Parameters without the lookup tables and the memory."""
        return self.total - self.embedding - self.memory

    @property
    def active_non_embedding(self) -> int:
        """Parameters that take part in a matrix product for one token: what decides its FLOPs."""
        return self.active - self.embedding


def default_mlp_layer_types(num_hidden_layers: int) -> list[str]:
    """Every second layer is sparse, never the first, and never the last unless it is the only candidate.

    The last router of nomic-embed-text-v2-moe ended near uniform, and one sparse block gave most of the gain in a
    BERT study (arXiv 2401.15713): see `docs/decisions/0001-which-layers-are-sparse.md`.
    """
    sparse = set(range(1, num_hidden_layers - 1, 2)) or {0}
    return ["sparse" if layer in sparse else "dense" for layer in range(num_hidden_layers)]


def default_shared_expert_width(intermediate_size: int) -> int:
    """Half of the feed-forward neurons, rounded down to a width that grouped matrix products accept."""
    return intermediate_size // 2 // WIDTH_MULTIPLE * WIDTH_MULTIPLE


@strict
class HagMoeConfig(PreTrainedConfig):
    r"""
    Configuration of a [`HagMoeModel`]. The defaults are the shape of all-MiniLM-L6-v2 with the default mixture.

    Args:
        vocab_size (`int`): Number of word embeddings.
        hidden_size (`int`): Width D of the residual stream; a multiple of `num_attention_heads` and of 8.
        num_hidden_layers (`int`): Number of encoder layers.
        num_attention_heads (`int`): Attention heads per layer.
        intermediate_size (`int`): Width of a dense layer's feed-forward block.
        hidden_act (`str`): Activation of every feed-forward block and expert, a key of `transformers.activations.ACT2FN`.
        hidden_dropout_prob (`float`): Dropout after embeddings, attention and feed-forward blocks, in [0, 1].
        attention_probs_dropout_prob (`float`): Dropout of attention weights, in [0, 1].
        embedding_dropout (`float`, *optional*): Dropout after the embeddings; `hidden_dropout_prob` where None.
        mlp_dropout (`float`, *optional*): Dropout after feed-forward blocks; `hidden_dropout_prob` where None.
        max_position_embeddings (`int`): Rows of the position table; a hint where positions are rotary.
        type_vocab_size (`int`): Number of token types, 0 for none.
        initializer_range (`float`): Standard deviation of new weights.
        layer_norm_eps (`float`): Epsilon of the layer norms.
        position_embedding_type (`str`): "absolute" (a learned table) or "rope" (queries and keys are rotated).
        position_offset (`int`): Row of the position table that a text's first token takes; RoBERTa's is its padding id + 1.
        rope_parameters (`dict`, *optional*): Rotary parameters as transformers has them, for all layers or for each of
            `layer_types`; only with "rope". The types "default", "linear", "llama3" and "yarn" are possible.
        layer_types (`list[str]`, *optional*): "full_attention" or "sliding_attention" for each layer; all full where None.
        sliding_window (`int`, *optional*): How many tokens to each side a token of a sliding layer sees.
        norm_placement (`str`): "post" (after each residual sum, BERT) or "pre" (before each block, none before the first
            attention, and one after the last layer: ModernBERT).
        gated_mlp (`bool`): Whether feed-forward blocks and experts are gated, `down(act(gate(x)) * up(x))`.
        attention_bias (`bool`): Whether the attention projections have biases.
        mlp_bias (`bool`): Whether feed-forward blocks and experts have biases.
        norm_bias (`bool`): Whether layer norms have biases.
        has_pooler (`bool`): Whether the bare encoder has a pooler; a head over it brings its own.
        classifier_dropout (`float`, *optional*): Dropout before a classifier; `hidden_dropout_prob` where None.
        classifier_head (`str`): What lies before a classifier. "pooler": a dense layer and tanh on a text's first token
            (BERT); "transform": a dense layer, activation and norm on every state that is classified (ModernBERT).
        classifier_pooling (`str`): The state of a text that "transform" classifies: "cls" (its first token's) or "mean".
        classifier_activation (`str`, *optional*): Activation of "transform" and of the masked-LM head; `hidden_act` where
            None.
        classifier_bias (`bool`): Whether the dense layer of "transform" and of the masked-LM head has a bias.
        decoder_bias (`bool`): Whether the masked-LM decoder has a bias.
        mlp_layer_types (`list[str]`, *optional*): "dense" or "sparse" for each layer; every second layer where None.
        num_experts (`int`): Routed experts E of a sparse layer, over all groups; at least 2.
        num_experts_per_tok (`int`): Routed experts K that each token passes.
        n_group (`int`): Expert groups G, a divisor of `num_experts`; 1 gives a plain token router.
        topk_group (`int`): Groups that stay open for a sequence (or a token).
        group_routing (`str`): Who opens groups: "sequence" (one choice for all tokens of a text) or "token".
        group_input (`str`): What a text's groups are chosen from: "hidden_states", those of the layer, or "word_embeddings",
            so that the choice stays while the layers below learn; needs groups that are opened by text.
        combine_rule (`str`): Weight of a chosen expert whose probability is p. "selection": 1/K in the forward pass, with
            the gradient of p; "softmax": p; "normalized": p over the sum of the chosen ones' (needs
            K > 1, and one group or more than one open group).
        moe_intermediate_size (`int`, *optional*): Width of a routed expert, a multiple of 8; what the shared expert leaves
            of `intermediate_size` where None.
        shared_expert_intermediate_size (`int`, *optional*): Width of the shared expert, a multiple of 8, 0 for none; half
            of `intermediate_size` where None.
        ngram_memory_size (`int`): N-grams with a row that is added to the embeddings where they end, those included that
            are only the beginning of others; 0 for no memory.
        ngram_memory_order (`int`): Tokens of the longest n-gram in the memory.
        ngram_memory_scale (`float`): How many times as fast as other weights the rows of the memory learn under Adam. Less
            of it turns a trained memory down, 0 turns it off.
        preserve_first_group (`bool`): Whether no gradient reaches the experts of the first group, so that they stay the
            parent's while others learn; needs groups that are opened by text, one at a time.
        balance_routing (`bool`, *optional*): Whether `RouterCallback` balances groups and experts; where None, not with
            `preserve_first_group`, whose groups are for kinds of text, however often these occur.
        output_router_logits (`bool`): Whether outputs carry `router_logits`; a head's loss then holds the load balance term.
        router_aux_loss_coef (`float`): Weight of that term (for sentence-transformers losses there is `RouterCallback`).

    Raises:
        StrictDataclassFieldValidationError: A field has the wrong type.
        StrictDataclassClassValidationError: Fields that do not fit together; the message names field, value and what is
            allowed.
    """

    model_type = "hagmoe"
    keys_to_ignore_at_inference: ClassVar[Any] = ["aux_loss", "router_logits", "expert_index"]  # by the stock Trainer
    # Experts are no part of the tensor-parallel plan: summed over ranks, their output biases would count several times.
    # The plan below shards them by expert instead.
    base_model_tp_plan = {
        "layers.*.attention.q_proj": "colwise",
        "layers.*.attention.k_proj": "colwise",
        "layers.*.attention.v_proj": "colwise",
        "layers.*.attention.o_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.gate_up_proj": "packed_colwise",
        "layers.*.mlp.down_proj": "rowwise",
        "layers.*.mlp.shared_expert.up_proj": "colwise",
        "layers.*.mlp.shared_expert.gate_up_proj": "packed_colwise",
        "layers.*.mlp.shared_expert.down_proj": "rowwise",
    }
    base_model_ep_plan: ClassVar[Any] = {
        "layers.*.mlp.experts.up_proj": "grouped_gemm",
        "layers.*.mlp.experts.up_proj_bias": "grouped_gemm",
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.gate_up_proj_bias": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj_bias": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }
    base_model_fsdp_plan = {
        "embeddings": "free_full_weight",
        "layers.*": "free_full_weight",
        "final_norm": "keep_full_weight",
    }

    vocab_size: int = 30522
    hidden_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 1536
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float | int = 0.02
    layer_norm_eps: float | int = 1e-12
    embedding_dropout: float | int | None = None
    mlp_dropout: float | int | None = None
    position_embedding_type: Literal["absolute", "rope"] = "absolute"
    position_offset: int = 0
    rope_parameters: dict[str, Any] | None = None
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    norm_placement: Literal["post", "pre"] = "post"
    gated_mlp: bool = False
    attention_bias: bool = True
    mlp_bias: bool = True
    norm_bias: bool = True
    has_pooler: bool = True
    classifier_dropout: float | int | None = None
    classifier_head: Literal["pooler", "transform"] = "pooler"
    classifier_pooling: Literal["cls", "mean"] = "cls"
    classifier_activation: str | None = None
    classifier_bias: bool = True
    decoder_bias: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    mlp_layer_types: list[str] | None = None
    num_experts: int = 8
    num_experts_per_tok: int = 1
    n_group: int = 4
    topk_group: int = 1
    group_routing: Literal["sequence", "token"] = "sequence"
    group_input: Literal["hidden_states", "word_embeddings"] = "hidden_states"
    combine_rule: Literal["selection", "softmax", "normalized"] = "selection"
    moe_intermediate_size: int | None = None
    shared_expert_intermediate_size: int | None = None
    ngram_memory_size: int = 0
    ngram_memory_order: int = 4
    ngram_memory_scale: float | int = 100.0
    preserve_first_group: bool = False
    balance_routing: bool | None = None
    output_router_logits: bool = False
    router_aux_loss_coef: float | int = 0.001

    def __post_init__(self, **kwargs):
        if self.mlp_layer_types is None:
            self.mlp_layer_types = default_mlp_layer_types(self.num_hidden_layers)
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        if self.shared_expert_intermediate_size is None:
            self.shared_expert_intermediate_size = default_shared_expert_width(self.intermediate_size)
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size - self.shared_expert_intermediate_size
        if self.balance_routing is None:
            self.balance_routing = not self.preserve_first_group
        super().__post_init__(**kwargs)
        for name in ("base_model_tp_plan", "base_model_ep_plan", "base_model_fsdp_plan"):
            plan = getattr(type(self), name)
            setattr(self, name, {rule: style for rule, style in plan.items() if self._has(rule)})

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, without the plans, which are code."""
        return {name: value for name, value in super().to_dict().items() if not name.startswith("base_model_")}

    def _has(self, rule: str) -> bool:
        """Whether a rule of a parallel plan speaks of something that this shape has; transformers warns of others."""
        name = rule.rpartition(".")[2]
        if name.removesuffix("_bias") == ("up_proj" if self.gated_mlp else "gate_up_proj"):
            return False
        if name.endswith("_bias"):
            return self.mlp_bias and bool(self.sparse_layers)
        if ".experts" in rule:
            return bool(self.sparse_layers)
        if ".shared_expert." in rule:
            return bool(self.sparse_layers and self.shared_expert_intermediate_size)
        if ".mlp." in rule:
            return len(self.sparse_layers) < self.num_hidden_layers
        return name != "final_norm" or self.norm_placement == "pre"

    def convert_rope_params_to_dict(self, **kwargs):
        """Give every layer type its own rotary parameters; called by transformers whenever a config is made."""
        if self.position_embedding_type == "absolute":
            return kwargs
        given = kwargs.pop("rope_scaling", None) or self.rope_parameters or {}
        theta = kwargs.pop("rope_theta", self.default_theta)
        kinds = sorted(set(self.layer_types or []))
        shared_by_all = not {"full_attention", "sliding_attention"} & set(given)
        nested = {kind: dict((given if shared_by_all else given.get(kind)) or {}) for kind in kinds}
        for parameters in nested.values():
            parameters.setdefault("rope_theta", theta)
        self.rope_parameters = nested
        self.standardize_rope_params()
        return kwargs

    @property
    def max_text_length(self) -> int | None:
        """Longest text in tokens that positions exist for; None where they are rotary and have no end."""
        if self.position_embedding_type == "rope":
            return None
        return self.max_position_embeddings - self.position_offset

    @property
    def sparse_layers(self) -> list[int]:
        """Indices of the layers whose feed-forward block is a mixture."""
        return [layer for layer, kind in enumerate(self.mlp_layer_types or []) if kind == "sparse"]

    @property
    def experts_per_group(self) -> int:
        """Routed experts R in each group."""
        return self.num_experts // self.n_group

    def validate_sizes(self):
        """Widths, counts and probabilities that every encoder needs."""
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
        ):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "an integer of at least 1")
        _require(self.type_vocab_size >= 0, "type_vocab_size", self.type_vocab_size, "an integer of at least 0")
        _require(
            self.hidden_size % self.num_attention_heads == 0,
            "hidden_size",
            self.hidden_size,
            f"a multiple of num_attention_heads={self.num_attention_heads}",
        )
        for name in (
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
            "classifier_dropout",
            "embedding_dropout",
            "mlp_dropout",
        ):
            value = getattr(self, name)
            _require(value is None or 0 <= value <= 1, name, value, "a probability between 0 and 1")
        _require(self.ngram_memory_size >= 0, "ngram_memory_size", self.ngram_memory_size, "0 (no memory) or more rows")
        _require(self.ngram_memory_order >= 1, "ngram_memory_order", self.ngram_memory_order, "an integer of at least 1")
        for name in ("initializer_range", "layer_norm_eps", "ngram_memory_scale", "router_aux_loss_coef"):
            value = getattr(self, name)
            _require(0 <= value < float("inf"), name, value, "a finite number, 0 or more")
        for name in ("hidden_act", "classifier_activation"):
            value = getattr(self, name)
            _require(value is None or value in ACT2FN, name, value, f"one of {sorted(ACT2FN)}")

    def validate_layer_type(self):
        """One word for each layer; in place of transformers' own check, which does not say what was given."""
        kinds = {"layer_types": ("full_attention", "sliding_attention"), "mlp_layer_types": ("dense", "sparse")}
        for name, words in kinds.items():
            value = getattr(self, name) or []
            _require(
                len(value) == self.num_hidden_layers and set(value) <= set(words),
                name,
                getattr(self, name),
                f"a list of num_hidden_layers={self.num_hidden_layers} entries, each {words[0]!r} or {words[1]!r}",
            )

    def validate_shape(self):
        """Positions, attention layers and heads that fit together."""
        rope = self.position_embedding_type == "rope"
        _require(
            rope or self.rope_parameters is None,
            "rope_parameters",
            self.rope_parameters,
            "None with position_embedding_type='absolute'",
        )
        highest = 0 if rope else self.max_position_embeddings - 1
        _require(
            0 <= self.position_offset <= highest,
            "position_offset",
            self.position_offset,
            f"between 0 and {highest} with position_embedding_type={self.position_embedding_type!r} and "
            f"max_position_embeddings={self.max_position_embeddings}",
        )
        head_width = self.hidden_size // max(self.num_attention_heads, 1)
        _require(
            not rope or head_width % 2 == 0,
            "num_attention_heads",
            self.num_attention_heads,
            f"a number that leaves heads of even width with position_embedding_type='rope' (hidden_size="
            f"{self.hidden_size} gives {head_width})",
        )
        for kind, parameters in (self.rope_parameters or {}).items():
            rope_type = parameters.get("rope_type")
            _require(
                rope_type in STATIC_ROPE_TYPES and parameters.get("partial_rotary_factor", 1.0) == 1.0,
                "rope_parameters",
                {kind: parameters},
                f"a rope_type of {STATIC_ROPE_TYPES} on whole heads: others make a text's vector depend on its batch",
            )
        slides = "sliding_attention" in (self.layer_types or [])
        _require(
            (self.sliding_window is None and not slides) or (self.sliding_window or 0) >= 1,
            "sliding_window",
            self.sliding_window,
            "an integer of at least 1" + ("" if slides else ", or None"),
        )
        _require(
            self.classifier_head == "transform" or self.classifier_pooling == "cls",
            "classifier_pooling",
            self.classifier_pooling,
            "'cls' with classifier_head='pooler'",
        )

    def validate_mixture(self):
        """Experts, groups and widths that fit together."""
        _require(self.num_experts >= 2, "num_experts", self.num_experts, "at least 2: one expert leaves nothing to route")
        _require(
            self.n_group >= 1 and self.num_experts % self.n_group == 0,
            "n_group",
            self.n_group,
            f"a divisor of num_experts={self.num_experts}",
        )
        _require(
            1 <= self.topk_group <= self.n_group,
            "topk_group",
            self.topk_group,
            f"between 1 and n_group={self.n_group}",
        )
        by_text = self.group_routing == "sequence"
        if self.preserve_first_group:
            _require(self.n_group > 1, "n_group", self.n_group, "2 or more with preserve_first_group=True")
            _require(self.topk_group == 1, "topk_group", self.topk_group, "1 with preserve_first_group=True")
            _require(by_text, "group_routing", self.group_routing, "'sequence' with preserve_first_group=True")
        if self.group_input == "word_embeddings":
            _require(self.n_group > 1, "n_group", self.n_group, "2 or more with group_input='word_embeddings'")
            _require(by_text, "group_routing", self.group_routing, "'sequence' with group_input='word_embeddings'")
        open_experts = self.topk_group * self.experts_per_group
        _require(
            1 <= self.num_experts_per_tok <= open_experts,
            "num_experts_per_tok",
            self.num_experts_per_tok,
            f"between 1 and {open_experts}, the experts in topk_group={self.topk_group} open group(s) of "
            f"{self.experts_per_group}",
        )
        if self.combine_rule == "normalized":
            others = "'selection' or 'softmax'"
            _require(
                self.num_experts_per_tok > 1,
                "combine_rule",
                self.combine_rule,
                f"{others} when num_experts_per_tok=1: a single normalized weight is always 1, so the router would get no "
                "gradient",
            )
            _require(
                self.n_group == 1 or self.topk_group > 1,
                "combine_rule",
                self.combine_rule,
                f"{others} when topk_group=1 of n_group={self.n_group}: the group's probability cancels out of the "
                "normalized weights, so the group gate would get no gradient",
            )
        if not self.sparse_layers:
            return
        for name, smallest in (("moe_intermediate_size", WIDTH_MULTIPLE), ("shared_expert_intermediate_size", 0)):
            value = getattr(self, name)
            _require(
                value >= smallest and value % WIDTH_MULTIPLE == 0,
                name,
                value,
                f"a multiple of {WIDTH_MULTIPLE}, at least {smallest} (grouped matrix products need rows of 16 bytes; "
                f"intermediate_size is {self.intermediate_size})",
            )
        _require(
            self.hidden_size % WIDTH_MULTIPLE == 0,
            "hidden_size",
            self.hidden_size,
            f"a multiple of {WIDTH_MULTIPLE} in a model with sparse layers",
        )

    def parameter_counts(self, add_pooling_layer: bool | None = None) -> ParameterCounts:
        """Count the parameters of `HagMoeModel(self, add_pooling_layer)` without building it.

        Args:
            add_pooling_layer: Whether the model has a pooler; `has_pooler` where None.

        Returns:
            Total, active and embedding parameters; a test asserts them equal to the built model's.
        """
        has_pooler = self.has_pooler if add_pooling_layer is None else add_pooling_layer
        D, E, G = self.hidden_size, self.num_experts, self.n_group
        positions = self.max_position_embeddings if self.position_embedding_type == "absolute" else 0
        embedding = (self.vocab_size + positions + self.type_vocab_size) * D

        def mlp(width: int | None) -> int:
            inner = (width or 0) * (2 if self.gated_mlp else 1)
            return inner * D + (width or 0) * D + self.mlp_bias * (inner + D)

        expert = mlp(self.moe_intermediate_size)
        shared = mlp(self.shared_expert_intermediate_size)  # without a shared expert: the block's output bias alone
        groups_by_sequence = G > 1 and self.group_routing == "sequence"
        router = D * groups_by_sequence + D * G * (G > 1) + D * E * (E > G)
        norm = D * (1 + self.norm_bias)
        attention = 4 * (D * D + self.attention_bias * D)

        n_sparse = len(self.sparse_layers)
        n_dense = self.num_hidden_layers - n_sparse
        # Two norms per layer and one after the embeddings; "pre" swaps the first of them all for one after the last layer
        norms = (2 * self.num_hidden_layers + 1) * norm
        fixed = embedding + norms + self.num_hidden_layers * attention + n_dense * mlp(self.intermediate_size)
        fixed += n_sparse * (shared + router) + has_pooler * (D * D + D)
        memory = (self.ngram_memory_size + 1) * D if self.ngram_memory_size else 0  # row 0: every n-gram it does not know
        return ParameterCounts(
            total=fixed + n_sparse * E * expert + memory,
            active=fixed + n_sparse * self.num_experts_per_tok * expert,
            embedding=embedding,
            memory=memory,
        )


def _require(holds: bool, field: str, value: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{field}={value!r} is not possible; allowed: {allowed}.")


__all__ = ["HagMoeConfig", "ParameterCounts"]
