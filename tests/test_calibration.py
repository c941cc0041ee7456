"""Gates that start from texts: the same vectors, even groups, groups that mean something."""

import copy

import numpy as np
import pytest
import torch
from conftest import TINY, spread
from sentence_transformers import SentenceTransformer
from transformers import BertConfig, BertModel

from hagmoe_hf import calibration, sentence, upcycle
from hagmoe_hf.analysis import stats
from hagmoe_hf.analysis.stats import LabelLoad
from hagmoe_hf.analysis.texts import Texts
from hagmoe_hf.analysis.trace import label_load, record
from hagmoe_hf.calibration import balancing_bias, even_k_means, shared_part
from hagmoe_hf.demo import read_corpus
from hagmoe_hf.files import read_lines

WAYS = {
    "groups by sequence": {},
    "groups by token": {"group_routing": "token"},
    "flat token router": {"n_group": 1},
    "sequence router": {"n_group": 8},
}


@pytest.fixture(scope="module")
def halves() -> tuple[list[str], list[str], list[str]]:
    """Texts to calibrate with, others to look at, and the domains of those."""
    texts, domains = read_corpus()
    return texts[::3], texts[1::3], domains[1::3]


@pytest.fixture(scope="module")
def calibrated(real_parent, halves):
    return upcycle(real_parent, calibration_texts=halves[0])


def load_of(model, texts, domains) -> LabelLoad:
    return label_load(record(model, Texts(tuple(texts), tuple(domains))), "domain")


def largest_group(load: LabelLoad) -> np.ndarray:
    """(sparse layers,) load of the largest group over the mean group's"""
    return 1 + stats.max_violation(stats.group_counts(load.counts, load.num_groups).sum(1))


def information(load: LabelLoad) -> list[float]:
    """Mutual information of domain and group in each sparse layer"""
    return [stats.mutual_information(joint) for joint in stats.group_counts(load.counts, load.num_groups)]


def test_a_calibrated_mixture_still_gives_its_parents_vectors(real_parent, calibrated, halves):
    """The promise of upcycling must not depend on where the gates point."""
    assert np.abs(calibrated.encode(halves[1]) - real_parent.encode(halves[1])).max() <= 2e-6


def test_groups_start_even_and_about_domains_on_texts_that_were_not_seen(real_mixture, calibrated, halves):
    """Random gates send most texts to one group: capacity that is paid for and not used."""
    fresh, started = (load_of(model, *halves[1:]) for model in (real_mixture, calibrated))
    assert largest_group(fresh).max() > 2
    assert largest_group(started).max() < 1.4
    assert min(information(started)) > 2 * max(information(fresh))


def test_the_report_says_what_the_gates_started_from(calibrated, halves, tmp_path):
    """It goes into the card and the JSON beside the model."""
    report = calibrated.upcycling_report
    assert report.calibration.texts == len(halves[0])
    assert [start.layer for start in report.calibration.layers] == list(report.sparse_layers)
    assert all(1 <= start.largest_group < 1.1 for start in report.calibration.layers)
    assert f"gates started from {len(halves[0])} texts; largest group against the mean one: 1.0" in str(report)
    assert report.to_dict()["calibration"]["layers"][0]["layer"] == 1
    calibrated.save_pretrained(str(tmp_path))
    again = SentenceTransformer(str(tmp_path), device="cpu")
    assert torch.equal(
        again[0].model.layers[1].mlp.router.group_gate.weight, calibrated[0].model.layers[1].mlp.router.group_gate.weight
    )
    assert torch.equal(again[0].model.layers[1].mlp.router.group_bias, calibrated[0].model.layers[1].mlp.router.group_bias)


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS.keys())
def test_every_router_starts_even(options, tiny_parent, corpus):
    """Each level of each router is started, and none of the others' parameters is touched."""
    parent = SentenceTransformer(str(tiny_parent), device="cpu")
    fresh, started = (upcycle(parent, calibration_texts=texts, **options) for texts in (None, corpus[:200]))
    assert np.abs(started.encode(corpus[:40]) - parent.encode(corpus[:40])).max() <= 1e-5
    load = load_of(started, corpus[:200], ["all"] * 200).counts.sum(1)
    assert (load.max(-1) / load.mean(-1)).max() < 1.3
    before, after = fresh.state_dict(), started.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    gates = {name for name in before if name.endswith(("gate.weight", "group_bias", "expert_bias"))}
    assert {name for name in gates if name.endswith("weight")} <= changed <= gates


