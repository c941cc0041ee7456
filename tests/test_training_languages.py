"""Runs of the train command that teach languages: translations, dictionaries, texts that stay, the recipe."""

import json
import shutil

import pytest
import torch
from accelerate import DistributedType, PartialState
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from training_helpers import largest_difference, words

from hagmoe_hf import fit_translations, sentence, upcycle
from hagmoe_hf.training.interpolation import weights_to_learn
from hagmoe_hf.training.run import main as train
from hagmoe_hf.training.slow_experts import SlowExpertsCallback


def test_a_memory_knows_the_training_texts_and_learns(tmp_path, tiny_parent, pairs_file):
    """Its n-grams are those of the data, without a word in the user's script."""
    train(words(tmp_path / "out", tiny_parent, pairs_file, ngram_memory_size=300))
    encoder = sentence.encoder_of(SentenceTransformer(str(tmp_path / "out/model"), device="cpu"))
    assert encoder.config.ngram_memory_size == 300
    learned = encoder.ngram_memory.rows.abs().sum(dim=-1) > 0
    assert not learned[0], "row 0 stands for all that is unknown"
    assert learned[1:].float().mean() > 0.5


@pytest.mark.parametrize("option", ["preserve", "preserve_experts"])
def test_translations_are_learned_while_texts_keep_what_they_have(option, tmp_path, tiny_parent, corpus):
    """One command teaches a parent what it lacks, and leaves the first column's kind of text its vectors, or its experts."""
    rows = [{"anchor": text, "positive": " ".join(reversed(text.split()))[::-1]} for text in corpus[:80]]
    file = tmp_path / "translations.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    options = {"loss": "translation", "teacher": str(tiny_parent), "ngram_memory_size": 100, "shared_expert_fraction": 0.5}
    train([*words(tmp_path / "out", tiny_parent, file, **options, sparse_layers=0), f"--{option}"])
    encoder = sentence.encoder_of(SentenceTransformer(str(tmp_path / "out/model"), device="cpu"))
    parent = SentenceTransformer(str(tiny_parent), device="cpu")
    assert encoder.config.preserve_first_group
    dense = parent[0].model
    (layer,) = encoder.config.sparse_layers
    block = encoder.layers[layer].mlp
    up = dense.encoder.layer[layer].intermediate.dense.weight
    width = block.experts.up_proj.shape[1]
    assert torch.equal(block.experts.up_proj[0], up[-width:])
    for learned, was in (
        (encoder.embeddings.word_embeddings.weight, dense.embeddings.word_embeddings.weight),
        (block.shared_expert.up_proj.weight, up[:-width]),
    ):
        assert torch.equal(learned, was) == (option == "preserve")
    assert not torch.equal(block.experts.up_proj[1], up[-width:])
    assert encoder.ngram_memory.rows.any()


def test_preserved_experts_can_learn_slowly(tmp_path, tiny_parent, corpus):
    """A step that is a quarter as long moves them a quarter as far, and the others as far as ever."""
    rows = [{"anchor": text, "positive": text[::-1]} for text in corpus[:80]]
    file = tmp_path / "translations.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    options = {"loss": "translation", "teacher": str(tiny_parent), "sparse_layers": 0, "max_steps": 1}
    moved = {}
    start = sentence.encoder_of(SentenceTransformer(str(tiny_parent), device="cpu")).encoder.layer
    for rate in (0.25, 1.0):
        out = tmp_path / f"{rate}"
        train([*words(out, tiny_parent, file, **options, preserved_rate=rate), "--preserve_experts"])
        encoder = sentence.encoder_of(SentenceTransformer(str(out / "model"), device="cpu"))
        assert not encoder.config.preserve_first_group
        (layer,) = encoder.config.sparse_layers
        experts = encoder.layers[layer].mlp.experts.up_proj.detach()
        moved[rate] = experts - start[layer].intermediate.dense.weight[-experts.shape[1] :]
    assert moved[1.0][0].any()
    torch.testing.assert_close(moved[0.25][0], moved[1.0][0] / 4, atol=1e-7, rtol=1e-3)
    torch.testing.assert_close(moved[0.25][1], moved[1.0][1])


