import math

import pytest
import torch
from conftest import MODES, TINY, route_hard, spread, tiny_config
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, RobertaConfig, RobertaModel

from hagmoe_hf import HagMoeForMaskedLM, HagMoeForSequenceClassification, HagMoeModel, upcycle
from hagmoe_hf.modeling_hagmoe import HagMoeSparseMLP

IMPLEMENTATIONS = ["segmented_mm", "eager", "grouped_mm", "batched_mm"]
each_mode = pytest.mark.parametrize("changes", MODES.values(), ids=MODES.keys())


def tiny_model(cls=HagMoeModel, **changes):
    return spread(cls(tiny_config(**changes)))


def texts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, TINY["vocab_size"], (length,), generator=generator).tolist() for length in lengths]


def pad(batch: list[list[int]], side: str = "right", extra: int = 0, padding_id: int = 0) -> dict[str, torch.Tensor]:
    width = max(map(len, batch)) + extra
    ids, mask = [], []
    for text in batch:
        padding = [padding_id] * (width - len(text))
        hidden = [0] * len(padding)
        ids.append(text + padding if side == "right" else padding + text)
        mask.append([1] * len(text) + hidden if side == "right" else hidden + [1] * len(text))
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def plain_block(block: HagMoeSparseMLP, hidden_states, token_mask, round_each_step=None):
    """A sparse block as nested Python loops over texts, tokens and experts; `round_each_step` imitates a dtype."""
    rounded = round_each_step or (lambda x: x)
    routing = block.router(hidden_states, token_mask)
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    experts = block.experts
    rows = []
    for token in range(flat.shape[0]):
        total = torch.zeros_like(flat[0])
        for slot in range(routing.expert_index.shape[1]):
            expert = int(routing.expert_index[token, slot])
            if expert == experts.num_experts:
                continue
            inner = rounded(experts.up_proj[expert] @ flat[token] + experts.up_proj_bias[expert])
            outer = rounded(experts.down_proj[expert] @ rounded(nn.functional.gelu(inner)) + experts.down_proj_bias[expert])
            total = rounded(total + rounded(outer * routing.expert_weight[token, slot]))
        common = block.output_bias if block.shared_expert is None else block.shared_expert(flat[token])
        rows.append(rounded(total + common))
    return torch.stack(rows).view_as(hidden_states)


def sparse_block(**changes) -> HagMoeSparseMLP:
    config = tiny_config(mlp_layer_types=["sparse"] * 3, **changes)
    return route_hard(spread(HagMoeModel(config)), 3.0).layers[0].mlp


