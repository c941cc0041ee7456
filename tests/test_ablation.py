"""The apparatus that says whether the mixture pays: a mistake here would be believed."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from ablation import budgets, inputs, loop, report, results, run, scoring
from ablation.arms import BRANCH, CALIBRATED, DENSE, FLAT, HAG, MEAN_POOLED, SEQUENCE, SUBJECT, WIDE
from ablation.loop import Contrastive
from ablation.models import build, mixture, parameter_groups
from ablation.routers import DOMAIN_OF_SET, EXPERT_OF_DOMAIN, FixedRouter, set_domain
from ablation_helpers import ARMS, TINY_BUDGET, fitted, model_of, trained
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from hagmoe_hf import sentence
from hagmoe_hf.training.losses import TranslationLoss

ROOT = Path(__file__).parents[1]


def test_what_repeats_the_kit_is_not_trained_on(prepared, pairs):
    """The one leak that would make every arm look better than it is."""
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert manifest["domains"]["code"]["in_the_kit"] == 3
    assert sum(domain["train"] for domain in manifest["domains"].values()) == pairs.first_rows[-1]
    assert sum(domain["train"] + domain["dev"] for domain in manifest["domains"].values()) == 300


def test_packed_ids_are_the_tokenizers_own_cut_to_the_length(prepared, pairs):
    """A lost closing token, or a neighbour's first, would train on texts that nobody wrote."""
    frame = pd.read_parquet(prepared.parent / "pairs.parquet").sample(frac=1, random_state=0)
    rows = frame[(frame.domain == "lexical") & (frame.split == "train")]
    tokenizer = SentenceTransformer(str(prepared / "parent"), device="cpu").tokenizer
    first = pairs.first_rows[pairs.domains.index("lexical")]
    features = pairs.features(first + np.arange(7))
    for column, part in zip(inputs.COLUMNS, features, strict=True):
        wanted = tokenizer(list(rows[column][:7]), padding=True, truncation=True, max_length=16, return_tensors="pt")
        width = wanted["input_ids"].shape[1]
        assert torch.equal(part["input_ids"][:, :width], wanted["input_ids"])
        assert torch.equal(part["attention_mask"][:, :width], wanted["attention_mask"])
        assert not part["attention_mask"][:, width:].any()