def test_weights_are_left_at_a_part_of_their_way(tmp_path, tiny_parent, pairs_file):
    """Whoever wants to keep more of what the model knew gets it without another run; a killed run ends the same."""
    ends = {}
    for part in (0.5, 1.0):
        out = tmp_path / f"{part}"
        train(words(out, tiny_parent, pairs_file, interpolation=part, ngram_memory_size=100))
        ends[part] = load_file(out / "model/model.safetensors")
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "0.5", resumed, ignore=shutil.ignore_patterns("model", "checkpoint-4"))
    train([*words(resumed, tiny_parent, pairs_file, interpolation=0.5, ngram_memory_size=100), "--resume"])
    assert largest_difference(tmp_path / "0.5", resumed) <= 1e-6
    assert torch.equal(
        load_file(tmp_path / "0.5/checkpoint-4/model.safetensors")["ngram_memory.rows"], ends[1.0]["ngram_memory.rows"]
    )
    start = SentenceTransformer(str(tiny_parent), device="cpu")[0].model
    name = "embeddings.word_embeddings.weight"
    torch.testing.assert_close(ends[0.5][name], start.get_parameter(name).lerp(ends[1.0][name], 0.5))
    assert not torch.equal(ends[1.0][name], start.get_parameter(name))
    assert torch.equal(ends[0.5]["ngram_memory.rows"], ends[1.0]["ngram_memory.rows"])
    assert torch.isfinite(torch.cat([tensor.float().flatten() for tensor in ends[0.5].values()])).all()


def test_experts_in_pieces_are_not_slowed_down(monkeypatch):
    """Under FSDP there is no whole expert to take back, and all of them would learn at the full rate."""
    monkeypatch.setattr(PartialState(), "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match=r"rate=0\.25 under FSDP, which cuts experts into pieces; allowed: one process"):
        SlowExpertsCallback(0.25).on_train_begin(None, None, None)
    with pytest.raises(ValueError, match=r"interpolation under FSDP, which cuts weights into pieces; allowed: 1, or"):
        weights_to_learn(torch.nn.Linear(2, 2))
    for rate in (-0.1, 1.5, True, "fast"):
        with pytest.raises(ValueError, match=rf"rate={rate!r} is not possible; allowed: a number from 0 to 1"):
            SlowExpertsCallback(rate)


def test_a_memory_starts_from_translations(tmp_path, tiny_parent, corpus):
    """Before the first step: with a rate of next to nothing, the rows are those of the fit."""
    pairs = [(text, text[::-1]) for text in corpus[:80]]
    file = tmp_path / "translations.jsonl"
    rows = [{"anchor": text, "positive": translation} for text, translation in pairs]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    options = {"loss": "translation", "teacher": str(tiny_parent), "ngram_memory_size": 100, "learning_rate": 1e-12}
    train([*words(tmp_path / "out", tiny_parent, file, **options), "--fit_translations"])
    trained = sentence.encoder_of(SentenceTransformer(str(tmp_path / "out/model"), device="cpu")).ngram_memory
    fitted = upcycle(str(tiny_parent), ngram_texts=pairs, ngram_memory_size=100)
    fit_translations(fitted, pairs)
    assert trained.rows.any()
    assert torch.allclose(trained.rows, sentence.encoder_of(fitted).ngram_memory.rows, atol=1e-6)


def test_a_memory_starts_from_dictionaries_that_nothing_is_trained_on(tmp_path, tiny_parent, corpus):
    """Their words have rows from the start, and the card says whose words they are."""
    pairs = [(text, text[::-1]) for text in corpus[:80]]
    entries = [("".join(text.split()[:1]), f"{'xy'[i % 2]}{i}") for i, text in enumerate(corpus[:40])]
    files = {"translations": pairs, "words": entries}
    for name, given in files.items():
        rows = [{"anchor": a, "positive": b, "license": f"{name}-1.0"} for a, b in given]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    options = {"loss": "translation", "teacher": str(tiny_parent), "ngram_memory_size": 300, "learning_rate": 1e-12}
    out = tmp_path / "out"
    data = tmp_path / "translations.jsonl"
    train([*words(out, tiny_parent, data, dictionaries=tmp_path / "words.jsonl", **options), "--fit_translations"])
    trained = sentence.encoder_of(SentenceTransformer(str(out / "model"), device="cpu")).ngram_memory
    fitted = upcycle(str(tiny_parent), ngram_texts=[*pairs, *entries], ngram_memory_size=300)
    fit_translations(fitted, [*pairs, *entries])
    expected = sentence.encoder_of(fitted).ngram_memory
    assert torch.equal(trained.names, expected.names)
    assert torch.allclose(trained.rows, expected.rows, atol=1e-6)
    stated = json.loads((out / "data_report.json").read_text())["stated"]["license"]
    assert stated == {"translations-1.0": 80, "words-1.0 (dictionaries)": 40}
    assert "words-1.0 (dictionaries): 40" in (out / "model/README.md").read_text(encoding="utf-8")


def test_translations_are_learned_beside_pairs_in_one_language(tmp_path, tiny_parent, corpus):
    """Each by its own loss: texts and their translations to the teacher's vector, pairs told apart and kept."""
    pairs = [{"anchor": text, "positive": text[::-1], "domain": "bitext"} for text in corpus[:60]]
    pairs += [{"anchor": text[::-1], "positive": text[-20::-1], "domain": "others"} for text in corpus[60:100]]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, pairs)) + "\n", encoding="utf-8")
    options = {"domain_column": "domain", "loss": "ranking_distill_kl", "domain_losses": '{"bitext": "translation"}'}
    options |= {"teacher": str(tiny_parent), "recipe": "none"}
    more = {"ngram_memory_size": 100, "eval_data": file, "eval_strategy": "steps"}
    flags = ["--preserve_experts", "--fit_translations"]
    train([*words(tmp_path / "out", tiny_parent, file, **options, **more, max_steps=8, logging_steps=1), *flags])
    encoder = sentence.encoder_of(SentenceTransformer(str(tmp_path / "out/model"), device="cpu"))
    started_from = upcycle(
        str(tiny_parent),
        preserved_texts=[row["anchor"] for row in pairs if row["domain"] == "bitext"],
        ngram_texts=[row["positive"] for row in pairs if row["domain"] == "bitext"],
        ngram_memory_size=100,
    )
    assert torch.equal(encoder.ngram_memory.names, sentence.encoder_of(started_from).ngram_memory.names)
    for layer in encoder.config.sparse_layers:
        experts = encoder.layers[layer].mlp.experts.up_proj
        started = sentence.encoder_of(started_from).layers[layer].mlp.experts.up_proj
        assert torch.equal(experts[0], started[0])
        assert not torch.equal(experts[1], started[1])
    logged = json.loads((tmp_path / "out/checkpoint-8/trainer_state.json").read_text())["log_history"]
    assert {"eval_bitext_loss", "eval_others_loss"} <= set().union(*logged)