def block_input(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(3, 6, TINY["hidden_size"], generator=generator)
    return states, torch.arange(6)[None] < torch.tensor([[6], [2], [4]])


def with_experts(block: HagMoeSparseMLP, implementation: str) -> HagMoeSparseMLP:
    block.experts.config._experts_implementation_internal = implementation
    return block


@each_mode
@pytest.mark.parametrize("shared", [32, 0])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_implementation_equals_the_plain_nested_loop_in_values_and_gradients(implementation, shared, changes):
    """The fast paths are only worth having when they compute the same model."""
    block = with_experts(sparse_block(shared_expert_intermediate_size=shared, **changes), implementation)
    states, mask = block_input()

    def run(function):
        block.zero_grad()
        inputs = states.clone().requires_grad_()
        output = function(inputs)
        (output * mask.unsqueeze(-1) * torch.arange(1, 1 + output.numel()).view_as(output).sin()).sum().backward()
        return (
            output[mask],
            inputs.grad,
            {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None},
        )

    output, input_grad, grads = run(lambda x: block(x, mask))
    plain_output, plain_input_grad, plain_grads = run(lambda x: plain_block(block, x, mask))
    assert torch.allclose(output, plain_output, atol=1e-5)
    assert torch.allclose(input_grad, plain_input_grad, atol=1e-4)
    assert grads.keys() == plain_grads.keys()
    for name, grad in grads.items():
        assert torch.allclose(grad, plain_grads[name], atol=1e-4, rtol=1e-4), name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_implementation_is_less_accurate_than_the_plain_loop(dtype, implementation):
    """Values and gradients are compared with a float64 truth, so the tolerance is measured, not guessed."""
    states, mask = block_input()

    def outcome(block, run, states):
        """Real tokens' output, and the gradients of input and experts."""
        inputs = states.clone().requires_grad_()
        output = run(block, inputs)
        (output * mask.unsqueeze(-1)).sum().backward()
        return [output[mask], inputs.grad] + [p.grad for p in block.experts.parameters()]

    def plain_in_dtype(block, inputs):
        return plain_block(block, inputs, mask, lambda x: x.to(dtype))

    truth_block = with_experts(sparse_block(num_experts_per_tok=2), "eager").to(dtype).double()
    truth = outcome(truth_block, lambda block, inputs: plain_block(block, inputs, mask), states.to(dtype).double())
    block = with_experts(sparse_block(num_experts_per_tok=2), implementation).to(dtype)
    index = block.router(states.to(dtype), mask).expert_index
    assert torch.equal(index, truth_block.router(states.to(dtype).double(), mask).expert_index)
    got = outcome(block, lambda block, inputs: block(inputs, mask), states.to(dtype))
    block.zero_grad()
    plain = outcome(block, plain_in_dtype, states.to(dtype))
    names = ["output", "input", *dict(block.experts.named_parameters())]
    for name, value, plain_value, exact in zip(names, got, plain, truth, strict=True):
        error, plain_error = ((v.double() - exact).abs().max() for v in (value, plain_value))
        assert error <= 1.5 * plain_error + torch.finfo(dtype).eps * exact.abs().max(), name


@each_mode
@pytest.mark.parametrize("combine_rule", ["selection", "softmax", "normalized"])
def test_the_router_gets_a_task_gradient_in_every_combine_rule(combine_rule, changes):
    """A router without a gradient never learns, and nothing says so."""
    changes = {**changes, "combine_rule": combine_rule, "mlp_layer_types": ["sparse"] * 3}
    no_gradient = combine_rule == "normalized" and (
        changes.get("num_experts_per_tok", 1) == 1 or (changes.get("n_group", 4) > 1 and changes.get("topk_group", 1) == 1)
    )
    if no_gradient:
        with pytest.raises(StrictDataclassError, match="would get no gradient"):
            tiny_config(**changes)
        return
    block = spread(HagMoeModel(tiny_config(**changes))).layers[0].mlp
    states, mask = block_input()
    block(states, mask)[mask].square().sum().backward()
    for name, parameter in block.router.named_parameters():
        assert parameter.grad.abs().max() > 1e-4, name


batches = st.lists(st.integers(1, 20), min_size=1, max_size=5)


@each_mode
@settings(max_examples=12, deadline=None)
@given(lengths=batches, seed=st.integers(0, 1000), extra=st.integers(0, 5), side=st.sampled_from(["left", "right"]))
def test_a_text_ignores_its_neighbours_its_padding_and_its_place(changes, lengths, seed, extra, side):
    """Otherwise the same text would embed differently depending on what it is batched with."""
    model = tiny_model(**changes)
    batch = texts(*lengths, seed=seed)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed)).tolist()
    together = pad([batch[i] for i in order], side, extra, padding_id=seed % TINY["vocab_size"])
    with torch.inference_mode():
        outputs = model(**together, output_expert_index=True)
        for row, i in enumerate(order):
            alone = model(torch.tensor([batch[i]]), output_expert_index=True)
            real = together["attention_mask"][row].bool()
            difference = (outputs.last_hidden_state[row, real] - alone.last_hidden_state[0]).abs().max()
            assert difference <= 1e-5
            for in_batch, by_itself in zip(outputs.expert_index, alone.expert_index, strict=True):
                assert torch.equal(in_batch.view(len(order), -1, in_batch.shape[-1])[row, real], by_itself)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_never_reaches_an_expert(implementation):
    """The stock implementations only skip it through a private flag: this fails if transformers renames the flag."""
    block = with_experts(sparse_block(), implementation)
    states, mask = block_input()
    index = block.router(states, mask).expert_index
    spoiled = states.masked_fill(~mask.unsqueeze(-1), float("nan")).flatten(0, 1)
    weight = torch.ones_like(index, dtype=states.dtype).masked_fill(~mask.view(-1, 1), 0)
    clean = block.experts(states.flatten(0, 1), index, weight)[mask.flatten()]
    if implementation != "batched_mm":  # which computes padding and drops it, so its NaN would show nothing
        assert torch.equal(block.experts(spoiled, index, weight)[mask.flatten()], clean)
    assert (block.experts(states.flatten(0, 1), index, weight)[~mask.flatten()] == 0).all()


