"""What `export` writes, checked against torch."""

import copy
import sys

import numpy as np
import pytest
import torch
from conftest import MODES, SHAPES, TINY, spread, tiny_config
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("transformers.exporters.quantizers")

from hagmoe_hf import HagMoeModel, sentence
from hagmoe_hf import export as export_room
from hagmoe_hf.cli.main import main
from hagmoe_hf.export import FLOAT_FILE, INT8_FILE, OPENVINO_FILE, export, load, unrolled_experts_forward
from hagmoe_hf.modeling_hagmoe import HagMoeGate
from hagmoe_hf.ngram_memory import give_memory
from hagmoe_hf.ngrams_hagmoe import frequent_ngrams

EXPORTED = {
    "groups by sequence": {},
    "two experts, normalized": MODES["two experts, normalized"],
    "gated, rotary, no biases": SHAPES["modernbert"],
    "memory": {"ngram_memory_scale": 1.0},
    "memory alone": {"ngram_memory_scale": 1.0, "mlp_layer_types": ["dense"] * 3},
}


@pytest.fixture(scope="module")
def make_mixture(tiny_parent, tmp_path_factory, corpus):
    """Makes a SentenceTransformer around a tiny mixture whose experts all differ."""

    def make(**changes) -> SentenceTransformer:
        folder = tmp_path_factory.mktemp("mixture")
        tokenizer = AutoTokenizer.from_pretrained(tiny_parent)
        tokenizer.save_pretrained(folder)
        layers = {"mlp_layer_types": ["dense", "sparse", "dense"]}
        config = tiny_config(vocab_size=len(tokenizer), **{**layers, **changes})
        model = HagMoeModel(config)
        if "ngram_memory_scale" in changes:
            ids = torch.tensor([token for text in tokenizer(corpus)["input_ids"] for token in text])
            names, counts = frequent_ngrams(ids, torch.tensor([len(ids)]), [], 300, 4, 2)
            counts[::5] = 0  # known for the sake of longer ones alone
            give_memory(model, names, counts)
        spread(model, scale=0.2).save_pretrained(folder)
        return SentenceTransformer(str(folder), device="cpu")

    return make


@pytest.mark.parametrize("mode", MODES)
def test_unrolled_experts_are_the_experts(mode):
    """They stand in for them in every graph."""
    model = spread(HagMoeModel(tiny_config(**MODES[mode])))
    experts = next(module for name, module in model.named_modules() if name.endswith(".experts"))
    generator = torch.Generator().manual_seed(0)
    top_k = model.config.num_experts_per_tok
    states = torch.randn(9, TINY["hidden_size"], generator=generator)
    index = torch.stack([torch.randperm(6, generator=generator)[:top_k] for _ in range(9)])  # experts 6 and 7 stay empty
    weights = torch.full((9, top_k), 1 / top_k)
    index[4], weights[4] = model.config.num_experts, 0.0  # padding
    model.set_experts_implementation("eager")
    with torch.no_grad():
        expected = experts(states, index, weights)
        assert torch.allclose(unrolled_experts_forward(experts, states, index, weights), expected, atol=1e-5)


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=[pytest.mark.slow] if mode == "memory alone" else []) for mode in EXPORTED]
)
def test_a_float32_graph_equals_torch_on_other_batches_and_lengths(mode, make_mixture, corpus, tmp_path):
    """One batch was traced; queries, padded batches and texts that leave experts empty come later."""
    texts = [text[: 4 * (row % 15) + 4] for row, text in enumerate(corpus[:60])]
    report = export(make_mixture(**EXPORTED[mode]), tmp_path / "out", texts)
    check = report.checks[FLOAT_FILE]
    assert check.largest_difference <= 1e-5
    assert {batch for batch, _ in check.shapes} >= {1, 7, 32}
    assert len({length for _, length in check.shapes}) > 3
    assert check.fewest_experts < 8


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param(mode, marks=[pytest.mark.slow] if place else [])
        for place, mode in enumerate(EXPORTED)
        if "memory" not in mode
    ],
)
def test_an_openvino_graph_equals_torch_where_there_is_padding(mode, make_mixture, corpus, tmp_path):
    """Its exporter brings its own experts, to whom "no expert" means an index that does not exist."""
    pytest.importorskip("openvino")
    texts = [text[: 4 * (row % 15) + 4] for row, text in enumerate(corpus[:60])]
    report = export(make_mixture(**EXPORTED[mode]), tmp_path / "out", texts, format="openvino")
    check = report.checks[OPENVINO_FILE]
    assert check.largest_difference <= 1e-5
    assert {batch for batch, _ in check.shapes} >= {1, 7, 32}
    assert (tmp_path / "out/openvino" / OPENVINO_FILE).is_file()