def test_translations_beside_pairs_are_trained_by_the_recipe(tmp_path, tiny_parent, corpus):
    """Nothing but the data and which of it are translations; the rest is what was measured."""
    pairs = [{"anchor": text, "positive": text[::-1], "domain": "bitext"} for text in corpus[:60]]
    pairs += [{"anchor": text[::-1], "positive": text[-20::-1], "domain": "others"} for text in corpus[60:100]]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, pairs)) + "\n", encoding="utf-8")
    line = ["--model", str(tiny_parent), "--train_data", str(file), "--domain_column", "domain", "--use_cpu", "--max_steps"]
    command = [*line, "3", "--domain_losses", '{"bitext": "translation"}']
    train([*command, "--output_dir", str(tmp_path / "out")])
    encoder = sentence.encoder_of(SentenceTransformer(str(tmp_path / "out/model"), device="cpu"))
    config = encoder.config
    assert config.sparse_layers == list(range(config.num_hidden_layers))
    assert (config.n_group, config.num_experts, config.shared_expert_intermediate_size) == (2, 2, 0)
    english, others = zip(*((row["anchor"], row["positive"]) for row in pairs[:60]), strict=True)
    started = upcycle(str(tiny_parent), preserved_texts=english, ngram_texts=others, ngram_memory_size=131072, seed=42)
    for layer, other in zip(encoder.layers, sentence.encoder_of(started).layers, strict=True):
        gates = (one.mlp.router.group_gate.weight for one in (layer, other))
        assert torch.equal(*gates), "texts of other domains, whose language is unknown, told the gates something"
    fit_translations(started, zip(english, others, strict=True))
    rows = sentence.encoder_of(started).ngram_memory.rows
    assert rows.any()
    assert torch.allclose(encoder.ngram_memory.rows, rows, atol=1e-7), "the memory learned"
    parent = SentenceTransformer(str(tiny_parent), device="cpu")[0].model
    assert torch.equal(encoder.embeddings.word_embeddings.weight, parent.embeddings.word_embeddings.weight)
    for layer, dense in zip(encoder.layers, parent.encoder.layer, strict=True):
        moved = (layer.mlp.experts.up_proj - dense.intermediate.dense.weight).abs().amax(dim=(1, 2))
        assert 1.7 < moved[1] / moved[0] < 2.3
    again = ["--output_dir", str(tmp_path / "again"), "--model", str(tmp_path / "out/model")]
    with pytest.raises(
        ValueError, match=r"recipe='languages' with model='.*', a mixture already; allowed: a dense model, or"
    ):
        train([*command, *again])
    with pytest.raises(ValueError, match=r"bias_update_rate=0.1 is not possible with a mixture whose groups are for kinds"):
        train([*line, "3", *again, "--recipe", "none", "--bias_update_rate", "0.1"])