@pytest.mark.parametrize("mixed", [False, True])
def test_every_arm_sees_the_same_batches(pairs, mixed):
    """Otherwise a difference between arms could be luck. Batches of one domain hold one domain, mixed ones several."""
    one, again, other = (inputs.plan(pairs, TINY_BUDGET, seed, mixed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    domains = [len(np.unique(np.searchsorted(pairs.first_rows, rows, side="right"))) for rows in one]
    assert all(len(np.unique(rows)) == TINY_BUDGET.batch_size for rows in one)
    assert max(domains) > 1 if mixed else set(domains) == {1}


def test_no_pair_in_a_language_that_is_left_out_is_trained_on(pairs):
    """But for translations from it, which are in two languages."""
    budget = dataclasses.replace(TINY_BUDGET, steps=60, left_out_languages=("en",), translated=("software",))
    for mixed in (False, True):
        drawn = np.unique(np.concatenate(inputs.plan(pairs, budget, 0, mixed)))
        domains = np.array(pairs.domains)[np.searchsorted(pairs.first_rows, drawn, side="right") - 1]
        assert set(domains) == {"lexical", "software"}
        assert set(pairs.languages[drawn[domains == "lexical"]]) == {"xx"}
        assert len(drawn[domains == "lexical"]) == (pairs.languages == "xx").sum()


def test_translations_are_learned_as_users_learn_them(prepared, pairs):
    """An arm's loss is that of `hagmoe train --loss translation`, with the parent as the teacher."""
    parent = sentence.load(str(prepared / "parent"), device="cpu").eval()
    model = model_of(HAG, prepared)
    features = pairs.features(np.arange(6))
    labels = loop.Contrastive.vectors(parent, features[0]).unsqueeze(1)
    found = loop.Contrastive(model, parent).translations(features)
    torch.testing.assert_close(found, TranslationLoss(model)(features, labels))


def test_a_domain_gives_every_row_before_it_repeats_one(pairs):
    long = dataclasses.replace(TINY_BUDGET, steps=400)
    rows = np.concatenate(inputs.plan(pairs, long, 0, False))
    counts = np.bincount(rows, minlength=pairs.first_rows[-1])
    for first, last in zip(pairs.first_rows[:-1], pairs.first_rows[1:], strict=True):
        passes = counts[first:last].sum() / (last - first)
        # a pass leaves out what does not fill a batch, other rows each time
        assert counts[first:last].max() <= passes * 1.5 + 2
        assert counts[first:last].min() > 0


# Arms that differ in nothing but how they are trained start as one; a memory that starts from translations starts apart
BUILT = {
    (arm.kind, str(arm.upcycling), arm.calibrated, arm.paired, arm.routing, arm.mean_pooled): name
    for name, arm in ARMS.items()
    if not arm.fitted
}


@pytest.mark.parametrize("name", sorted(BUILT.values()))
def test_every_arm_starts_with_its_parents_vectors(name, prepared):
    """Arms that start apart are not compared, whatever they end with."""
    parent = SentenceTransformer(str(prepared / "parent"), device="cpu")
    texts = ["free the disk space", "a", "a much longer text about enzymes and their names"]
    assert np.abs(model_of(ARMS[name], prepared).encode(texts) - parent.encode(texts)).max() < 1e-5


def test_arms_have_the_parameters_that_they_claim(prepared):
    """ "At equal active FLOPs", and the control "at the mixture's total parameters", are claims."""
    encoders = {
        arm.name: sentence.encoder_of(model_of(arm, prepared)) for arm in (DENSE, WIDE, FLAT, HAG, CALIBRATED, SEQUENCE)
    }
    dense = encoders["dense"].num_parameters()
    for arm in (FLAT, HAG, CALIBRATED, SEQUENCE):
        encoder = encoders[arm.name]
        counts = encoder.config.parameter_counts()
        routers = sum(p.numel() for name, p in encoder.named_parameters() if ".router." in name or "down_proj_bias" in name)
        assert encoder.num_parameters() - (counts.total - counts.active) <= dense + routers
    default = build(HAG, prepared / "parent", [], 0, "cpu")
    total = sentence.encoder_of(default).num_parameters()
    assert abs(encoders["dense-wide"].num_parameters() - total) < 0.02 * total + 8 * 3 * 65


def test_the_loss_is_sentence_transformers(prepared, pairs):
    """The loop has its own few lines of InfoNCE; they must be the field's."""
    model = model_of(DENSE, prepared)
    features = pairs.features(np.arange(6))
    stock = MultipleNegativesRankingLoss(model)([dict(part) for part in features], None)
    assert Contrastive(model)(features).item() == pytest.approx(stock.item(), abs=1e-5)  # 1e-7 of logits up to 20


def test_the_distillation_term_is_0_at_the_start(prepared, pairs):
    model, parent = model_of(DENSE, prepared), model_of(DENSE, prepared)
    features = pairs.features(np.arange(6))
    alone = Contrastive(model)(features).item()
    assert Contrastive(model, parent, 1.0)(features).item() == pytest.approx(alone, abs=1e-5)
    other = model_of(DENSE, prepared)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    assert Contrastive(model, other, 1.0)(features).item() > alone + 1e-4


LATE = ARMS["branch-late"]
STOPS = [(DENSE, 4), (CALIBRATED, 3), (LATE, 3), (LATE, 4), (LATE, 5), (ARMS["average"], 5), (ARMS["distilled"], 5)]
STOPS += [(ARMS["dense-interpolated"], 5)]


@pytest.mark.parametrize(("arm", "stop"), STOPS, ids=lambda value: getattr(value, "name", value))
def test_a_stopped_run_ends_as_if_it_had_not_been_stopped(arm, stop, prepared, pairs, dev, tmp_path, monkeypatch):
    """Weights, curve, balancing and random numbers: parts of ten minutes must be one run."""
    whole, model = trained(arm, prepared, pairs, dev, tmp_path / "whole")
    clock = iter(range(10**6))
    monkeypatch.setattr(loop, "clock", lambda: 0)
    step = loop.Trainee.step
    done = []

    def counted(self, number, *args):
        done.append(number)
        if number == stop - 1:
            monkeypatch.setattr(loop, "clock", lambda: 1000 + next(clock))
        return step(self, number, *args)

    monkeypatch.setattr(loop.Trainee, "step", counted)
    assert trained(arm, prepared, pairs, dev, tmp_path / "parts", deadline=10) is None
    assert done == list(range(stop))
    monkeypatch.setattr(loop, "clock", lambda: 0)
    monkeypatch.setattr(loop.Trainee, "step", step)
    torch.manual_seed(123)  # another process has other random numbers
    resumed, same = trained(arm, prepared, pairs, dev, tmp_path / "parts")
    assert [point["step"] for point in resumed.curve] == [0, 4, 8]
    assert resumed.curve == whole.curve
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), same.state_dict().values(), strict=True))


