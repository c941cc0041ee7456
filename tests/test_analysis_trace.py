import json

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from hagmoe_hf import upcycle
from hagmoe_hf.analysis import trace as trace_room
from hagmoe_hf.analysis.stats import counts_per_text, group_counts
from hagmoe_hf.analysis.texts import Texts
from hagmoe_hf.analysis.trace import label_load, record


@pytest.fixture(scope="module")
def tiny_mixture(tiny_parent):
    return upcycle(SentenceTransformer(str(tiny_parent), device="cpu"), sparse_layers=[0, 1])


@pytest.fixture(scope="module")
def texts(corpus):
    return Texts(tuple(corpus[:70]), domains=tuple("ab"[row % 2] for row in range(70)))


def test_a_trace_holds_what_the_model_outputs(tiny_mixture, texts):
    """Everything else is computed from it."""
    trace = record(tiny_mixture, texts, batch_size=8)
    encoder, tokenizer = tiny_mixture[0].model, tiny_mixture.tokenizer
    for row in (0, 40, 69):
        text = trace.texts.texts[row]
        batch = tokenizer([text], truncation=True, return_tensors="pt")
        output = encoder(**batch, output_router_logits=True, output_expert_index=True)
        mine = slice(trace.text_start[row], trace.text_start[row + 1])
        assert trace.token_id[mine].tolist() == batch["input_ids"][0].tolist()
        assert trace.position[mine].tolist() == list(range(len(batch["input_ids"][0])))
        for layer in range(2):
            assert trace.expert_index[mine, layer].tolist() == output.expert_index[layer].tolist()
            probs = output.router_logits[layer].exp()
            chosen = probs.gather(-1, output.expert_index[layer]).detach().numpy()
            assert trace.expert_probability[mine, layer] == pytest.approx(chosen, abs=1e-3)
            assert trace.mean_probability[row, layer] == pytest.approx(probs.mean(0).detach().numpy(), abs=1e-5)
    assert trace.vector == pytest.approx(tiny_mixture.encode(list(trace.texts.texts)), abs=1e-6)


def test_padding_is_never_recorded_and_the_batch_size_changes_nothing(tiny_mixture, texts):
    """Padding in the counts is the classical mistake: it makes one expert look loaded."""
    one, many = record(tiny_mixture, texts, batch_size=1), record(tiny_mixture, texts, batch_size=70)
    real = sum(map(len, tiny_mixture.tokenizer(list(texts.texts), truncation=True)["input_ids"]))
    assert len(one.token_id) == len(many.token_id) == real
    assert (one.expert_index == many.expert_index).mean() > 0.999  # a tie may fall either way
    assert one.vector == pytest.approx(many.vector, abs=1e-5)


def test_sequence_routing_keeps_a_text_in_one_group(tiny_mixture, texts):
    trace = record(tiny_mixture, texts)
    counts = counts_per_text(trace.expert_index[:, 0], trace.text_start, trace.num_experts)
    assert ((group_counts(counts, trace.num_groups) > 0).sum(axis=1) == 1).all()


class KilledError(Exception):
    pass


def test_a_killed_trace_goes_on_and_ends_the_same(tiny_mixture, texts, tmp_path, monkeypatch):
    """A million tokens take minutes; a lost connection must not cost them."""
    whole = record(tiny_mixture, texts, tmp_path / "whole", batch_size=4)
    monkeypatch.setattr(trace_room, "SAVE_EVERY", 3)
    append, calls = trace_room._Arrays.append, []

    def dies_at_the_eighth(self, *arguments):
        calls.append(arguments)
        if len(calls) == 8:
            self._save = lambda: None  # as if there were no time to
            self._files["vector"].write(b"half a row")
            raise KilledError
        append(self, *arguments)

    monkeypatch.setattr(trace_room._Arrays, "append", dies_at_the_eighth)
    with pytest.raises(KilledError):
        record(tiny_mixture, texts, tmp_path / "parts", batch_size=4)
    assert json.loads((tmp_path / "parts/trace.json").read_text())["done"] == 24
    again = record(tiny_mixture, texts, tmp_path / "parts", batch_size=4)
    assert len(calls) == 8 + 12  # 46 texts are left
    assert again.token_id.tolist() == whole.token_id.tolist()
    assert (again.expert_index == whole.expert_index).all()
    assert (again.vector == whole.vector).all()
    record(tiny_mixture, texts, tmp_path / "parts", batch_size=4)
    assert len(calls) == 20, "a finished trace is only read"


def test_a_trace_that_lost_rows_is_not_filled_with_zeros(tiny_mixture, texts, tmp_path):
    record(tiny_mixture, texts, tmp_path / "trace")
    file = tmp_path / "trace/vector.bin"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"vector.bin has \d+ bytes; allowed: at least \d+. Remove "):
        record(tiny_mixture, texts, tmp_path / "trace")


def test_a_trace_of_something_else_is_not_continued(tiny_mixture, texts, tmp_path):
    record(tiny_mixture, texts, tmp_path / "trace")
    with pytest.raises(ValueError, match="another model, other texts or another prompt"):
        record(tiny_mixture, texts, tmp_path / "trace", prompt="query: ")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("keep me")
    with pytest.raises(ValueError, match="is not empty and holds no trace"):
        record(tiny_mixture, texts, tmp_path / "mine")


def test_arrays_are_mapped_not_loaded(tiny_mixture, texts, tmp_path):
    """A million tokens must fit in memory beside the model."""
    trace = record(tiny_mixture, texts, tmp_path / "trace")
    assert isinstance(trace.expert_index, np.memmap)
    per_token = sum(array[0].nbytes for array in (trace.token_id, trace.expert_index, trace.expert_probability))
    assert per_token <= 10  # two sparse layers


def test_label_load_counts_each_token_once(tiny_mixture, texts):
    trace = record(tiny_mixture, texts)
    load = label_load(trace, "domain")
    lengths = np.diff(trace.text_start)
    tokens = [lengths[np.array(trace.texts.domains) == name].sum() for name in "ab"]
    assert load.labels == ("a", "b")
    assert load.counts.sum(axis=-1).tolist() == [tokens, tokens]
    assert load.share.sum(axis=-1) == pytest.approx(np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"no language labels; allowed: one of those they have, \['domain'\]"):
        label_load(trace, "language")


def test_a_dense_model_is_refused(real_parent, texts):
    with pytest.raises(ValueError, match="BertModel has no sparse layers"):
        record(real_parent, texts)