@pytest.mark.parametrize("attention", ["eager", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_attention_functions_agree(attention):
    """A user who switches the attention function must keep the vectors."""
    model = tiny_model()
    inputs = pad(texts(3, 9, 5))
    mask = inputs["attention_mask"].bool()
    with torch.inference_mode():
        expected = model(**inputs).last_hidden_state[mask]
        model.set_attn_implementation(attention)
        assert torch.allclose(model(**inputs).last_hidden_state[mask], expected, atol=1e-5)


@each_mode
def test_embeddings_can_be_given_instead_of_ids(changes):
    """Adversarial training, prefix tuning and attribution pass `inputs_embeds`."""
    model = tiny_model(**changes)
    inputs = pad(texts(3, 7))
    with torch.inference_mode():
        expected = model(**inputs).last_hidden_state
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        got = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).last_hidden_state
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite_and_close(dtype, tmp_path):
    """Served models run in half precision; NaN there has been a bug of other packages."""
    model = spread(HagMoeModel(tiny_config()), scale=0.1)
    model.save_pretrained(tmp_path)
    half = AutoModel.from_pretrained(tmp_path, dtype=dtype)
    inputs = pad(texts(3, 9, 30))
    with torch.inference_mode():
        expected, got = model(**inputs).last_hidden_state, half(**inputs).last_hidden_state
    assert got.dtype == dtype
    assert torch.isfinite(got).all()
    assert nn.functional.cosine_similarity(got.float(), expected, dim=-1)[inputs["attention_mask"].bool()].min() > 0.98


def test_the_router_computes_in_float32_under_autocast():
    """In bfloat16 two near probabilities would swap, and the text with them."""
    model = tiny_model()
    inputs = pad(texts(3, 9))
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**inputs, output_router_logits=True)
    assert all(logits.dtype == torch.float32 for logits in output.router_logits)
    sums = torch.stack(output.router_logits).exp().sum(-1)
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "segmented_mm"])
def test_experts_compute_in_autocasts_dtype(implementation):
    """Grouped products do not know autocast: they would stay in float32, right and several times slower."""
    model = tiny_model()
    model.set_experts_implementation(implementation)
    experts = next(layer.mlp.experts for layer in model.layers if layer.is_sparse)
    seen = []
    experts.register_forward_hook(lambda module, inputs, output: seen.append((module.up_proj.dtype, output.dtype)))
    inputs = pad(texts(3, 9))
    exact = model(**inputs).last_hidden_state
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(**inputs).last_hidden_state
    rounded.float().square().sum().backward()
    assert seen == [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)]
    assert torch.allclose(rounded.float(), exact, atol=0.05)
    assert experts.up_proj.grad.dtype == torch.float32
    assert experts.up_proj.grad.abs().max() > 0


def test_gradient_checkpointing_changes_no_gradient():
    """It trades time for memory and nothing else."""
    model = spread(HagMoeModel(tiny_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))).train()
    inputs = pad(texts(3, 9))

    def gradients():
        model.zero_grad()
        model(**inputs).last_hidden_state.square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.gradient_checkpointing_enable()
    got = gradients()
    assert got.keys() == expected.keys()
    assert all(torch.allclose(got[name], expected[name], atol=1e-5) for name in expected)


def test_every_expert_gets_a_gradient_entry_even_without_tokens():
    """DDP waits for the gradient of every parameter: an expert that is outside the graph would hang the ranks."""
    model = tiny_model()
    model.set_experts_implementation("eager")
    model(**pad(texts(2))).last_hidden_state.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".experts." in name)


def test_compiling_the_whole_graph_changes_nothing():
    """`torch.compile(fullgraph=True)` fails on any hidden synchronisation or Python branch on data."""
    model = tiny_model()
    inputs = pad(texts(3, 9, 5))
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        got = torch.compile(model, fullgraph=True)(**inputs).last_hidden_state
    assert torch.allclose(got, expected, atol=1e-5)