def test_rows_may_be_told_to_be_in_the_models_language(tmp_path, tiny_parent, corpus):
    """Translations of software teach little about the language of medicine."""
    pairs = [{"anchor": text, "positive": text[::-1], "domain": "bitext", "lang": "xx"} for text in corpus[:60]]
    pairs += [{"anchor": text, "positive": text[:20], "domain": "others", "lang": "en"} for text in corpus[60:90]]
    pairs += [{"anchor": text[::-1], "positive": text[20::-1], "domain": "others", "lang": "xx"} for text in corpus[90:120]]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, pairs)) + "\n", encoding="utf-8")
    command = ["--model", str(tiny_parent), "--train_data", str(file), "--domain_column", "domain", "--use_cpu"]
    command += ["--max_steps", "1", "--domain_losses", '{"bitext": "translation"}', "--preserve_where", "lang=en"]
    train([*command, "--output_dir", str(tmp_path / "out")])
    encoder = sentence.encoder_of(SentenceTransformer(str(tmp_path / "out/model"), device="cpu"))
    told, other = pairs[60:90], pairs[90:]
    told_texts = dict.fromkeys(row[name] for row in told for name in ("anchor", "positive"))
    english = [row["anchor"] for row in pairs[:60]] + list(told_texts)
    others = [row["positive"] for row in pairs[:60]] + [row[name] for row in other for name in ("anchor", "positive")]
    started = upcycle(str(tiny_parent), preserved_texts=english, ngram_texts=others, ngram_memory_size=131072, seed=42)
    assert torch.equal(encoder.ngram_memory.names, sentence.encoder_of(started).ngram_memory.names)
    for layer, same in zip(encoder.layers, sentence.encoder_of(started).layers, strict=True):
        assert torch.equal(layer.mlp.router.group_gate.weight, same.mlp.router.group_gate.weight)
    with pytest.raises(ValueError, match=r"preserve_where='lang' is not possible; allowed: COLUMN=VALUE"):
        train([*command, "--output_dir", str(tmp_path / "again"), "--preserve_where", "lang"])
    with pytest.raises(ValueError, match=r"preserve_where='lang=en' is not possible; allowed: None without preserve"):
        train([*command, "--output_dir", str(tmp_path / "again"), "--recipe", "none"])


def test_the_recipe_can_do_without_experts(tmp_path, tiny_parent, corpus):
    """What the memory gives is to be had in the parent's own shape, at its speed."""
    pairs = [{"anchor": text, "positive": text[::-1], "domain": "bitext"} for text in corpus[:60]]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, pairs)) + "\n", encoding="utf-8")
    config = {"model": str(tiny_parent), "train_data": [str(file)], "domain_column": "domain", "sparse_layers": []}
    config |= {"domain_losses": {"bitext": "translation"}, "max_steps": 2, "output_dir": str(tmp_path / "out")}
    (tmp_path / "train.yaml").write_text(json.dumps(config))
    train(["--config", str(tmp_path / "train.yaml"), "--use_cpu"])
    encoder = sentence.encoder_of(SentenceTransformer(str(tmp_path / "out/model"), device="cpu"))
    assert encoder.config.sparse_layers == []
    assert encoder.ngram_memory.rows.any()
    dense = SentenceTransformer(str(tiny_parent), device="cpu")[0].model.encoder.layer
    assert not torch.equal(encoder.layers[0].mlp.up_proj.weight, dense[0].intermediate.dense.weight)