def test_a_memory_is_refused_where_it_cannot_be_looked_up(make_mixture, corpus, tmp_path):
    """OpenVINO's integers are too small for the names of n-grams, which would silently be others'."""
    with pytest.raises(ValueError, match=r"ngram_memory_size > 0\); allowed: 'onnx'"):
        export(make_mixture(**EXPORTED["memory"]), tmp_path / "out", corpus[:10], format="openvino")
    assert not (tmp_path / "out").exists()


def test_the_experts_are_int8_and_the_gates_are_not(exported):
    """Experts are most of the weights; a rounded gate would choose other experts."""
    _, _, report = exported
    shapes = [shape for _, shape in report.float_weights]
    assert report.int8_share > 0.95
    assert (8, TINY["hidden_size"]) in shapes, "expert gate"
    assert (4, TINY["hidden_size"]) in shapes, "group gate"
    assert report.checks[INT8_FILE].largest_difference > report.checks[FLOAT_FILE].largest_difference
    assert report.megabytes[INT8_FILE] < report.megabytes[FLOAT_FILE]


@pytest.mark.parametrize("apart", [False, True])
def test_int8_rounds_and_does_nothing_worse(apart, make_mixture, corpus, tmp_path):
    """With equal experts no choice matters, so what is left is rounding: small for every text on every CPU.

    With experts of their own, a text near a tie may go to other ones; that is for the median to forgive.
    """
    mixture = make_mixture()
    if not apart:
        experts = sentence.encoder_of(mixture).layers[1].mlp.experts
        with torch.no_grad():
            for parameter in experts.parameters():
                parameter.copy_(parameter[:1].expand_as(parameter))
    report = export(mixture, tmp_path / "out", corpus[:60], int8=True, reduce_range=True)
    int8 = load(tmp_path / "out", INT8_FILE, threads=1)
    cosines = (
        int8.encode(corpus[:60], normalize_embeddings=True) * mixture.encode(corpus[:60], normalize_embeddings=True)
    ).sum(1)
    assert np.median(cosines) > 0.999
    assert np.sort(cosines)[3] > 0.98, "more than one text in twenty is too many to stand near a tie"
    if not apart:
        assert cosines.min() > 0.999
        assert report.checks[INT8_FILE].smallest_cosine > 0.99


def test_an_export_leaves_the_model_as_it_was(exported):
    """It may go on training."""
    mixture, _, _ = exported
    encoder = mixture[0].model
    assert encoder.config._experts_implementation == "segmented_mm"
    assert encoder.pooler is not None
    gates = [module for module in encoder.modules() if isinstance(module, HagMoeGate)]
    assert len(gates) == 2
    assert not any(gate._forward_hooks for gate in gates)


def test_a_graph_that_differs_is_refused_and_leaves_nothing(make_mixture, corpus, tmp_path, monkeypatch):
    """A wrong graph on disk would be deployed."""
    monkeypatch.setattr(export_room, "LARGEST_DIFFERENCE", -1.0)
    with pytest.raises(ValueError, match=r"model.onnx differs from torch by .*; allowed: "):
        export(make_mixture(), tmp_path / "out", corpus[:8])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": ["one"]}, "1 texts are too few"),
        ({"reduce_range": True}, "reduce_range=True is of no use without int8"),
        ({"format": "openvino", "int8": True}, "int8 with format='openvino' is not possible"),
        ({"model": "parent"}, "The encoder is a BertModel; allowed: a HagMoeModel, a HAG-MoE"),
        ({"model": "half"}, r"The mixture is in torch.bfloat16; allowed: torch.float32"),
    ],
)
def test_what_cannot_be_exported_is_named(options, message, tiny_parent, corpus, tmp_path, exported):
    options = {"model": exported[0], "texts": corpus[:4], **options}
    if options["model"] == "parent":
        options["model"] = tiny_parent
    if options["model"] == "half":
        options["model"] = copy.deepcopy(exported[0]).bfloat16()
    with pytest.raises(ValueError, match=message):
        export(out=tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_command_exports_and_says_how_exact(exported, corpus, tmp_path, monkeypatch, capsys):
    mixture, _, _ = exported
    mixture.save_pretrained(str(tmp_path / "mixture"))
    (tmp_path / "texts.txt").write_text("\n".join(" ".join(text.split()) for text in corpus[:20]), encoding="utf-8")
    words = ["hagmoe", "export", tmp_path / "mixture", tmp_path / "out", "--verify", tmp_path / "texts.txt"]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    assert "model.onnx: " in capsys.readouterr().out
    assert (tmp_path / "out/onnx/model.onnx").is_file()