def test_an_exported_program_serves_other_batches_and_lengths():
    """ONNX and OpenVINO start from this export; experts that are empty in the example must work later."""
    model = tiny_model()
    example = pad(texts(3, 9, 5))
    shapes = {name: {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for name in example}
    with torch.no_grad():
        program = torch.export.export(model, args=(), kwargs=example, dynamic_shapes=shapes, strict=False).module()
        for lengths in ((3, 9, 5), (2, 17, 4, 30, 1)):
            inputs = pad(texts(*lengths, seed=3))
            expected = model(**inputs).last_hidden_state
            assert torch.allclose(program(**inputs).last_hidden_state, expected, atol=1e-5)


def test_requested_routing_is_returned_for_every_sparse_layer():
    """Analysis and auxiliary losses read it."""
    model = tiny_model(mlp_layer_types=["sparse", "dense", "sparse"], num_experts_per_tok=2)
    inputs = pad(texts(3, 9))
    output = model(**inputs, output_router_logits=True, output_expert_index=True, output_hidden_states=True)
    assert [tuple(x.shape) for x in output.router_logits] == [(18, 8), (18, 8)]
    assert [tuple(x.shape) for x in output.expert_index] == [(18, 2), (18, 2)]
    assert len(output.hidden_states) == 4
    assert model(**inputs).router_logits is None
    assert model(**inputs, return_dict=False)[0].shape == (2, 9, TINY["hidden_size"])


@pytest.mark.parametrize(
    ("cls", "auto"),
    [
        (HagMoeModel, AutoModel),
        (HagMoeForMaskedLM, AutoModelForMaskedLM),
        (HagMoeForSequenceClassification, AutoModelForSequenceClassification),
    ],
)
def test_every_class_comes_back_through_its_auto_class(cls, auto, tmp_path):
    """People load by `AutoModel*`, never by our class names."""
    model = tiny_model(cls)
    model.save_pretrained(tmp_path)
    again, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is cls
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    inputs = pad(texts(3, 9))
    with torch.inference_mode():
        assert torch.equal(again(**inputs)[0], model(**inputs)[0])


def test_the_heads_learn():
    """Their losses are computed inside, so a wrong shape would only show here."""
    inputs = pad(texts(4, 9, 6))
    for cls, labels in (
        (HagMoeForMaskedLM, inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)),
        (HagMoeForSequenceClassification, torch.tensor([0, 1, 1])),
    ):
        torch.manual_seed(0)
        model = cls(tiny_config()).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(12):
            loss = model(**inputs, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0], cls


def test_the_decoder_is_tied_to_the_words():
    model = HagMoeForMaskedLM(tiny_config())
    assert model.lm_head.decoder.weight is model.model.embeddings.word_embeddings.weight
    model.resize_token_embeddings(105)
    assert model(**pad(texts(3))).logits.shape[-1] == 105


# What a user can get wrong


def test_features_of_sentence_transformers_are_ignored():
    """Its modules pass their own outputs along with the inputs."""
    model = tiny_model()
    inputs = pad(texts(3, 9))
    expected = model(**inputs).last_hidden_state
    extra = {"token_embeddings": expected, "sentence_embedding": expected[:, 0], "task": "query", "prompt_length": 2}
    assert torch.equal(model(**inputs, **extra).last_hidden_state, expected)


def test_a_text_of_only_padding_is_finite_and_harms_nobody():
    """It happens when an empty text is tokenised without special tokens."""
    model = tiny_model()
    inputs = pad([*texts(4, 6), []])
    with torch.inference_mode():
        output = model(**inputs, output_expert_index=True)
        alone = model(**pad(texts(4, 6)))
    assert torch.isfinite(output.last_hidden_state).all()
    assert torch.isfinite(output.pooler_output).all()
    assert torch.allclose(output.last_hidden_state[:2], alone.last_hidden_state, atol=1e-5)
    assert all((index.view(3, -1)[2] == 8).all() for index in output.expert_index)


REFUSED = {
    "no input": ({}, ValueError, "Exactly one of input_ids and inputs_embeds"),
    "no token": ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, ValueError, "at least one token"),
    "too long": ({"input_ids": torch.ones(1, 65, dtype=torch.long)}, ValueError, "65 tokens.*max_position_embeddings=64"),
    "id too high": ({"input_ids": torch.tensor([[1, 99]])}, IndexError, "input_ids holds 99; allowed: 0 to 98"),
    "negative id": ({"input_ids": torch.tensor([[1, -1]])}, IndexError, "input_ids holds -1"),
    "token type": (
        {"input_ids": torch.ones(1, 2, dtype=torch.long), "token_type_ids": torch.tensor([[0, 2]])},
        IndexError,
        "token_type_ids holds 2; allowed: 0 to 1",
    ),
    "position": (
        {"input_ids": torch.ones(1, 2, dtype=torch.long), "position_ids": torch.tensor([[63, 64]])},
        IndexError,
        "position_ids holds 64; allowed: 0 to 63",
    ),
    "mask of another shape": (
        {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 4)},
        ValueError,
        r"attention_mask has shape \(2, 4\); allowed: \(2, 3\)",
    ),
    "4-D mask": (
        {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 1, 3, 3)},
        ValueError,
        r"attention_mask has shape \(2, 1, 3, 3\)",
    ),
}