def test_training_moves_what_the_arm_says_and_nothing_else(prepared, pairs, dev, tmp_path):
    """Embeddings hold still in every arm, a frozen query, too, gates while frozen; biases move only with balancing."""
    for arm in (HAG, MEAN_POOLED, ARMS["no-balancing"], dataclasses.replace(HAG, frozen_gates=1.0)):
        arm = dataclasses.replace(arm, calibrated=False)
        before = build(fitted(arm), prepared / "parent", [], 0, "cpu").state_dict()
        before = {name: tensor.clone() for name, tensor in before.items()}
        after = trained(arm, prepared, pairs, dev, tmp_path / arm.name)[1].state_dict()
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert not any("embeddings" in name for name in moved)
        assert any(".experts." in name for name in moved)
        assert any("attention_query" in name for name in moved) == (not arm.mean_pooled and not arm.frozen_gates)
        assert any("gate.weight" in name for name in moved) == (not arm.frozen_gates)
        assert any("group_bias" in name for name in moved) == (arm.balancing is not None)


@pytest.mark.parametrize(("name", "apart"), [("gradient-1", False), ("gradient-0.5", True)])
def test_experts_that_share_all_of_their_gradients_stay_equal(name, apart, prepared, pairs, dev, tmp_path):
    model = trained(ARMS[name], prepared, pairs, dev, tmp_path)[1]
    start = sentence.encoder_of(model_of(HAG, prepared)).state_dict()
    for key, stack in sentence.encoder_of(model).state_dict().items():
        if ".experts." in key:
            assert torch.allclose(stack, stack[:1].expand_as(stack), atol=1e-7) != apart
            assert not torch.equal(stack, start[key])


def test_rates_differ_by_kind_of_parameter(prepared):
    arm = fitted(dataclasses.replace(HAG, expert_rate=4.0, router_rate=10.0))
    model = build(arm, prepared / "parent", [], 0, "cpu")
    groups = {group["kind"]: group for group in parameter_groups(model, arm)}
    assert {kind: group["factor"] for kind, group in groups.items()} == {"shared": 1.0, "experts": 4.0, "router": 10.0}
    trained_numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(p.numel() for group in groups.values() for p in group["params"]) == trained_numbers


def test_what_learns_at_no_rate_stays_the_parents(prepared, pairs, dev, tmp_path):
    """It needs no gradient either, or its part of the norm would shorten the others' steps."""
    arm = dataclasses.replace(HAG, shared_rate=0.0)
    before = model_of(arm, prepared).state_dict()
    _, model = trained(arm, prepared, pairs, dev, tmp_path)
    moved = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved
    assert all(".experts." in name or ".router." in name for name in moved)
    assert not any(
        p.requires_grad for name, p in model.named_parameters() if ".experts." not in name and ".router." not in name
    )


def test_a_domain_that_is_left_out_is_never_seen(prepared, pairs):
    """Neither in training nor where gates start."""
    budget = dataclasses.replace(TINY_BUDGET, steps=200, left_out=("lexical",))
    number = pairs.domains.index("lexical")
    for mixed in (False, True):
        rows = np.concatenate(inputs.plan(pairs, budget, 0, mixed))
        assert number not in np.searchsorted(pairs.first_rows, rows, side="right") - 1
    all_pairs, fewer = (inputs.calibration_pairs(prepared, one) for one in (TINY_BUDGET, budget))
    assert set(fewer) < set(all_pairs)


