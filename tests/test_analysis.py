import numpy as np
import pytest
from matplotlib.image import imread
from transformers import AutoModel

from hagmoe_hf.analysis.plots import domain_expert_heatmap, training_curves
from hagmoe_hf.analysis.trace import DomainLoad, domain_load
from hagmoe_hf.demo import parent_folder

TEXTS = ["a short text", "the same thing said at much greater length, so that it needs padding", "def f(x): return x"]
DOMAINS = ["prose", "prose", "code"]


@pytest.fixture(scope="module")
def encoder_and_tokenizer(real_mixture):
    return real_mixture[0].model, real_mixture.tokenizer


def test_every_real_token_is_counted_once_per_choice(encoder_and_tokenizer):
    """Padding in the counts is the classical mistake: it makes one expert look loaded."""
    encoder, tokenizer = encoder_and_tokenizer
    tokens = {"code": 0, "prose": 0}
    for text, domain in zip(TEXTS, DOMAINS, strict=True):
        tokens[domain] += len(tokenizer(text)["input_ids"])
    for batch_size in (1, 3):
        load = domain_load(encoder, tokenizer, TEXTS, DOMAINS, batch_size=batch_size)
        assert load.domains == ("code", "prose")
        assert load.counts.sum(axis=-1).tolist() == [[tokens["code"], tokens["prose"]]] * len(load.layers)
    assert load.share.sum(axis=-1) == pytest.approx(np.ones((2, 2)))


def test_sequence_routing_keeps_a_text_in_one_group(encoder_and_tokenizer):
    encoder, tokenizer = encoder_and_tokenizer
    load = domain_load(encoder, tokenizer, TEXTS[:1], ["one"])
    groups = load.counts.reshape(len(load.layers), 1, load.num_groups, -1).sum(-1)
    assert ((groups > 0).sum(-1) == 1).all()


def test_a_dense_model_and_missing_domains_are_refused(encoder_and_tokenizer):
    encoder, tokenizer = encoder_and_tokenizer
    with pytest.raises(ValueError, match="BertModel has no sparse layers"):
        domain_load(AutoModel.from_pretrained(parent_folder()), tokenizer, TEXTS, DOMAINS)
    with pytest.raises(ValueError, match="3 texts and 2 domains"):
        domain_load(encoder, tokenizer, TEXTS, DOMAINS[:2])
    with pytest.raises(ValueError, match="0 texts"):
        domain_load(encoder, tokenizer, [], [])


def test_the_heatmap_is_drawn(tmp_path):
    counts = np.arange(2 * 3 * 8).reshape(2, 3, 8) + 1
    path = domain_expert_heatmap(DomainLoad(("a", "b", "a long domain name"), (1, 3), 4, counts), tmp_path / "map.png")
    picture = imread(path)
    assert picture.shape[0] > 200
    assert picture.std() > 0.1


def test_training_curves_are_drawn(tmp_path):
    """A log with nothing to draw must say so instead of saving an empty picture."""
    log = [{"loss": 1 / step, "step": step} for step in range(1, 9)]
    log += [{"router/layer1/max_vio": 1.0, "router/layer3/max_vio": 0.5, "router/drift": 0.1, "step": 4}]
    assert imread(training_curves(log, tmp_path / "curves.png")).std() > 0.05
    with pytest.raises(ValueError, match="1 log entries hold none of"):
        training_curves([{"eval_loss": 1.0, "step": 1}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