def test_calibration_is_reproducible_and_leaves_mode_and_random_numbers(tiny_parent, corpus):
    """A seed that does not decide everything makes runs that cannot be compared."""
    parent = SentenceTransformer(str(tiny_parent), device="cpu")
    torch.manual_seed(1)
    expected = copy.deepcopy(torch.get_rng_state())
    one, same, other = (upcycle(parent, calibration_texts=corpus[:99], seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), expected)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one if "group_gate" in name)
    assert upcycle(parent.train(), calibration_texts=corpus[:99])[0].model.training


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("one text", "calibration_texts holds 'one text' of type str; allowed: a list of texts"),
        (["a text", 3], "calibration_texts holds 3 of type int"),
        (
            [*"abcdefgh", ("a", None)],
            "holds None of type NoneType; allowed: a list of texts, or of tuples",
        ),
        ([("a", "b"), *"cdefg", ("h", "\ud800")], r"calibration_texts\[6\] is not UTF-8"),
        ([("a", "b"), ["a", "b"], ("c", "")], "holds 3 different texts"),
        ([], "holds 0 different texts that are not empty; allowed: at least num_experts=8"),
        ([*"abcdefg", " "], "holds 7 different texts"),
        (["the same text"] * 99, "holds 1 different texts"),
        ([*"abcdefgh", "\ud800"], r"calibration_texts\[8\] is not UTF-8"),
    ],
)
def test_texts_that_cannot_start_a_gate_are_refused(texts, message, tiny_parent):
    with pytest.raises(ValueError, match=message):
        upcycle(str(tiny_parent), calibration_texts=texts)


@pytest.mark.parametrize("options", [{}, {"group_routing": "token", "num_experts": 16, "n_group": 8}])
@pytest.mark.parametrize("texts", ["the {} same text", "{} a"], ids=["equal", "of one word"])
def test_texts_that_hardly_differ_start_gates_that_can_learn(texts, options, tiny_parent):
    """Differences by rounding, blown up, would decide everything, and nothing could change it any more."""
    fillings = [" " * row for row in range(1, 17)] if texts.startswith("the") else ["a " * row for row in range(1, 17)]
    given = [texts.format(filling) for filling in fillings]
    mixture = upcycle(str(tiny_parent), calibration_texts=given, **options)[0].model
    for layer in mixture.config.sparse_layers:
        router = mixture.layers[layer].mlp.router
        for gate in (router.group_gate, router.expert_gate):
            states = torch.randn(50, gate.in_features, generator=torch.Generator().manual_seed(0)) * 0.5
            assert gate.weight.abs().max() < 1000
            assert (gate(states).softmax(-1).amax(-1) < 1).any()


def test_what_is_shared_is_told_from_what_is_each_inputs_own():
    """Form sets texts apart most, and must not decide: a short query has a long answer."""
    generator = torch.Generator().manual_seed(0)
    subjects = torch.randn(400, 3, generator=generator).repeat_interleave(2, 0)
    form = torch.tensor([8.0, -8.0]).repeat(400) + torch.randn(800, generator=generator)
    noise = torch.randn(800, 4, generator=generator)
    inputs = torch.cat([subjects, form[:, None], noise], dim=1)
    inputs = inputs - inputs.mean(0)
    shared = shared_part(inputs, torch.arange(400).repeat_interleave(2))
    assert torch.allclose(shared[:3, :3], torch.eye(3), atol=0.1)
    assert shared[3:].abs().max() < 0.1
    assert shared[:, 3:].abs().max() < 0.1
    assert shared_part(inputs, torch.arange(800)) is None, "no input has a partner"
    assert shared_part(torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 0])) is None, "they share nothing"


