import pytest
import torch
from conftest import MODES, SHAPES, spread, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers.activations import ACT2FN

from hagmoe_hf import HagMoeModel, kernels_hagmoe
from hagmoe_hf.kernels_hagmoe import activate, linear
from hagmoe_hf.routing_hagmoe import RealTokens

each_mode = pytest.mark.parametrize("changes", MODES.values(), ids=MODES.keys())


def tiny_model(**changes) -> HagMoeModel:
    return spread(HagMoeModel(tiny_config(**changes))).eval()


def batch(mask: list[list[int]], seed: int = 0) -> dict[str, torch.Tensor]:
    mask = torch.tensor(mask)
    ids = torch.randint(1, 99, mask.shape, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("feeds_linear", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1, 12), (2, 9), (1, 18), (1, 19)])
def test_a_product_turned_around_is_the_same_product(shape, feeds_linear, has_bias, monkeypatch):
    """A query must not get another vector than the same text inside a corpus."""
    monkeypatch.setattr(kernels_hagmoe, "FEW_TOKENS", range(12, 19))
    monkeypatch.setattr(kernels_hagmoe, "FEWEST_THREADS", 1)
    generator = torch.Generator().manual_seed(0)
    states, weight = torch.randn(*shape, 24, generator=generator), torch.randn(40, 24, generator=generator)
    bias = torch.randn(40, generator=generator) if has_bias else None
    with torch.no_grad():
        got = linear(states, weight, bias, feeds_linear=feeds_linear)
    assert got.shape == (*shape, 40)
    assert torch.allclose(got, F.linear(states, weight, bias), atol=1e-5)
    assert got.is_contiguous() != (feeds_linear and shape[0] * shape[1] in kernels_hagmoe.FEW_TOKENS), "transposed in memory"


@torch.no_grad()
def test_a_single_thread_turns_no_product_around(monkeypatch):
    monkeypatch.setattr(kernels_hagmoe, "FEW_TOKENS", range(12, 19))
    for fewest, is_plain in ((1, False), (torch.get_num_threads() + 1, True)):
        monkeypatch.setattr(kernels_hagmoe, "FEWEST_THREADS", fewest)
        assert linear(torch.randn(12, 24), torch.randn(40, 24), None, feeds_linear=True).is_contiguous() == is_plain


def test_with_gradients_a_product_is_the_plain_one():
    """Training must meet nothing but torch's own, differentiable functions."""
    states, weight = torch.randn(1, 16, 24), torch.randn(40, 24, requires_grad=True)
    plain = weight.detach().clone().requires_grad_()
    for product in (linear(states, weight, None), F.linear(states, plain)):
        product.sum().backward()
    assert torch.equal(weight.grad, plain.grad)


def test_an_activation_overwrites_its_input_only_where_no_gradient_needs_it():
    """In place under autograd would be an error, or a wrong gradient; a copy in inference would cost the memory again."""
    gelu = ACT2FN["gelu"]
    states = torch.randn(5, 8)
    kept, expected = states.clone(), F.gelu(states)
    assert torch.equal(activate(gelu, states), expected)
    assert torch.equal(states, kept)
    with torch.no_grad():
        assert torch.equal(activate(ACT2FN["gelu_new"], states), ACT2FN["gelu_new"](states))
        assert torch.equal(states, kept)
        assert torch.equal(activate(gelu, states), expected)
    assert torch.equal(states, expected)


def test_the_default_on_cpu_is_never_a_batched_product_and_a_request_is_honoured():
    """`batched_mm` copies an expert's weights for every token; on CPU it is slower by a factor of a hundred."""
    assert tiny_model().config._experts_implementation == "segmented_mm"
    assert HagMoeModel._from_config(tiny_config(), experts_implementation="grouped_mm").config._experts_implementation == (
        "grouped_mm"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 2])
def test_rows_added_for_a_rounder_shape_change_neither_output_nor_gradient(dtype, top_k):
    """Outside of float32 an expert's rows are rounded up; in float64 the smallest trace would show."""
    torch.manual_seed(0)
    experts = tiny_model(num_experts_per_tok=top_k).layers[1].mlp.experts.to(dtype)
    states = torch.randn(150, experts.down_proj.shape[1], dtype=dtype, requires_grad=True)
    none = experts.num_experts
    # Unevenly, one expert without a token, some tokens without an expert
    first = torch.cat([torch.zeros(97), torch.randint(1, none - 1, (45,)), torch.full((8,), none)]).long()
    index = torch.stack([first, torch.where(first < none, (first + 1) % (none - 1), none)], dim=-1)[:, :top_k]
    weights = (index < none).to(dtype) * torch.rand(150, top_k, dtype=dtype)
    found = {}
    for implementation in ("segmented_mm", "eager"):
        experts.config._experts_implementation = implementation
        output = experts(states, index, weights)
        found[implementation] = output, *torch.autograd.grad(output.square().sum(), [states, *experts.parameters()])
    tolerance = 1e-12 if dtype == torch.float64 else 0.05
    for ours, eager in zip(*found.values(), strict=True):
        assert torch.allclose(ours, eager, atol=tolerance * eager.abs().max().item(), rtol=0)


