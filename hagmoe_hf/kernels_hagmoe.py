"""How matrix products and experts are computed fast on CPU; the numbers are those of the plain ways, up to rounding.

This file travels to the Hub beside the weights, so it imports nothing but torch and transformers.

Axes:  T tokens   D in_features or hidden_size   N out_features   E experts   K experts per token
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers.activations import GELUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

# So few tokens multiply faster as `weight @ states.T` (docs/results/kernel-choices.json): MKL repacks no weight then. Not on
# processors with matrix units, although these take no part in float32 (docs/results/kernel-choices-amx.json).
FEW_TOKENS = range(0) if getattr(torch.cpu, "_is_amx_tile_supported", bool)() else range(12, 49)
# Nor on a single thread, which loses by it (docs/results/kernel-choices-avx2.json); several share the rows of the weight
FEWEST_THREADS = 2
# Outside of float32 every shape that was not seen lately is prepared anew, so an expert's rows are rounded up (same file)
ROUND_ROWS = 64


def linear(states: Tensor, weight: Tensor, bias: Tensor | None, *, feeds_linear: bool = False) -> Tensor:
    """`F.linear`, turned around for the few tokens of a query where nothing needs a gradient.

    Args:
        states: (..., D).
        weight: (N, D).
        bias: (N,) or None.
        feeds_linear: Whether only an activation stands between this product and the next, which then takes it as it lies
            in memory, transposed; otherwise it is copied into the usual order.

    Returns:
        (..., N).
    """
    if not is_plain_inference(states, weight) or not _turns_around(states.numel() // states.shape[-1]):
        return F.linear(states, weight, bias)
    states_DT = states.reshape(-1, states.shape[-1]).t()
    product_NT = weight @ states_DT
    if feeds_linear:
        product_TN = (product_NT if bias is None else product_NT.add_(bias.unsqueeze(-1))).t()
    else:
        product_TN = states.new_empty(product_NT.shape[::-1])
        product_TN = product_TN.copy_(product_NT.t()) if bias is None else torch.add(product_NT.t(), bias, out=product_TN)
    return product_TN.view(*states.shape[:-1], -1)


def _turns_around(tokens: int) -> bool:
    return tokens in FEW_TOKENS and torch.get_num_threads() >= FEWEST_THREADS


def activate(act_fn: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
    """`act_fn(states)`, in place where no gradient needs `states`: a second large temporary costs page faults.

    A hook on `act_fn` sees its input as it was, and may change its output.
    """
    is_gelu = isinstance(act_fn, GELUActivation) and act_fn.act is F.gelu
    if is_gelu and not _has_hooks(act_fn) and is_plain_inference(states, states):
        return torch.ops.aten.gelu_(states)
    return act_fn(states)


def _has_hooks(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_plain_inference(states: Tensor, weight: Tensor) -> bool:
    """Whether these are ordinary float32 tensors in CPU memory, outside of autograd and of tracing."""
    return (
        not torch.is_grad_enabled()
        and states.device.type == "cpu"
        and states.dtype == weight.dtype == torch.float32
        and type(states) is Tensor
        and type(weight) in (Tensor, nn.Parameter)  # quantised and sharded weights multiply their own way
        and not is_traced()
    )


def is_traced() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace is watching, for whom nothing may depend on the data."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


class _HoldFirst(torch.autograd.Function):
    """Stacked weights (E, ...) as they are; no gradient reaches those of the first `count` experts."""

    @staticmethod
    def forward(stacked: Tensor, count: int) -> Tensor:  # type: ignore[override]
        return stacked.view_as(stacked)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:  # apart, as torch.func wants it
        ctx.count = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        held = gradient.clone()
        held[: ctx.count] = 0
        return held, None


def run_experts(experts: nn.Module, states: Tensor, index: Tensor, weights: Tensor, held: int = 0) -> Tensor:
    """The experts, in autocast's dtype where it is on, as every linear layer computes.

    Grouped products are unknown to autocast: with float32 weights they would run in float32, at a fraction of the speed.

    Args:
        experts: The experts module, whatever its implementation.
        states: (T, D).
        index: (T, K) int64.
        weights: (T, K).
        held: The weights of so many experts, the first ones, get no gradient; what comes before them does.

    Returns:
        (T, D), in autocast's dtype where it is on.

    Raises:
        ValueError: Experts are held, and there are weights beside theirs, such as adapters', which would move them.
    """
    device = states.device.type
    is_cast = torch.is_autocast_enabled(device)
    is_held = held > 0 and torch.is_grad_enabled()
    if not is_cast and not is_held:
        return experts(states, index, weights)
    given: dict[str, Tensor] = {name: stack for name, stack in experts.named_parameters() if stack.is_floating_point()}
    if is_held:
        if len({stack.shape[0] for stack in given.values()}) > 1:
            raise ValueError(
                f"preserve_first_group=True with {', '.join(given)}: adapters on experts move preserved texts; allowed: "
                "none there."
            )
        given = {name: _HoldFirst.apply(stack, held) for name, stack in given.items()}
    if is_cast:
        dtype = torch.get_autocast_dtype(device)
        given = {name: stack.to(dtype) for name, stack in given.items()}
        states, weights = states.to(dtype), weights.to(dtype)
    return functional_call(experts, given, (states, index, weights))


def segmented_mm_experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts on CPU: sort the tokens by expert once, then plain matrix products over each expert's segment.

    Elsewhere, and while traced, this is transformers' `grouped_mm`, which needs no counts on the host.

    Args:
        self: The experts module: stacked weights, `num_experts`, `has_gate`, `has_bias`, `act_fn`.
        hidden_states: (T, D).
        top_k_index: (T, K) int64 in [0, E]; E, which is `num_experts`, means "no expert".
        top_k_weights: (T, K).

    Returns:
        (T, D), the weighted sum over each token's experts.
    """
    if hidden_states.device.type != "cpu" or is_traced():
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    (num_tokens, top_k), num_experts = top_k_index.shape, self.num_experts
    choices = top_k_index.flatten()
    counts = choices.bincount(minlength=num_experts)[:num_experts].tolist()
    num_choices = sum(counts)
    # An unused stack must stay in the graph, or DDP would wait for its gradient
    used = [expert for expert, count in enumerate(counts) if count] or [0]
    is_sorted = top_k == 1 and counts[used[0]] == num_tokens  # as for a query that one expert takes whole
    order = None if is_sorted else choices.argsort(stable=True)[:num_choices]  # "no expert" comes last
    if order is None:
        states, place = hidden_states, None
    else:
        rows = order if top_k == 1 else order // top_k
        counts, place = (counts, None) if hidden_states.dtype == torch.float32 else _round_up(counts, order.device)
        if place is not None:
            rows = rows.new_zeros(sum(counts)).index_copy(0, place, rows)
        states = hidden_states.index_select(0, rows)
    segments = states.split(counts)
    outputs = [expert_forward(self, segments[expert], weights) for expert, weights in expert_weights(self, used)]
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if place is not None:
        output = output.index_select(0, place)
    if order is not None:
        size = num_tokens * top_k
        target = output.new_empty if num_choices == size else output.new_zeros
        output = target(size, output.shape[-1]).index_copy_(0, order, output)
    if top_k > 1:
        return (top_k_weights.unsqueeze(1) @ output.view(num_tokens, top_k, -1)).squeeze(1)
    if torch.is_grad_enabled() or self.config.combine_rule == "softmax":
        return output * top_k_weights
    return output  # the other rules give one expert the weight 1