def test_pairs_start_gates_that_send_both_texts_to_one_group(real_parent, corpus):
    """What the gates of texts alone do not: there, what is long and what is short part."""
    words = [text.split()[:20] for text in corpus if len(text.split()) > 9]
    pairs = [(" ".join(some[:3]), " ".join(some)) for some in words]
    others = tuple(text for pair in pairs[1::2] for text in pair)

    def agreement(calibration_texts) -> float:
        rows = np.arange(len(others)).reshape(-1, 2)
        trace = record(upcycle(real_parent, calibration_texts=calibration_texts), Texts(others, pairs=rows))
        shares = []
        for layer in range(len(trace.layers)):
            counts = stats.counts_per_text(trace.expert_index[:, layer], trace.text_start, trace.num_experts)
            groups = stats.group_counts(counts, trace.num_groups).argmax(axis=1)
            shares.append(stats.pair_agreement(groups, trace.texts.pairs)[0])  # of texts in the trace's order
        return min(shares)

    alone = agreement([text for pair in pairs[::2] for text in pair])
    assert agreement(pairs[::2]) > alone + 0.15


@pytest.mark.parametrize("size", [1, 2, 40])
def test_of_too_many_texts_a_sample_is_taken(size, tiny_parent, monkeypatch):
    """Also where a single item alone has more."""
    monkeypatch.setattr(calibration, "MOST_TEXTS", 16)
    texts = [f"text {number}" for number in range(40)]
    items = [texts[first : first + size] for first in range(0, 40, size)]
    assert upcycle(str(tiny_parent), calibration_texts=items).upcycling_report.calibration.texts == 16


def test_a_text_is_read_as_far_as_its_model_reads_it(tmp_path, tiny_parent):
    """Gates that start from what the model never sees are uneven on what it does see."""
    texts = [f"{number} " * 9 for number in range(40)]
    parent = sentence.load(str(tiny_parent), device="cpu")
    parent.max_seq_length = 6
    one, other = upcycle(parent, calibration_texts=texts), upcycle(parent, calibration_texts=[f"{t} more" for t in texts])
    assert all(torch.equal(weight, other.state_dict()[name]) for name, weight in one.state_dict().items())


def test_a_model_without_its_tokenizer_is_refused():
    """There is no way to read texts with it."""
    with pytest.raises(ValueError, match="BertModel, which comes without its tokenizer; allowed: a path"):
        upcycle(spread(BertModel(BertConfig(**TINY))), calibration_texts=["a text"] * 9)


def test_texts_come_from_the_lines_of_a_file(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("one\n\n  zwei drei \n", encoding="utf-8")
    assert read_lines(path) == ["one", "zwei drei"]
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"texts\.txt is not UTF-8"):
        read_lines(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no text; allowed: one text per line"):
        read_lines(path)


def test_clusters_are_found_and_evened():
    """Three well-separated directions: each of three keys finds one; two keys share two of unlike size evenly."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(6)[:3] * 5
    points = torch.cat(
        [centre + 0.1 * torch.randn(n, 6, generator=generator) for centre, n in zip(centres, (100, 100, 100), strict=True)]
    )
    keys, offset = even_k_means(points, torch.ones(300), 3, generator)
    chosen = (points @ keys.T + offset).argmax(-1).view(3, 100)
    assert all(len(row.unique()) == 1 for row in chosen)
    assert len(chosen[:, 0].unique()) == 3
    skewed = torch.cat([points[:100], points[100:120]]) + 0.3 * torch.randn(120, 6, generator=generator)
    keys, offset = even_k_means(skewed, torch.ones(120), 2, generator)
    load = torch.bincount((skewed @ keys.T + offset).argmax(-1), minlength=2)
    assert load.max() <= 66


def test_balancing_counts_weights():
    scores = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([3.0, 0.0, 0.0, -3.0])
    weights = torch.linspace(0.1, 2, 500)
    chosen = (scores + balancing_bias(scores, weights)).argmax(-1)
    load = torch.zeros(4).index_add(0, chosen, weights)
    assert load.max() / load.mean() < 1.05
