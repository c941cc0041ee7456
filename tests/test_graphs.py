"""Exported graphs as SentenceTransformers, and in the commands that take a model."""

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("transformers.exporters.quantizers")

from hagmoe_hf import graphs
from hagmoe_hf.graphs import INT8_FILE, load
from hagmoe_hf.sentence import fingerprint


def test_a_loaded_graph_encodes_like_its_mixture(exported, corpus):
    """It is what people deploy."""
    mixture, folder, _ = exported
    texts, vectors = corpus[:40], mixture.encode(corpus[:40])
    assert np.abs(load(folder, threads=1).encode(texts) - vectors).max() <= 1e-5
    assert not np.array_equal(load(folder, INT8_FILE, threads=1).encode(texts), vectors)
    torch_model = SentenceTransformer(str(folder), device="cpu")
    assert fingerprint(torch_model) == fingerprint(mixture), "it is there, too"
    assert json.loads((folder / "export_report.json").read_text())["int8_share"] > 0.95


def test_a_cpu_whose_sums_overflow_is_warned_of(exported, monkeypatch):
    """Wrong vectors would come without a word."""
    monkeypatch.setattr(graphs, "_lacks_vnni", lambda: True)
    with pytest.warns(UserWarning, match="no VNNI.*reduce_range=True"):
        load(exported[1], INT8_FILE, threads=1)


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, 90), min_size=1, max_size=9), left=st.booleans())
def test_texts_of_about_equal_length_run_together(lengths, left):
    """Every token in exactly one part, and little padding in any."""
    mask = np.arange(90) < np.array(lengths)[:, None]
    mask = mask[:, ::-1] if left else mask
    seen = np.zeros(mask.shape, dtype=int)
    for rows, columns in graphs.parts_of_similar_length(mask):
        seen[rows, columns] += 1
        part = mask[rows, columns]
        longest, shortest = part.sum(1).max(), part.sum(1).min()
        assert longest <= graphs.SHORT_TEXT or shortest >= graphs.LEAST_EQUAL * longest
    assert (seen[mask] == 1).all()
    assert seen.max() <= 1


def test_two_graphs_of_one_mixture_are_two_models_for_the_evaluation(exported):
    """Otherwise int8 would get the scores of float32."""
    _, folder, _ = exported
    assert fingerprint(load(folder)) != fingerprint(load(folder, INT8_FILE))


def test_a_missing_graph_is_named(exported):
    with pytest.raises(FileNotFoundError, match=r"none\.onnx is no file"):
        load(exported[1], "none.onnx")


def test_copies_of_a_loaded_graph_encode_as_it_does(exported, corpus):
    """sentence-transformers sends copies to the processes of its pool."""
    model = load(exported[1], threads=1, device="cpu")
    vectors = model.encode(corpus[:8])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert np.array_equal(other.encode(corpus[:8]), vectors)
    features = {name: tensor for name, tensor in model.preprocess(corpus[:8]).items() if name != "token_type_ids"}
    states = model[0].model(features["input_ids"], features["attention_mask"]).last_hidden_state
    assert torch.equal(states, model[0].model(**model.preprocess(corpus[:8])).last_hidden_state)


def test_what_a_graph_cannot_is_refused(exported, tmp_path):
    with pytest.raises(ValueError, match="device='cuda' is not possible with a graph; allowed: 'cpu'"):
        load(exported[1], device="cuda")
    with pytest.raises(ValueError, match="threads='2' is not possible; allowed: an integer"):
        load(exported[1], threads="2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="A graph is not saved again; allowed: a copy of the folder"):
        load(exported[1]).save_pretrained(str(tmp_path))


def test_a_graphs_path_is_a_name_for_commands(exported, corpus, tmp_path, monkeypatch):
    """Whoever exported a model for its speed wants to serve it, encode a corpus with it, and know what it is worth."""
    mixture, folder, _ = exported
    graph = folder / "onnx" / INT8_FILE
    monkeypatch.chdir(folder / "onnx")
    for name in (str(graph), graph.name):
        assert graphs.split_name(name) == (str(folder), INT8_FILE)
    vectors = graphs.load_model_or_graph(str(graph)).encode(corpus[:8])
    assert np.array_equal(vectors, load(folder, INT8_FILE).encode(corpus[:8]))
    assert fingerprint(graphs.load_model_or_graph(str(folder))) == fingerprint(mixture)


@pytest.mark.parametrize("name", ["onnx/none.onnx", "elsewhere.onnx"])
def test_a_path_that_is_no_graph_is_refused(name, exported, tmp_path):
    Path(tmp_path / "elsewhere.onnx").touch()
    with pytest.raises(FileNotFoundError, match=r"is no graph; allowed: FOLDER/onnx/model.onnx, as `hagmoe export`"):
        graphs.load_model_or_graph(str(tmp_path / name))


def test_a_graph_computes_with_as_many_threads_as_torch(exported, monkeypatch):
    """Workers of a server share the cores by OMP_NUM_THREADS, which ONNX Runtime does not read."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert load(exported[1])[0].model.session.get_session_options().intra_op_num_threads == 1