def test_gates_start_from_domains_as_they_are_drawn(prepared):
    """Groups that are even over domains alike are not even over batches, and biases would tear them apart."""
    counts = {}
    manifest = json.loads((prepared / "manifest.json").read_text())["domains"]
    for temperature in (1.0, 1e9):
        for domain in manifest:
            others = tuple(set(manifest) - {domain})
            budget = dataclasses.replace(TINY_BUDGET, temperature=temperature, left_out=others)
            alone = set(inputs.calibration_pairs(prepared, budget))
            drawn = inputs.calibration_pairs(prepared, dataclasses.replace(budget, left_out=()))
            counts[temperature, domain] = sum(pair in alone for pair in drawn)
    most = max(domain["train"] for domain in manifest.values())
    assert {domain: counts[1.0, domain] for domain in manifest} == {
        domain: math.ceil(20 * numbers["train"] / most) for domain, numbers in manifest.items()
    }
    assert {counts[1e9, domain] for domain in manifest} == {20}


def test_gates_start_from_pairs_cut_to_what_training_sees(prepared):
    """Longer texts would put the gates where no batch lies."""
    tokenizer = SentenceTransformer(str(prepared / "parent"), device="cpu").tokenizer
    budgets_of_length = (dataclasses.replace(TINY_BUDGET, max_length=length) for length in (8, 512))
    cut, whole = (inputs.calibration_pairs(prepared, budget) for budget in budgets_of_length)
    assert len(cut) == len(whole)
    for short, long in zip(cut, whole, strict=True):
        for text, original in zip(short, long, strict=True):
            assert original.startswith(text)
            assert tokenizer(text)["input_ids"] == tokenizer(original, truncation=True, max_length=8)["input_ids"]


@pytest.mark.parametrize("rule", ["token hash", "text hash", "domain"])
def test_fixed_routing_depends_on_nothing_but_what_it_says(rule, prepared):
    """By token: the same token, the same expert. By text: one expert, whatever the padding. By domain: the domain's."""
    arm = next(arm for arm in ARMS.values() if arm.routing == rule)
    model = model_of(arm, prepared)
    encoder = sentence.encoder_of(model)
    chosen = []
    router = next(module for module in encoder.modules() if isinstance(module, FixedRouter))
    router.register_forward_hook(lambda module, _, routing: chosen.append(routing.expert_index.squeeze(-1)))
    ids = torch.randint(5, 90, (12, 10), generator=torch.Generator().manual_seed(0))
    ids[3, 4:7] = ids[0, 0]
    mask = torch.ones_like(ids)
    set_domain(encoder, "lexical")
    with torch.inference_mode():
        encoder(input_ids=ids, attention_mask=mask)
        padded = torch.nn.functional.pad(ids, (0, 3)), torch.nn.functional.pad(mask, (0, 3))
        encoder(input_ids=padded[0], attention_mask=padded[1])
        encoder(input_ids=padded[0], attention_mask=padded[1], output_expert_index=True)  # keeps the padding in
    experts = chosen[0].view(12, 10)
    assert torch.equal(chosen[1].view(12, 10), experts)  # padding is left out before it gets here
    assert torch.equal(chosen[2].view(12, 13)[:, :10], experts)
    assert (chosen[2].view(12, 13)[:, 10:] == 8).all()
    if rule == "token hash":
        assert (experts[3, 4:7] == experts[0, 0]).all()
        assert len(experts.unique()) > 4
    else:
        assert all(len(row.unique()) == 1 for row in experts)
        assert len(experts.unique()) == 1 if rule == "domain" else len(experts.unique()) > 3
    if rule == "domain":
        assert (experts == EXPERT_OF_DOMAIN["lexical"]).all()


def test_a_subject_opens_one_path_that_padding_does_not_change(prepared):
    """A text has the same expert in every layer, alone and in a batch, and all experts have texts."""
    model = model_of(SUBJECT, prepared)
    encoder = sentence.encoder_of(model)
    chosen: list = []
    for router in (module for module in encoder.modules() if isinstance(module, FixedRouter)):
        router.register_forward_hook(lambda module, _, routing: chosen.append(routing.expert_index.flatten()))
    texts = [text for pair in inputs.calibration_pairs(prepared, TINY_BUDGET) for text in pair]

    def paths(batch_size: int) -> list[list[int]]:
        chosen.clear()
        tokens = [len(ids) for ids in model.tokenizer(texts)["input_ids"]]
        for first in range(0, len(texts), batch_size):
            batch = model.tokenizer(texts[first : first + batch_size], padding=True, return_tensors="pt")
            with torch.inference_mode():
                encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        by_layer = [torch.cat([index[index < 8] for index in chosen[layer::2]]).split(tokens) for layer in range(2)]
        assert all(len(experts.unique()) == 1 for layer in by_layer for experts in layer)
        return [[int(experts[0]) for experts in layer] for layer in by_layer]

    first_layer, second_layer = paths(16)
    assert first_layer == second_layer
    assert set(first_layer) == set(range(8))
    assert paths(1)[0] == first_layer


