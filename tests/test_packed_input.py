"""Packed texts: several in one row without padding, as sentence-transformers sends them under flash attention."""

from collections import defaultdict
from functools import partial

import pytest
import torch
from conftest import SHAPES, TINY, route_hard, spread, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging import version
from torch.nn import functional as F
from transformers import DataCollatorWithFlattening, modeling_flash_attention_utils
from transformers import __version__ as transformers_version

from hagmoe_hf import HagMoeForMaskedLM, HagMoeForSequenceClassification, HagMoeModel
from hagmoe_hf.modeling_hagmoe import HagMoeForTokenClassification

ROUTERS = {
    "groups by sequence": {},
    "sequence router": {"n_group": 8, "topk_group": 2, "num_experts_per_tok": 2},
    "groups by token": {"group_routing": "token"},
    "flat token router": {"n_group": 1},
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def tiny_model(shape=SHAPES["bert"], cls=HagMoeModel, **changes):
    # Wide enough to matter, and narrow enough that float32 rounding stays well below the gate
    return spread(cls(tiny_config(**{**shape, **changes})), scale=0.2)


def texts(lengths, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, TINY["vocab_size"], (length,), generator=generator).tolist() for length in lengths]


def pad(batch: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, batch))
    return {
        "input_ids": torch.tensor([text + [0] * (width - len(text)) for text in batch]),
        "attention_mask": torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in batch]),
    }


def pack(batch: list[list[int]]) -> dict[str, torch.Tensor]:
    """What sentence-transformers makes of a batch, by the collator it uses."""
    collate = DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True, return_position_ids=True)
    packed = dict(collate([{"input_ids": text} for text in batch]))
    packed.pop("labels", None)
    return packed


ONLY = {
    "everything": None,
    "boundaries": {"input_ids", "cu_seq_lens_q", "cu_seq_lens_k"},
    "positions": {"input_ids", "position_ids"},
    "sequence index": {"input_ids", "seq_idx"},
}