@pytest.mark.parametrize(("inputs", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_input_that_would_give_a_wrong_vector_is_refused(inputs, error, message):
    """A lost mask mixes texts silently; a bad id reads another row or crashes the GPU."""
    with pytest.raises(error, match=message):
        tiny_model()(**inputs)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value, tmp_path):
    """A diverged checkpoint would turn every vector into NaN, far from its cause."""
    model = tiny_model()
    with torch.no_grad():
        model.layers[1].mlp.experts.down_proj[3, 2, 1] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj in .* holds NaN or infinity"):
        AutoModel.from_pretrained(tmp_path)


def test_balancing_biases_that_are_not_finite_are_refused_by_name(tmp_path):
    """They would choose the same experts for every text, with finite vectors that look right."""
    model = tiny_model()
    model.layers[1].mlp.router.group_bias.fill_(math.nan)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.router\.group_bias in .* holds NaN or infinity"):
        AutoModel.from_pretrained(tmp_path)


def test_a_truncated_weights_file_is_refused_with_its_folder(tmp_path):
    """safetensors says that a header is incomplete, but not where."""
    tiny_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"A weights file of {tmp_path} is damaged"):
        AutoModel.from_pretrained(tmp_path)


def test_one_row_of_token_types_does_for_all_texts():
    """Stock encoders take it; here it must also survive that padding is left out."""
    model = spread(HagMoeModel(tiny_config()))
    ids, mask = torch.randint(3, 99, (2, 10)), torch.ones(2, 10, dtype=torch.long)
    mask[1, 4:] = 0
    with torch.inference_mode():
        one = model(ids, attention_mask=mask, token_type_ids=torch.zeros(1, 10, dtype=torch.long)).last_hidden_state
        assert torch.equal(one, model(ids, attention_mask=mask).last_hidden_state)


def test_a_padding_id_within_a_text_stands_where_roberta_puts_it():
    """Someone writes "<pad>" in a text: RoBERTa does not count it, and everything after it moves up."""
    torch.manual_seed(0)
    config = RobertaConfig(**{**TINY, "type_vocab_size": 1, "pad_token_id": 1, "max_position_embeddings": 40})
    parent = spread(RobertaModel(config), scale=0.2)
    ids, mask = torch.randint(3, 99, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    ids[0, 3] = ids[0, 7] = ids[1, 0] = 1
    mask[1, 6:] = 0
    ids[1, 6:] = 1
    with torch.inference_mode():
        for batch in ({"attention_mask": mask}, {"attention_mask": torch.ones_like(mask)}, {}):
            expected, got = (model(ids, **batch).last_hidden_state for model in (parent, upcycle(parent)))
            real = batch.get("attention_mask", torch.ones_like(mask)).bool()
            assert (got - expected)[real].abs().max() <= 1e-5


def test_a_hook_sees_what_a_module_computed():
    """Whoever looks inside must not find the activation written over the states."""
    model, seen = spread(HagMoeModel(tiny_config())), []
    model.layers[1].mlp.shared_expert.up_proj.register_forward_hook(lambda module, inputs, output: seen.append(output))
    ids = torch.randint(3, 99, (2, 10))
    with torch.no_grad():
        model(ids)
    model(ids)
    assert torch.allclose(seen[0], seen[1], atol=1e-5)


@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "sparse"])
def test_a_hook_on_an_activation_changes_what_follows(layer):
    """Somebody who switches an activation off, to see what it is for, must not be told that it does nothing."""
    model = spread(HagMoeModel(tiny_config()))
    ids = torch.randint(3, 99, (2, 10))
    mlp = model.layers[layer].mlp
    activations = [mlp.experts.act_fn, mlp.shared_expert.act_fn] if model.layers[layer].is_sparse else [mlp.act_fn]
    with torch.no_grad():
        before = model(ids).last_hidden_state
        for activation in activations:
            hook = activation.register_forward_hook(lambda module, inputs, output: output * 0)
            assert (model(ids).last_hidden_state - before).abs().max() > 1e-3
            hook.remove()
        assert torch.equal(model(ids).last_hidden_state, before)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("ngram_memory_size", [0, 40])
def test_a_traced_model_gives_its_vectors(ngram_memory_size):
    """torch.jit.trace is old, and still how some servers take a model."""
    model = spread(HagMoeModel(tiny_config(return_dict=False, ngram_memory_size=ngram_memory_size)))
    if ngram_memory_size:
        model.ngram_memory.names.copy_(torch.arange(3, 3 + ngram_memory_size))  # tokens are n-grams, too
        torch.nn.init.normal_(model.ngram_memory.rows[1:])
    ids, mask = torch.randint(3, 99, (2, 10)), torch.ones(2, 10, dtype=torch.long)
    with torch.inference_mode():
        traced = torch.jit.trace(model, (ids, mask), strict=False, check_trace=False)
        for shown, its_mask in ((ids, mask), (ids.repeat(2, 1).flip(1), mask.repeat(2, 1))):
            assert (traced(shown, its_mask)[0] - model(shown, its_mask)[0]).abs().max() <= 1e-5