def test_the_ceiling_knows_every_domain_of_the_kit():
    """A set whose domain is not known would be scored with the expert of the one before."""
    assert set(DOMAIN_OF_SET.values()) <= set(EXPERT_OF_DOMAIN)
    assert set(EXPERT_OF_DOMAIN.values()) == set(range(8))


def test_held_out_rank_is_1_for_the_right_positive(prepared, dev):
    """MRR by hand, and 1 for a model that tells all texts apart from the pair's own."""
    model = model_of(DENSE, prepared)
    mrr, routing = scoring.dev_scores(model, dev)
    assert routing == {}
    rows = np.arange(dev.first_rows[0], dev.first_rows[1])
    with torch.inference_mode():
        anchors, positives = (model(part)["sentence_embedding"] for part in dev.features(rows))
    cosines = torch.nn.functional.cosine_similarity(anchors[:, None], positives[None], dim=-1)
    by_hand = [1 / (1 + int((row > row[i]).sum())) for i, row in enumerate(cosines)]
    assert mrr[dev.domains[0]] == pytest.approx(np.mean(by_hand))
    assert set(scoring.dev_scores(model_of(HAG, prepared), dev)[1]) == {"0", "1"}


@pytest.mark.parametrize("arm", [HAG, DENSE], ids=lambda arm: arm.name)
def test_recorded_vectors_score_as_the_model_itself(arm, prepared, tmp_path):
    """The kit is scored from vectors in another process; it must be `hagmoe evaluate`'s score, though a dense model's
    vectors are recorded through its mixture."""
    from hagmoe_hf.evaluation.models import candidate
    from hagmoe_hf.evaluation.runner import score_models
    from hagmoe_hf.evaluation.tasks import local_task

    model = model_of(arm, prepared)
    sets = scoring.kit_sets(prepared / "kit")
    scoring.record(model, sets, tmp_path / "kit.npz")
    scores = scoring.score_recorded(prepared / "kit", tmp_path / "kit.npz", "recorded")
    direct = score_models([candidate(model, "direct")], [local_task(kit_set) for kit_set in sets], tmp_path / "direct")[0]
    assert {name: entry["score"] for name, entry in scores.items()} == pytest.approx(
        {name: score.score for name, score in direct.items()}, abs=1e-6
    )
    assert scores["sts.wordsim353"]["languages"] == pytest.approx(direct["sts.wordsim353"].languages, abs=1e-6)


def test_scores_find_their_way_into_the_result(prepared, tmp_path):
    """The scorer is another process: what it writes must not lose what the run wrote."""
    scoring.record(model_of(DENSE, prepared), scoring.kit_sets(prepared / "kit"), tmp_path / "kit.npz")
    (tmp_path / "run.json").write_text(json.dumps({"seed": 3, "kit": None}))
    run.add_kit_scores(tmp_path / "run.json", prepared / "kit", tmp_path / "kit.npz")
    entry = json.loads((tmp_path / "run.json").read_text())
    assert entry["seed"] == 3
    assert set(entry["kit"]) == {"sts.wordsim353", "retrieval.arxiv_tags"}
    assert not (tmp_path / "kit.npz").exists()


@pytest.mark.parametrize("name", ["dense", "hag", "domain-label", "branch-late"])
def test_kept_weights_give_the_trained_model_back(name, prepared, pairs, dev, tmp_path):
    arm = ARMS[name]
    model = trained(arm, prepared, pairs, dev, tmp_path / "run")[1].eval()
    entry = {
        "arm": dataclasses.asdict(fitted(arm)), "budget": dataclasses.asdict(TINY_BUDGET), "learning_rate": 1e-3, "seed": 0,
    }  # fmt: skip
    with pytest.raises(FileNotFoundError, match="--keep"):
        run.kept_model(entry, tmp_path, prepared)
    run.keep_weights(tmp_path / "tiny" / f"{name}_lr0.001_seed0", model)
    assert scoring.dev_scores(run.kept_model(entry, tmp_path, prepared), dev) == scoring.dev_scores(model, dev)


