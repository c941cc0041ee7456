import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hagmoe_hf.routing_hagmoe import attention_pool, route


def plain_route(group_logits, expert_logits, token_mask, topk_group, top_k, combine_rule):
    """The definition, token by token in Python floats: lists of (chosen experts, weights, log-probabilities)."""

    def log_softmax(values):
        top = max(values)
        norm = top + math.log(sum(math.exp(v - top) for v in values))
        return [v - norm for v in values]

    batch, length = token_mask.shape
    num_groups = 1 if group_logits is None else group_logits.shape[-1]
    per_group = 1 if expert_logits is None else expert_logits.shape[-1] // num_groups
    rows = []
    for b in range(batch):
        for t in range(length):
            if group_logits is None:
                groups = [0.0]
            else:
                groups = log_softmax(group_logits[b, min(t, group_logits.shape[1] - 1)].tolist())
            log_probs = []
            for g in range(num_groups):
                own = [0.0] if expert_logits is None else expert_logits[b, t, g * per_group : (g + 1) * per_group].tolist()
                log_probs += [groups[g] + value for value in log_softmax(own)]
            opened = sorted(range(num_groups), key=lambda g: (-groups[g], g))[:topk_group]
            candidates = [g * per_group + r for g in sorted(opened) for r in range(per_group)]
            chosen = sorted(candidates, key=lambda e: (-log_probs[e], e))[:top_k]
            weights = [math.exp(log_probs[e]) for e in chosen]
            if combine_rule == "selection":
                weights = [1 / top_k] * top_k
            elif combine_rule == "normalized":
                weights = [w / sum(weights) for w in weights]
            if not token_mask[b, t]:
                chosen, weights = [num_groups * per_group] * top_k, [0.0] * top_k
            rows.append((chosen, weights, log_probs))
    return rows


@st.composite
def routings(draw):
    groups, per_group = draw(st.sampled_from([(1, 4), (2, 3), (4, 2), (4, 1), (3, 5)]))
    topk_group = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, topk_group * per_group))
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    by_sequence = draw(st.booleans()) and per_group > 1
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    # halves and few of them: equal probabilities are common, and representable
    scale = draw(st.sampled_from([0.5, 2.0, 20.0]))
    group_logits = expert_logits = None
    if groups > 1:
        group_logits = (
            scale * torch.randint(-3, 4, (batch, 1 if by_sequence else length, groups), generator=generator).float()
        )
    if per_group > 1:
        expert_logits = scale * torch.randint(-3, 4, (batch, length, groups * per_group), generator=generator).float()
    token_mask = torch.rand(batch, length, generator=generator) < 0.7
    rule = draw(st.sampled_from(["selection", "softmax", "normalized"]))
    return group_logits, expert_logits, token_mask, topk_group, top_k, rule


@settings(max_examples=150, deadline=None)
@given(routings())
def test_routing_is_its_definition_token_by_token(case):
    """Whoever analyses, exports or rewrites the router relies on this definition, ties included."""
    group_logits, expert_logits, token_mask, topk_group, top_k, rule = case
    routing = route(
        group_logits, expert_logits, token_mask, topk_group=topk_group, top_k=top_k, combine_rule=rule, dtype=torch.float32
    )
    rows = plain_route(group_logits, expert_logits, token_mask, topk_group, top_k, rule)
    for row, (chosen, weights, log_probs) in enumerate(rows):
        assert routing.router_logits[row].tolist() == pytest.approx(log_probs, abs=1e-4)
        # experts of equal probability may differ in the last bit of either sum: compare what was chosen by probability
        picked = routing.expert_index[row].tolist()
        if chosen[0] < len(log_probs):
            assert [log_probs[e] for e in picked] == pytest.approx([log_probs[e] for e in chosen], abs=1e-4)
            assert len(set(picked)) == top_k
        else:
            assert picked == chosen
        assert routing.expert_weight[row].tolist() == pytest.approx(weights, abs=1e-5)
    assert routing.router_logits.exp().sum(-1) == pytest.approx(torch.ones(len(rows)), abs=1e-5)


@pytest.mark.parametrize("per_group", [1, 2])
def test_equal_probabilities_go_to_the_lowest_id(per_group):
    """`topk` promises no order, so the same text could be routed differently on another machine."""
    group_logits = torch.zeros(2, 3, 4)
    expert_logits = None if per_group == 1 else torch.zeros(2, 3, 4 * per_group)
    routing = route(group_logits, expert_logits, None, topk_group=2, top_k=2, combine_rule="softmax", dtype=torch.float32)
    assert routing.expert_index.tolist() == [[0, 1]] * 6


def test_padding_gets_no_expert_and_no_weight():
    """Padding that is routed costs time, and padding that is counted spoils the balance."""
    mask = torch.tensor([[True, True, False]])
    routing = route(None, torch.randn(1, 3, 4), mask, topk_group=1, top_k=2, combine_rule="softmax", dtype=torch.float32)
    assert routing.expert_index[2].tolist() == [4, 4]
    assert routing.expert_weight[2].tolist() == [0.0, 0.0]
    assert (routing.expert_index[:2] < 4).all()


def test_selection_weighs_exactly_one_with_the_gradient_of_the_probability():
    """Weight 1 is what makes upcycling exact; the gradient is what lets the router learn."""
    logits = torch.randn(1, 5, 4, requires_grad=True)
    routing = route(None, logits, None, topk_group=1, top_k=1, combine_rule="selection", dtype=torch.float32)
    assert (routing.expert_weight == 1.0).all()
    (gradient,) = torch.autograd.grad(routing.expert_weight.sum(), logits)
    probability = logits.softmax(-1).gather(-1, routing.expert_index.view(1, 5, 1))
    (expected,) = torch.autograd.grad(probability.sum(), logits)
    assert torch.allclose(gradient, expected, atol=1e-7)
    assert gradient.abs().max() > 0.05


def test_a_sequence_is_summarised_by_its_own_real_tokens():
    """A summary that saw padding or a neighbour would make a text's vector depend on its batch."""
    generator = torch.Generator().manual_seed(0)
    states, query = torch.randn(2, 4, 8, generator=generator), torch.randn(8, generator=generator)
    mask = torch.tensor([[True, True, False, False], [False, True, True, True]])
    pooled = attention_pool(states, query, mask)
    for row in range(2):
        own = states[row, mask[row]]
        weights = torch.softmax(own @ query / math.sqrt(8), dim=0)
        assert torch.allclose(pooled[row], weights @ own, atol=1e-6)
    assert torch.allclose(attention_pool(states, query, None), attention_pool(states, query, torch.ones_like(mask)))


def test_a_sequence_without_real_tokens_has_a_finite_summary():
    """One empty row in a batch must not turn into NaN."""
    pooled = attention_pool(torch.randn(1, 3, 8), torch.randn(8), torch.zeros(1, 3, dtype=torch.bool))
    assert torch.isfinite(pooled).all()


def test_nothing_to_route_by_is_refused():
    with pytest.raises(ValueError, match="group_logits=None and expert_logits=None"):
        route(None, None, None, topk_group=1, top_k=1, combine_rule="softmax", dtype=torch.float32)