def test_a_model_that_is_its_own_teacher_learns_as_from_its_copy(tmp_path, tiny_parent, corpus):
    """It reads each batch beside the student, where another teacher encodes all of the data beforehand."""
    rows = [{"anchor": text[:60], "positive": text[60:120] + text[:9]} for text in corpus[:64]]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    shared = {"eval_data": file, "eval_strategy": "steps"}
    shared["adam_epsilon"] = 1e-4  # or Adam makes whole steps of gradients that are but rounding
    for name in ("translation", "ranking_distill_kl"):
        own, copy = tmp_path / f"{name}-own", tmp_path / f"{name}-copy"
        for out, more in ((own, {}), (copy, {"teacher": tiny_parent})):
            train(words(out, tiny_parent, file, loss=name, **shared, **more))
        assert largest_difference(own, copy) < 1e-5
        states = [json.loads((out / "checkpoint-4/trainer_state.json").read_text()) for out in (own, copy)]
        evaluated = [[entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry] for state in states]
        assert evaluated[0] == pytest.approx(evaluated[1], abs=1e-4)
        assert len(evaluated[0]) == 4


def test_a_loss_for_a_domain_that_is_not_there_is_refused(tmp_path, tiny_parent, pairs_file):
    options = {"domain_column": "domain", "domain_losses": '{"laws": "cached_multiple_negatives_ranking"}'}
    with pytest.raises(ValueError, match=r"domain_losses names the domain 'laws'; allowed: \['"):
        train(words(tmp_path / "out", tiny_parent, pairs_file, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "multiple_negatives_ranking", "ngram_memory_size": 9}, r"loss='multiple_negatives.*'translation'"),
        ({"loss": "translation", "teacher": "x"}, r"ngram_memory_size=0 .*at least 1 with fit_translations=True"),
    ],
)
def test_a_fit_needs_translations_and_a_memory(options, message, tmp_path, tiny_parent, pairs_file):
    with pytest.raises(ValueError, match=message):
        train([*words(tmp_path / "out", tiny_parent, pairs_file, **options), "--fit_translations"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decay": 0.01}, r"weight_decay=0.01 .*allowed: 0"),
        ({"lora_rank": 2}, r"lora_rank=2 .*allowed: 0"),
        ({"objective": "mlm"}, r"objective='mlm' .*allowed: 'embedding'"),
    ],
)
def test_what_would_move_preserved_texts_is_refused(options, message, tmp_path, tiny_parent, pairs_file, corpus):
    """Also when a saved mixture is trained further, which carries the promise in its configuration."""
    mixture = upcycle(str(tiny_parent), preserved_texts=corpus[:40], calibration_texts=corpus[40:80])
    mixture.save_pretrained(str(tmp_path / "mixture"))
    given = {"columns": ["anchor"]} if options.get("objective") else {}
    with pytest.raises(ValueError, match=message):
        train(words(tmp_path / "out", tmp_path / "mixture", pairs_file, **options, **given))


def test_a_mixture_that_preserves_nothing_cannot_be_told_to(tmp_path, tiny_parent, pairs_file):
    upcycle(str(tiny_parent)).save_pretrained(str(tmp_path / "mixture"))
    for option in ("preserve", "preserve_experts"):
        with pytest.raises(ValueError, match=rf"^{option}=True with model=.*allowed: a dense model, or"):
            train([*words(tmp_path / "out", tmp_path / "mixture", pairs_file), f"--{option}"])


def test_a_domain_whose_name_no_module_can_have_is_refused(tmp_path, tiny_parent, pairs_file):
    """sentence-transformers makes modules of a loss for each domain."""
    rows = pairs_file.read_text(encoding="utf-8").splitlines()
    dotted = [json.dumps(json.loads(row) | {"domain": "stackoverflow.com"}) for row in rows]
    (tmp_path / "dotted.jsonl").write_text("\n".join(dotted), encoding="utf-8")
    losses = '{"stackoverflow.com": "cached_multiple_negatives_ranking"}'
    options = {"domain_column": "domain", "domain_losses": losses}
    with pytest.raises(ValueError, match=r"domain_losses with the domain 'stackoverflow\.com'; allowed: .* without a dot"):
        train(words(tmp_path / "out", tiny_parent, tmp_path / "dotted.jsonl", **options))