def test_kept_runs_are_scored_later(prepared, pairs, dev, tmp_path, monkeypatch):
    budget = dataclasses.replace(TINY_BUDGET, seeds=(0,))
    place = run.Place(prepared, tmp_path / "results", tmp_path / "work")
    arms = (fitted(DENSE),)
    assert run.run_table(arms, budget, place, minutes=9, command="x", kit=False, keep=True)
    file = tmp_path / "results/tiny/dense_lr0.001_seed0.json"
    assert json.loads(file.read_text())["kit"] is None

    def score_here(result, kit, vectors):
        run.add_kit_scores(result, kit, vectors)
        return subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr(run, "score_elsewhere", score_here)
    assert run.run_table(arms, budget, place, minutes=9, command="x", kit=True)
    assert set(json.loads(file.read_text())["kit"]) == {"sts.wordsim353", "retrieval.arxiv_tags"}


def test_a_budget_that_follows_goes_on_where_the_other_ended(prepared, tmp_path, monkeypatch):
    """The same weights and gates, other batches, and a curve over both."""
    first = dataclasses.replace(TINY_BUDGET, seeds=(0,))
    then = dataclasses.replace(first, name="tiny-2", follows="tiny")
    monkeypatch.setattr(budgets, "BUDGETS", {"tiny": first, "tiny-2": then})
    monkeypatch.setattr(report, "BUDGETS", {"tiny": first, "tiny-2": then})
    monkeypatch.setattr(report, "TABLES", {1: (DENSE, fitted(CALIBRATED))})
    arms, folder = report.TABLES[1], tmp_path / "results"
    drawn = []
    monkeypatch.setattr(loop, "plan", lambda *args: drawn.append(inputs.plan(*args)) or drawn[-1])

    def run_all(budget):
        return run.run_table(arms, budget, run.Place(prepared, folder, tmp_path / "work"), 9, "x", kit=False, keep=True)

    with pytest.raises(FileNotFoundError, match=r"tiny.*--keep"):
        run_all(then)
    assert run_all(first)
    assert run_all(then)
    assert not any(np.array_equal(one, other) for one, other in zip(drawn[0], drawn[2], strict=True))
    for name, result in results.read_results(folder / "tiny-2").items():
        earlier = json.loads((folder / "tiny" / f"{name}.json").read_text())
        assert result["curve"][0]["dev_mrr"] == earlier["curve"][-1]["dev_mrr"]
        assert result["curve"][0]["routing"] == earlier["curve"][-1]["routing"]
        assert [point["pairs"] for point in result["curve"]] == [48, 72, 96]
    report.write_reports(folder)
    text = (folder / "tiny-2/table1.md").read_text()
    assert "8 steps of 6 pairs, at most 16 tokens, after those of `tiny`" in text
    done, before = (results.read_results(folder / name) for name in ("tiny-2", "tiny"))
    assert [pairs for pairs, _ in report.whole_curve(arms[1], then, done, before)] == [0, 24, 48, 72, 96]


