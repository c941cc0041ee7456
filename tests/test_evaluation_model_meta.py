"""What MTEB's leaderboard is told about a HAG-MoE is counted, not typed."""

import mteb
import pytest
from evaluation_helpers import mixture, parent, small_kit

from hagmoe_hf.evaluation.kit import find_sets
from hagmoe_hf.evaluation.model_meta import hagmoe_model_meta
from hagmoe_hf.evaluation.tasks import local_task
from hagmoe_hf.sentence import encoder_of

FIELDS = {
    "revision": "0" * 40,
    "release_date": "2026-11-22",
    "license": "apache-2.0",
    "languages": ["eng-Latn"],
    "training_datasets": [],
    "adapted_from": "sentence-transformers/all-MiniLM-L6-v2",
}


def test_parameters_are_those_of_the_model():
    """Readers compare models by active parameters: too few would be a lie, all of them would hide the point."""
    meta = hagmoe_model_meta(mixture(), "someone/mixture", **FIELDS)
    dense = encoder_of(parent())
    assert meta.n_parameters == sum(parameter.numel() for parameter in mixture().parameters())
    tables = sum(parameter.numel() for name, parameter in dense.named_parameters() if "_embeddings" in name)
    assert meta.n_embedding_parameters == tables
    active_in_parent = sum(parameter.numel() for parameter in dense.parameters()) - tables
    assert meta.n_active_parameters == pytest.approx(active_in_parent, rel=0.002)  # the routers come on top
    assert meta.n_active_parameters < 0.6 * (meta.n_parameters - tables)
    assert (meta.embed_dim, meta.max_tokens, meta.license, meta.training_datasets) == (384, 256, "apache-2.0", set())
    assert not meta.use_instructions


def test_mteb_evaluates_a_saved_mixture_through_its_meta(tmp_path):
    """The leaderboard's maintainers load a model by its meta, without any code of ours in their script."""
    mixture().save_pretrained(str(tmp_path / "someone/mixture"))
    words = next(kit_set for kit_set in find_sets(small_kit(tmp_path / "kit")) if kit_set.kind == "sts")
    meta = hagmoe_model_meta(mixture(), "someone/mixture", **FIELDS)
    model = meta.loader(str(tmp_path / "someone/mixture"), device="cpu")
    by_meta = mteb.evaluate(model, local_task(words), cache=None, show_progress_bar=False)
    direct = mteb.evaluate(parent(), local_task(words), cache=None, show_progress_bar=False)
    assert by_meta.task_results[0].get_score() == pytest.approx(direct.task_results[0].get_score(), abs=1e-4)


def test_a_dense_model_and_a_wrong_field_are_refused():
    """A meta that mteb does not accept is found here, not in a pull request's review."""
    with pytest.raises(ValueError, match="allowed: a HAG-MoE"):
        hagmoe_model_meta(parent(), "someone/dense", **FIELDS)
    with pytest.raises(ValueError, match="languages"):
        hagmoe_model_meta(mixture(), "someone/mixture", **{**FIELDS, "languages": ["english"]})
    with pytest.raises(ValueError, match="organization/model_name"):
        hagmoe_model_meta(mixture(), "mixture", **FIELDS)