def packed_and_padded(model, batch, only=None, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """Both ways' states of all real tokens, text after text: (tokens, D)."""
    padded, packed = pad(batch), pack(batch)
    packed = {name: value for name, value in packed.items() if only is None or name in only}
    with torch.inference_mode():
        expected = model(**padded).last_hidden_state[padded["attention_mask"].bool()]
        return model(**packed, **kwargs).last_hidden_state[0], expected


lengths_of_texts = st.lists(st.integers(1, 24), min_size=1, max_size=6)


@each_shape
@settings(max_examples=15, deadline=None)
@given(lengths=lengths_of_texts, seed=st.integers(0, 1000), router=st.sampled_from(sorted(ROUTERS)))
def test_packed_equals_padded(shape, lengths, seed, router):
    """Switching on flash attention packs a batch: nobody's vectors may change by it."""
    got, expected = packed_and_padded(tiny_model(shape, **ROUTERS[router]), texts(lengths, seed))
    assert (got - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("only", ONLY.values(), ids=ONLY.keys())
@pytest.mark.parametrize("attention", ["sdpa", "eager", pytest.param("flex_attention", marks=pytest.mark.slow)])
@each_shape
def test_every_sign_of_packing_works_under_every_attention_function(shape, attention, only):
    """Tools differ in what they send: boundaries, positions that restart, or an index."""
    model = tiny_model(shape)
    model.set_attn_implementation(attention)
    got, expected = packed_and_padded(model, texts((5, 1, 17, 9)), only)
    assert (got - expected).abs().max() <= 1e-5


@each_shape
def test_without_the_block_mask_sdpa_would_mix_texts(shape, monkeypatch):
    """What this room is for: plain attention over packed texts runs without a word, and is wrong."""
    model = tiny_model(shape, n_group=1)
    good, expected = packed_and_padded(model, texts((5, 1, 17, 9)))
    monkeypatch.setattr("hagmoe_hf.modeling_hagmoe.packed_sequence_mask_function", lambda index: None)
    bad, _ = packed_and_padded(model, texts((5, 1, 17, 9)))
    assert (good - expected).abs().max() <= 1e-5
    assert (bad - expected).abs().max() > 0.05


def test_without_its_own_summary_a_text_would_open_its_neighbours_groups(monkeypatch):
    """The mask alone does not do it: the attention gate reads whole sequences, too."""
    model = route_hard(tiny_model(n_group=8, mlp_layer_types=["sparse"] * 3))
    batch = texts((5, 1, 17, 9))
    good, expected = packed_and_padded(model, batch)
    monkeypatch.setattr(
        "hagmoe_hf.modeling_hagmoe.attention_pool_packed",
        lambda states, query, packing: states.mean(dim=1, keepdim=True).expand_as(states),
    )
    bad, _ = packed_and_padded(model, batch)
    assert (good - expected).abs().max() <= 1e-5
    assert (bad - expected).abs().max() > 0.05


def plain_flash(query, key, value, cu_seqlens_q, window_size=(-1, -1), softmax_scale=None, **kwargs):
    """Flash attention's variable-length function as a loop over texts: (tokens, heads, head_dim)."""
    outputs = []
    for start, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
        q, k, v = (tensor[start:end].transpose(0, 1) for tensor in (query, key, value))
        distance = (torch.arange(end - start)[:, None] - torch.arange(end - start)).abs()
        near = torch.ones_like(distance, dtype=torch.bool) if window_size[0] < 0 else distance <= window_size[0]
        outputs.append(F.scaled_dot_product_attention(q, k, v, near, scale=softmax_scale).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("only", ONLY.values(), ids=ONLY.keys())
@each_shape
def test_flash_attention_is_told_where_texts_begin(shape, only, monkeypatch):
    """Its kernel needs a GPU, so a plain loop stands in for it here; what is tested is all that lies around it."""
    model = tiny_model(shape)
    padded, batch = pad(texts((5, 1, 17, 9))), texts((5, 1, 17, 9))
    with torch.inference_mode():
        expected = model(**padded).last_hidden_state[padded["attention_mask"].bool()]
    utils = modeling_flash_attention_utils
    supports = defaultdict(bool, window_size=True)
    flash_kwargs = partial(utils._process_flash_attention_kwargs, supports_mapping=supports)
    functions = ((None, plain_flash, None, None, None), (flash_kwargs, None))
    if version.parse(transformers_version) < version.parse("5.23"):  # before, it had one function fewer for arguments
        functions = (functions[0], flash_kwargs)
    monkeypatch.setattr(utils, "lazy_import_flash_attention", lambda implementation, **_: functions)
    model.config._attn_implementation_internal = "flash_attention_2"
    packed = {name: value for name, value in pack(batch).items() if only is None or name in only}
    with torch.inference_mode():
        got = model(**packed).last_hidden_state[0]
    assert (got - expected).abs().max() <= 1e-5


def test_rows_may_hold_several_texts_each():
    """Trainers pack to a fixed length, so a batch has many rows of many texts."""
    model = tiny_model()
    batch = texts((5, 7, 4, 8))
    ids = torch.tensor([batch[0] + batch[1], batch[2] + batch[3]])
    positions = torch.cat([torch.arange(len(text)) for text in batch]).view(2, 12)
    with torch.inference_mode():
        got = model(ids, position_ids=positions, output_expert_index=True)
        for row, column, text in ((0, 0, batch[0]), (0, 5, batch[1]), (1, 0, batch[2]), (1, 4, batch[3])):
            alone = model(torch.tensor([text])).last_hidden_state[0]
            assert (got.last_hidden_state[row, column : column + len(text)] - alone).abs().max() <= 1e-5
        alone = torch.cat([model(torch.tensor([text])).pooler_output for text in batch])
    assert (got.pooler_output - alone).abs().max() <= 1e-5


@each_shape
def test_the_heads_take_packed_texts(shape):
    """SPLADE and late interaction read token outputs of flattened batches; classifiers need one state for each text."""
    batch = texts((5, 1, 17, 9))
    padded, packed = pad(batch), pack(batch)
    real = padded["attention_mask"].bool()
    with torch.inference_mode():
        for cls in (HagMoeForMaskedLM, HagMoeForTokenClassification):
            model = tiny_model(shape, cls)
            assert (model(**packed).logits[0] - model(**padded).logits[real]).abs().max() <= 1e-5
        classifier = tiny_model(shape, HagMoeForSequenceClassification)
        assert (classifier(**packed).logits - classifier(**padded).logits).abs().max() <= 1e-5


def test_gradients_are_the_padded_ones():
    """Training on packed texts must learn the same."""
    model = tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    padded, packed = pad(texts((5, 1, 17, 9))), pack(texts((5, 1, 17, 9)))

    def gradients(inputs, real):
        model.zero_grad()
        states = model(**inputs).last_hidden_state[real]
        (states * torch.arange(1, 1 + states.numel()).view_as(states).sin()).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(padded, padded["attention_mask"].bool())
    got = gradients(packed, torch.ones_like(packed["input_ids"], dtype=torch.bool))
    assert got.keys() == expected.keys()
    assert any("attention_query" in name for name in got)
    for name, gradient in got.items():
        assert torch.allclose(gradient, expected[name], atol=1e-4, rtol=1e-4), name


@pytest.mark.slow
def test_packed_texts_compile_to_one_graph():
    """A look at the data would wait for the GPU, and break the graph."""
    model = tiny_model(has_pooler=False)
    packed = {name: value for name, value in pack(texts((5, 1, 17, 9))).items() if torch.is_tensor(value)}
    with torch.no_grad():
        expected = model(**packed).last_hidden_state
        got = torch.compile(model, fullgraph=True)(**packed).last_hidden_state
    assert torch.allclose(got, expected, atol=1e-5)


IDS = torch.ones(1, 5, dtype=torch.long)
REFUSED = {
    "with a mask": (
        {"cu_seq_lens_q": torch.tensor([0, 5]), "attention_mask": IDS},
        "attention_mask is given with cu_seq",
    ),
    "boundaries that end early": ({"cu_seq_lens_q": torch.tensor([0, 2, 4])}, "does not fit an input of shape .1, 5."),
    "boundaries that start late": ({"cu_seq_lens_q": torch.tensor([1, 5])}, "allowed: rising boundaries from 0"),
    "boundaries that fall": ({"cu_seq_lens_q": torch.tensor([0, 3, 2, 5])}, "allowed: rising boundaries from 0"),
    "an empty text": ({"cu_seq_lens_q": torch.tensor([0, 2, 2, 5])}, "allowed: rising boundaries from 0"),
    "boundaries over rows": ({"input_ids": IDS.repeat(2, 1), "cu_seq_lens_q": torch.tensor([0, 5, 10])}, "and one row"),
    "a text too long": (
        {"input_ids": IDS.repeat(1, 14), "cu_seq_lens_q": torch.tensor([0, 70])},
        "holds 69; allowed: 0 to 63",
    ),
}


@pytest.mark.parametrize(("inputs", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_packing_that_contradicts_itself_is_refused(inputs, message):
    """A wrong boundary gives a vector of half a text, silently."""
    with pytest.raises((ValueError, IndexError), match=message):
        tiny_model()(**{"input_ids": IDS, **inputs})


def test_a_packed_batch_may_be_longer_than_a_text():
    """The limit is a text's, not a batch's."""
    got, expected = packed_and_padded(tiny_model(), texts((60, 50, 64)))
    assert got.shape[0] > TINY["max_position_embeddings"]
    assert (got - expected).abs().max() <= 1e-5