def test_a_branch_goes_on_from_the_dense_run(prepared, tmp_path, monkeypatch):
    """With the vectors that it ended with, and gates that start from the states of that model."""
    first = dataclasses.replace(TINY_BUDGET, seeds=(0,))
    then = dataclasses.replace(first, name="tiny-2", follows="tiny")
    branch = fitted(BRANCH)
    for module in (budgets, report):
        monkeypatch.setattr(module, "BUDGETS", {"tiny": first, "tiny-2": then})
    monkeypatch.setattr(report, "TABLES", {5: (DENSE, branch)})
    folder, work = tmp_path / "results", tmp_path / "work"

    def run_all(budget, *arms):
        return run.run_table(arms, budget, run.Place(prepared, folder, work), 9, "x", kit=False, keep=True)

    assert run_all(first, DENSE)
    assert run_all(then, DENSE, branch)
    done = results.read_results(folder / "tiny-2")
    ended = results.read_results(folder / "tiny")[results.run_name(DENSE, 1e-3, 0)]["curve"][-1]["dev_mrr"]
    for arm in (DENSE, branch):
        assert done[results.run_name(arm, 1e-3, 0)]["curve"][0]["dev_mrr"] == pytest.approx(ended, abs=1e-6)
    model = run.kept_model(done[results.run_name(branch, 1e-3, 0)], work, prepared)
    dense = build(DENSE, prepared / "parent", [], 0, "cpu")
    dense.load_state_dict(load_file(run.kept_weights(work, "tiny", results.run_name(DENSE, 1e-3, 0))))
    started = mixture(branch, dense, inputs.calibration_pairs(prepared, TINY_BUDGET), 0).state_dict()
    gates = {name: weight for name, weight in model.state_dict().items() if "gate.weight" in name}
    assert gates
    assert all(torch.equal(weight, started[name]) for name, weight in gates.items())
    assert not all(torch.equal(weight, started[name]) for name, weight in model.state_dict().items())  # the rest trained on
    report.write_reports(folder)
    assert "| branch |" in (folder / "tiny-2/table5.md").read_text()


def test_a_run_whose_vectors_could_not_be_written_is_not_done(prepared, tmp_path, monkeypatch):
    """Its checkpoint goes when its result comes: a result without vectors would never be scored."""

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(scoring, "record", fail)
    budget = dataclasses.replace(TINY_BUDGET, seeds=(0,))
    place = run.Place(prepared, tmp_path / "results", tmp_path / "work")
    with pytest.raises(OSError, match="No space left"):
        run.run_table((fitted(DENSE),), budget, place, minutes=9, command="x", kit=True)
    assert not list((tmp_path / "results").rglob("*.json"))


PROGRAM = """
import dataclasses, os, runpy, signal, sys
sys.path.insert(0, "scripts")
from ablation import arms, budgets, loop, report, run
budgets.BUDGETS["screening"] = budgets.Budget("screening", 6, 6, 16, (1e-3,), (0,), 10, 2, calibration_pairs=20)
loop.CHECKPOINT_SECONDS = 0
hag = dataclasses.replace(arms.HAG, upcycling={"sparse_layers": [0, 1]})
arms.TABLES = report.TABLES = run.TABLES = {1: (arms.DENSE, hag)}
step = loop.Trainee.step
def killed_in_the_fifth_step(self, number, *args):
    if number == 4 and "KILL" in os.environ:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, number, *args)
loop.Trainee.step = killed_in_the_fifth_step
runpy.run_path("scripts/ablation.py", run_name="__main__")
"""


@pytest.mark.slow
def test_the_script_survives_a_kill_goes_on_and_reports(prepared, tmp_path):
    """The whole way as it is called: a table, kill -9 in the middle, again, then tables and pictures; without mteb."""
    work, out = tmp_path / "work", tmp_path / "results"

    def call(*more, **environment):
        words = [*more, "--inputs", prepared, "--results", out, "--work", work]
        usual = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", PROGRAM, *map(str, words)]
        return subprocess.run(command, cwd=ROOT, env={**usual, **environment}, capture_output=True, text=True, check=False)

    assert call("--table", "1", "--no-kit", KILL="1").returncode == -signal.SIGKILL
    assert [path.parent.name for path in work.rglob("checkpoint.pt")] == ["dense_lr0.001_seed0"]
    last = call("--table", "1", "--no-kit")
    assert "Budget screening: no runs left for now" in last.stdout, last.stderr
    assert not list(work.rglob("checkpoint.pt"))
    assert {path.stem for path in out.rglob("*.json")} == {"dense_lr0.001_seed0", "hag_lr0.001_seed0"}
    assert call("--report").returncode == 0
    assert {path.name for path in (out / "screening").iterdir() if path.suffix != ".json"} == {
        "table1.md", "table1.png", "table1_domains.png",
    }  # fmt: skip


def test_training_needs_no_mteb():
    """The machine with the GPU has none, and nothing to install it from; scoring alone needs it."""
    program = "import sys; sys.path.insert(0, 'scripts'); import ablation.run, ablation.report; print('mteb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True).stdout == "False\n"