def _round_up(counts: list[int], device: torch.device) -> tuple[list[int], Tensor]:
    """Counts as multiples of `ROUND_ROWS`, and where the real rows lie, (rows,) int64: others are computed and dropped."""
    rounded = [-(-count // ROUND_ROWS) * ROUND_ROWS for count in counts]
    real = torch.tensor(counts, device=device)
    before = torch.tensor([up - count for up, count in zip(rounded, counts, strict=True)], device=device)
    shift = before.cumsum(0) - before
    return rounded, torch.arange(int(real.sum()), device=device) + shift.repeat_interleave(real)


def expert_weights(self: Any, used: Iterable[int]) -> Iterator[tuple[int, tuple]]:
    """For every used expert its number, and (up weight, up bias, down weight, down bias); None for a missing bias."""
    up_name = "gate_up_proj" if self.has_gate else "up_proj"
    names = [name for kind in (up_name, "down_proj") for name in (kind, f"{kind}_bias")]
    stacks = [getattr(self, name) if self.has_bias or not name.endswith("_bias") else None for name in names]
    if torch.is_grad_enabled():
        # Once: the backward of a slice `stack[expert]` would allocate a zero tensor of the whole stack
        stacks = [None if stack is None else stack.unbind(0) for stack in stacks]
    for expert in used:
        yield expert, tuple(None if stack is None else stack[expert] for stack in stacks)


def expert_forward(self: Any, states: Tensor, weights: tuple) -> Tensor:
    """One expert, whose weights `expert_weights` gave, on its own tokens: (tokens, D) -> (tokens, D)."""
    up, up_bias, down, down_bias = weights
    inner = linear(states, up, up_bias, feeds_linear=True)
    if self.has_gate:
        gate, inner_up = inner.chunk(2, dim=-1)
        inner = activate(self.act_fn, gate) * inner_up
    else:
        inner = activate(self.act_fn, inner)
    return linear(inner, down, down_bias)


ALL_EXPERTS_FUNCTIONS.register("segmented_mm", segmented_mm_experts_forward)

__all__ = [
    "activate",
    "expert_forward",
    "expert_weights",
    "is_plain_inference",
    "is_traced",
    "linear",
    "run_experts",
    "segmented_mm_experts_forward",
]