@each_mode
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=2, max_size=5).filter(any), left=st.booleans(), seed=st.integers(0, 99))
def test_leaving_padding_out_changes_no_vector(changes, lengths, left, seed):
    """Recording turns it off, so the same texts go both ways."""
    width = max(lengths) + 2
    rows = [[1] * length + [0] * (width - length) for length in lengths]
    inputs = batch([row[::-1] for row in rows] if left else rows, seed)
    model = tiny_model(mlp_layer_types=["sparse"] * 3, **changes)
    with torch.no_grad():
        alone, recorded = model(**inputs), model(**inputs, output_hidden_states=True)
    assert torch.allclose(alone.last_hidden_state, recorded.last_hidden_state, atol=1e-5)
    assert (alone.last_hidden_state[inputs["attention_mask"] == 0] == 0).all()


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any), is_tracing=st.booleans())
def test_attention_gets_every_text_whole_and_gives_every_token_back(lengths, is_tracing):
    """Texts of equal length run together; a token in another text's place would be a wrong vector."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    real_tokens = RealTokens.from_mask(mask, is_tracing)
    packed = real_tokens.unpad(torch.arange(1, 1 + mask.numel()).view(mask.shape)).unsqueeze(-1)
    parts = real_tokens.split(packed)
    assert [tuple(part.shape[:2]) for part in parts] == list(real_tokens.attention_shapes)
    assert torch.equal(real_tokens.join(parts), packed)
    texts = [row[row != 0].tolist() for part in parts for row in part.squeeze(-1)]
    expected = [(1 + row * mask.shape[1] + torch.arange(length)).tolist() for row, length in enumerate(lengths) if length]
    assert sorted(filter(None, texts)) == expected
    if not is_tracing:
        assert all((part != 0).all() for part in parts)
        assert len(parts) == len(set(lengths) - {0})


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_leaving_padding_out_keeps_windows(attention, holes):
    """A window counts positions: padding between two tokens of a text keeps them apart."""
    mask = [[1] * 12, [1] * 7 + [0] * 5, [0] * 8 + [1] * 4, [1] * 7 + [0] * 5]
    inputs = batch([*mask, [1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 1, 0]] if holes else mask)
    model = tiny_model(**SHAPES["modernbert"])
    model.set_attn_implementation(attention)
    with torch.no_grad():
        alone, recorded = model(**inputs), model(**inputs, output_hidden_states=True)
    assert torch.allclose(alone.last_hidden_state, recorded.last_hidden_state, atol=1e-5)


def test_gradients_are_the_same_without_padding(monkeypatch):
    """Training runs without padding, too; only the time may change."""
    inputs = batch([[1] * 9, [1] * 3 + [0] * 6, [1] + [0] * 8])
    grads = []
    for most_real in (1.0, 0.0):
        monkeypatch.setattr("hagmoe_hf.modeling_hagmoe.MOST_REAL", most_real)
        model = tiny_model(mlp_layer_types=["sparse"] * 3)
        (model(**inputs).last_hidden_state ** 2).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], atol=1e-4, rtol=1e-4), name


def test_padding_never_enters_a_feed_forward_block():
    """Dense layers, too: a batch of mixed lengths is mostly padding."""
    model = tiny_model()
    seen = []
    for layer in model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:2].numel()))
    with torch.no_grad():
        model(**batch([[1] * 9, [1] * 3 + [0] * 6]))
    assert seen == [12] * 3


def test_adapters_take_part_in_a_short_query():
    """An adapter wraps its linear layer; a product that went around the wrapper would lose what was learned."""
    peft = pytest.importorskip("peft")
    inputs = batch([[1] * 16])
    model = tiny_model()
    with torch.no_grad():
        before = model(**inputs).last_hidden_state
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=["down_proj", "o_proj"], init_lora_weights=False)
        )
        after = adapted.eval()(**inputs).last_hidden_state
        merged = adapted.merge_and_unload()(**inputs).last_hidden_state
    assert (after - before).abs().max() > 1e-3
    assert torch.allclose(after, merged, atol=1e-5)
