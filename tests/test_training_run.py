"""Whole runs of the train command on a tiny model and real text."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from training_helpers import history, largest_difference, words
from transformers import AutoModelForMaskedLM, AutoTokenizer

from hagmoe_hf import HagMoeModel, sentence, upcycle
from hagmoe_hf.cli.main import main as hagmoe_main
from hagmoe_hf.hub import PICKLES
from hagmoe_hf.training.mlm import train_tokenizer
from hagmoe_hf.training.run import main as train

ROOT = Path(__file__).parents[1]
TEXTS = ["free the disk space", "Wie spät ist es?", "", "a " * 400, "日本語のテキスト"]
CURRICULUM = """
phases:
  - {name: routers, until: 0.3, learning_rates: {"*": 0, "*.router.*": 10}, max_length: 12, topk_group: 2}
  - {name: experts, until: 14, learning_rates: {"*": 0, "*.router.*": 1, "*.experts.*": 1}, mix: {code: 3, words: 1}}
  - {name: everything}
"""


@pytest.fixture
def curriculum(tmp_path):
    path = tmp_path / "curriculum.yaml"
    path.write_text(CURRICULUM)
    return path


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, tiny_parent, pairs_file, curriculum):
    """kill -9 in the second phase of the second epoch, with dropout, accumulation, several domains and a curriculum.

    Weights, losses, learning rates and phases of the resumed run equal an uninterrupted one's, so somebody who loses a
    machine loses time and nothing else.
    """
    options = {
        "max_steps": 24,
        "domain_column": "domain",
        "gradient_accumulation_steps": 2,
        "curriculum": curriculum,
        "save_steps": 3,
    }
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(words(whole, tiny_parent, pairs_file, **options))

    command = [sys.executable, str(ROOT / "scripts/train.py"), *words(killed, tiny_parent, pairs_file, **options)]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment())
        deadline = time.monotonic() + 240
        while not (killed / "checkpoint-9/trainer_state.json").exists() and time.monotonic() < deadline:
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (killed / "model").exists()
    assert not (killed / "checkpoint-24").exists()

    train([*words(killed, tiny_parent, pairs_file, **options), "--resume"])
    assert largest_difference(whole, killed) <= 1e-6
    expected, got = history(whole, 24), history(killed, 24)
    assert [entry.get("phase") for entry in got if "phase" in entry] == ["routers", "experts", "everything"]
    assert len(got) == len(expected) == 27
    for one, other in zip(expected, got, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert value == other[key] if isinstance(value, str) else abs(value - other[key]) <= 1e-6, (one, other)


def test_a_resumed_run_depends_on_its_data_position(tmp_path, tiny_parent, pairs_file):
    """The guard of the test above: a run that begins its data anew must differ, or equality would prove nothing."""
    options = {"max_steps": 6, "save_steps": 3}
    whole, other = tmp_path / "whole", tmp_path / "other"
    train(words(whole, tiny_parent, pairs_file, **options))
    shutil.copytree(whole, other, ignore=shutil.ignore_patterns("model", "checkpoint-6"))
    train([*words(other, tiny_parent, pairs_file, **options), "--resume", "--ignore_data_skip"])
    assert largest_difference(whole, other) > 1e-5


@pytest.mark.parametrize(
    ("loss", "apart"),
    [
        ({"loss": "cosine_similarity"}, 0.0),
        ({"loss": "translation", "loss_options": '{"scale": 1e-9}'}, math.log(2)),  # InfoNCE of chance, over half as many
    ],
)
def test_two_processes_train_as_one_with_the_same_global_batch(loss, apart, tmp_path, tiny_parent, pairs_file):
    """`accelerate launch scripts/train.py` on two CPU processes (gloo), with a loss of each row alone and no dropout."""
    parent = tmp_path / "parent"
    shutil.copytree(tiny_parent, parent)
    config = json.loads((parent / "config.json").read_text())
    config.update(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    (parent / "config.json").write_text(json.dumps(config))
    options = {
        **loss,
        "max_steps": 20,
        "save_steps": 20,
        "adam_epsilon": 1e-4,  # or Adam makes whole steps of gradients that are but rounding
        "domain_column": "domain",
        "no_one_domain_batches": None,
        "dataloader_drop_last": True,
    }
    one, two = tmp_path / "one", tmp_path / "two"
    train(words(one, parent, pairs_file, **options, per_device_train_batch_size=8))
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"]
    command = [
        sys.executable,
        "-m",
        *launcher,
        "--dynamo_backend=no",
        "--main_process_port=0",
        str(ROOT / "scripts/train.py"),
    ]
    command += words(two, parent, pairs_file, **options, per_device_train_batch_size=4)
    run = subprocess.run(command, env={**environment(), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("Read 240 rows") == 1, "one process reports"
    losses = [[entry["loss"] for entry in history(folder, 20)] for folder in (one, two)]
    assert len(losses[0]) == len(losses[1]) == 20
    assert max(abs(a - b - apart) for a, b in zip(*losses, strict=True)) <= 1e-4
    assert largest_difference(one, two) <= 1e-4
    assert largest_difference(one, two) > 0, "two processes sum in another order"


def test_every_checkpoint_is_a_model_with_a_card(tmp_path, tiny_parent, pairs_file):
    """Whoever stops a run early takes the last checkpoint and serves it."""
    train(words(tmp_path / "out", tiny_parent, pairs_file, domain_column="domain"))
    vectors = {}
    for name in ("checkpoint-2", "checkpoint-4", "model"):
        model = SentenceTransformer(str(tmp_path / "out" / name), device="cpu")
        assert isinstance(model[0].model, HagMoeModel)
        vectors[name] = torch.tensor(model.encode(TEXTS))
        card = (tmp_path / "out" / name / "README.md").read_text(encoding="utf-8")
        assert "import hagmoe_hf" in card
        assert 'pip install "hagmoe_hf[sentence]"' in card
        assert "MultipleNegativesRankingLoss" in card
        assert "Read 240 rows, kept 240." in card
    pickles = [path.name for path in (tmp_path / "out/model").rglob("*") if path.suffix in PICKLES]
    assert not pickles, "`hagmoe push` would refuse the model"
    assert torch.equal(vectors["model"], vectors["checkpoint-4"])
    assert not torch.equal(vectors["model"], vectors["checkpoint-2"])
    parent = SentenceTransformer(str(tiny_parent), device="cpu").encode(TEXTS)
    assert not torch.allclose(vectors["checkpoint-2"], torch.tensor(parent))
    assert json.loads((tmp_path / "out/data_report.json").read_text())["domains"] == {"code": 120, "docs": 60, "words": 60}


@pytest.mark.parametrize(("max_length", "afterwards"), [(5, 32), (48, 48)])
def test_short_texts_in_training_do_not_shorten_what_the_model_reads(
    max_length, afterwards, tmp_path, tiny_parent, pairs_file
):
    """Cut for the sake of speed; whoever serves the model does not expect it to ignore the rest of a text."""
    parent = SentenceTransformer(str(tiny_parent), device="cpu")
    parent.max_seq_length = 32
    parent.save_pretrained(str(tmp_path / "parent"))
    train(words(tmp_path / "out", tmp_path / "parent", pairs_file, max_length=max_length, max_steps=2))
    lengths = [
        SentenceTransformer(str(tmp_path / "out" / name), device="cpu").max_seq_length for name in ("checkpoint-2", "model")
    ]
    assert lengths == [max_length, afterwards]


def test_nothing_of_the_users_is_lost(tmp_path, tiny_parent, pairs_file):
    """Not a file that lies there, not a finished model, not a checkpoint that was being written."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="is not empty; allowed: a new name, an empty folder, or --resume"):
        train(words(out, tiny_parent, pairs_file))
    assert [path.name for path in out.iterdir()] == ["mine.txt"]

    train([*words(out, tiny_parent, pairs_file), "--resume"])
    model = (out / "model/model.safetensors").read_bytes()
    train([*words(out, tiny_parent, pairs_file, max_steps=6), "--resume"])
    assert (out / "model/model.safetensors").read_bytes() == model
    assert not (out / "checkpoint-6").exists()

    shutil.rmtree(out / "model")
    (out / "checkpoint-4/trainer_state.json").write_text('{"global_st')  # killed while writing
    train([*words(out, tiny_parent, pairs_file), "--resume"])
    assert (out / "model/model.safetensors").read_bytes() == model, "it went on from checkpoint-2"
    assert len(list(out.glob(".incomplete-checkpoint-4-*"))) == 1
    assert (out / "mine.txt").read_text() == "keep me"


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (1, {}, "Domain 'train' has 1 row.*compares the rows of a batch with each other; allowed: at least 2"),
        (5, {"dataloader_drop_last": True}, "Domain 'train' has 5 row.*at least per_device_train_batch_size=8 rows"),
        (20, {"columns": ["query", "positive"]}, "has no column 'query'; allowed: its columns"),
        (20, {"curriculum": "MIX"}, "Phase 'a': mix names the domain 'law'; allowed: \\['train'\\]"),
        (20, {"max_length": 400}, "max_length=400 is not possible; allowed: 3 to 64"),
        (20, {"no_one_domain_batches": None, "batch_sampler": "no_duplicates"}, "with one_domain_batches=False; allowed"),
        (20, {"freeze": ["nothing"]}, "pattern 'nothing' matches no parameter"),
        (20, {"resume_from_checkpoint": "x"}, "resume_from_checkpoint='x' is not possible; allowed: --resume"),
        (20, {"prompts": '{"anchr": "q: "}'}, r"prompts names 'anchr'; allowed: a column of \['anchor', 'positive'\]"),
        (20, {"prompts": '{"train": {"anchr": "q: "}}'}, r"prompts\['train'\] names 'anchr'; allowed: a column"),
        (20, {"prompts": '{"anchor": 5}'}, r"prompts\['anchor'\] holds 5; allowed: texts"),
        (20, {"columns": ["anchor"]}, r"columns=\['anchor'\] is not possible; allowed: 2 or more with loss="),
        (20, {"columns": ["anchor", "anchor"]}, "allowed: each column once"),
        (20, {"learning_rate_mapping": '{"experts": "fast"}'}, r"learning_rate_mapping\['experts'\]='fast'"),
        (20, {"loss_options": '{"scale": "x"}'}, "loss_options of multiple_negatives_ranking are"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_a_step(rows, options, message, tmp_path, tiny_parent, pairs_file):
    """With the number or the name to change."""
    data = tmp_path / "few.jsonl"
    data.write_text("".join(pairs_file.read_text(encoding="utf-8").splitlines(keepends=True)[:rows]), encoding="utf-8")
    if options.get("curriculum"):
        options = {"curriculum": tmp_path / "mix.yaml"}
        options["curriculum"].write_text("phases: [{name: a, mix: {law: 1}}]")
    with pytest.raises(ValueError, match=message):
        train(words(tmp_path / "out", tiny_parent, data, **options))
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_run_that_was_refused_does_not_stand_in_the_way_of_the_next(tmp_path, tiny_parent, pairs_file):
    """Its folder holds nothing but what it read."""
    with pytest.raises(ValueError, match="pattern 'nothing'"):
        train(words(tmp_path / "out", tiny_parent, pairs_file, freeze=["nothing"]))
    assert (tmp_path / "out/data_report.json").exists()
    train(words(tmp_path / "out", tiny_parent, pairs_file, max_steps=1))
    assert (tmp_path / "out/model").is_dir()


def test_two_runs_do_not_share_a_folder(tmp_path, tiny_parent, pairs_file):
    """They would overwrite each other's checkpoints, and one would find out at its end."""
    (tmp_path / "out").mkdir()
    line = words(tmp_path / "out", tiny_parent, pairs_file)
    with FileLock(tmp_path / "out/.lock"), pytest.raises(BlockingIOError, match="Another run is writing to output_dir="):
        train(line)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_options_that_mean_nothing_for_a_mixture_are_refused(tmp_path, tiny_parent, pairs_file):
    """Someone who wanted a memory would believe to have one."""
    upcycle(str(tiny_parent)).save_pretrained(str(tmp_path / "mixture"))
    for options, message in (({"num_experts": 4}, "num_experts=4"), ({"ngram_memory_size": 9}, "ngram_memory_size=9")):
        with pytest.raises(ValueError, match=f"{message} with model=.*, a mixture already; allowed: a dense model"):
            train(words(tmp_path / "out", tmp_path / "mixture", pairs_file, **options))


def test_a_dataset_smaller_than_a_batch_makes_one_small_batch(tmp_path, tiny_parent, pairs_file):
    """Five rows are few, but they are what the user has."""
    data = tmp_path / "few.jsonl"
    data.write_text("".join(pairs_file.read_text(encoding="utf-8").splitlines(keepends=True)[:5]), encoding="utf-8")
    train(words(tmp_path / "out", tiny_parent, data))
    assert (tmp_path / "out/model/model.safetensors").exists()


def test_frozen_weights_stay_and_the_others_move(tmp_path, tiny_parent, pairs_file):
    """`--freeze` must hold through optimizer, weight decay and saving."""
    out = tmp_path / "out"
    train(words(out, tiny_parent, pairs_file, freeze=["embeddings.*", "*.attention.*"], weight_decay=0.1, seed=5))
    before = dict(upcycle(sentence.load(str(tiny_parent), device="cpu"), seed=5)[0].model.named_parameters())
    after = dict(SentenceTransformer(str(out / "model"), device="cpu")[0].model.named_parameters())
    moved = {name for name, parameter in after.items() if not torch.equal(parameter, before[name])}
    assert not any(name.startswith("embeddings.") or ".attention." in name for name in moved)
    assert any(".router." in name for name in moved)
    assert any(".experts." in name for name in moved)


def test_gates_start_from_the_rows_that_are_trained_on(tmp_path, tiny_parent, pairs_file, capsys):
    """With a rate of 0 nothing but the start can have moved the gates; the same seed starts them the same way."""
    for name in ("one", "same"):
        train(words(tmp_path / name, tiny_parent, pairs_file, learning_rate=0, calibration_rows=40, domain_column="domain"))
    # 120 rows of one domain and 60 of each of the two others: 40, 20 and 20 of them
    assert "gates started from 160 texts" in capsys.readouterr().out
    assert largest_difference(tmp_path / "one", tmp_path / "same") == 0
    fresh = upcycle(sentence.load(str(tiny_parent), device="cpu"), seed=42)[0].model.state_dict()
    started = load_file(tmp_path / "one/model/model.safetensors")
    changed = {name for name in started if not torch.equal(started[name], fresh[name])}
    assert changed
    assert all(".router." in name for name in changed)


@pytest.mark.parametrize("balance", [{}, {"balance": True, "bias_update_rate": 2}], ids=["no balance", "balance"])
def test_adapters_train_resume_and_end_in_a_plain_model(balance, tmp_path, tiny_parent, pairs_file):
    """Checkpoints hold adapters beside the base they belong to, with the biases that moved; the model needs no PEFT."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    options = {"lora_rank": 2, "learning_rate": 1e-2, **balance}
    train(words(whole, tiny_parent, pairs_file, **options))
    assert (whole / "checkpoint-2/adapter_model.safetensors").stat().st_size < 50_000
    vectors = [
        SentenceTransformer(str(whole / name), device="cpu").encode(TEXTS) for name in ("checkpoint-4", "model", "base")
    ]
    assert abs(vectors[0] - vectors[1]).max() < 1e-5
    assert abs(vectors[1] - vectors[2]).max() > 1e-5
    assert not list((whole / "model").glob("adapter*"))

    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("model", "checkpoint-4"))
    train([*words(resumed, tiny_parent, pairs_file, **options), "--resume"])
    assert largest_difference(whole, resumed) <= 1e-6


def test_the_best_checkpoint_is_known_by_the_mean_over_domains(tmp_path, tiny_parent, pairs_file):
    """Each domain has a loss of its own; the trainer, by default, looks for one called eval_loss."""
    options = {"eval_data": pairs_file, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    train(words(tmp_path, tiny_parent, pairs_file, domain_column="domain", **options))
    state = json.loads((tmp_path / "checkpoint-4/trainer_state.json").read_text())
    means = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    parts = [[v for k, v in e.items() if k.endswith("_loss") and k != "eval_loss"] for e in state["log_history"]]
    parts = [losses[0] for losses in parts if losses]
    assert len(parts) > len(means) == 2
    assert means[0] == pytest.approx(sum(parts[: len(parts) // 2]) / (len(parts) // 2))
    assert state["best_metric"] == min(means)


def test_a_model_from_nothing_learns_masked_words_and_resumes(tmp_path, pairs_file, monkeypatch):
    """A tokenizer of the user's own texts, a preset's shape, and a folder that fine-tuning can start from."""
    monkeypatch.setattr("hagmoe_hf.training.mlm.PRESET_FOLDER", tmp_path)
    (tmp_path / "small.yaml").write_text(
        "hidden_size: 32\nnum_hidden_layers: 3\nnum_attention_heads: 4\nintermediate_size: 64\n"
    )
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    options = {
        "objective": "mlm",
        "preset": "small",
        "columns": ["anchor", "positive"],
        "vocab_size": 600,
        "max_length": 24,
        "where": "domain!=code",
        "max_steps": 12,
        "save_steps": 6,
    }
    line = [word for word in words(whole, "MODEL", pairs_file, **options)]
    del line[line.index("--model") : line.index("--model") + 2]
    train(line)
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("model", "mlm", "checkpoint-12"))
    train([word.replace(str(whole), str(resumed)) for word in line] + ["--resume"])
    assert largest_difference(whole, resumed) <= 1e-6
    losses = [entry["loss"] for entry in history(whole, 12)]
    assert sum(losses[-3:]) < sum(losses[:3])

    assert not [path for path in (whole / "mlm").iterdir() if path.suffix in PICKLES], "`hagmoe push` would refuse it"
    head = AutoModelForMaskedLM.from_pretrained(whole / "mlm")
    tokenizer = AutoTokenizer.from_pretrained(whole / "mlm")
    assert head.config.vocab_size == len(tokenizer) <= 700
    assert (head.config.n_group, head.config.num_experts) == (4, 8)
    assert json.loads((whole / "data_report.json").read_text())["kept"] == 120, "half of the rows are of the domain left out"
    model = SentenceTransformer(str(whole / "model"), device="cpu")
    assert torch.equal(model[0].model.embeddings.word_embeddings.weight, head.model.embeddings.word_embeddings.weight)
    train(words(tmp_path / "tuned", whole / "model", pairs_file))


def test_texts_may_be_called_text(tmp_path, corpus, tiny_parent):
    """As they are where no column is named."""
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in corpus[:20]), encoding="utf-8")
    options = {"objective": "mlm", "max_steps": 1, "max_length": 24}
    train(words(tmp_path / "out", tiny_parent, tmp_path / "texts.jsonl", **options))
    assert (tmp_path / "out/model").is_dir()


def test_a_phase_that_masked_words_cannot_have_is_refused(tmp_path, pairs_file, curriculum):
    line = words(tmp_path / "out", "MODEL", pairs_file, objective="mlm", preset="small", curriculum=curriculum)
    del line[line.index("--model") : line.index("--model") + 2]
    with pytest.raises(ValueError, match="Phase 'routers': max_length with objective='mlm'"):
        train(line)


def test_a_trained_tokenizer_knows_its_texts_and_survives_any_other(corpus, tmp_path):
    """Cut into single letters its texts would be slow and badly learned."""
    tokenizer = train_tokenizer(corpus, vocab_size=2000)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    ids = again("the function returns a matrix")["input_ids"]
    assert (ids[0], ids[-1]) == (again.cls_token_id, again.sep_token_id)
    assert len(ids) <= 9
    assert again.decode(ids, skip_special_tokens=True) == "the function returns a matrix"
    assert again("𓀀 😀")["input_ids"]


def test_hagmoe_train_is_the_same_call_and_ends_mistakes_in_a_line(tmp_path, tiny_parent, pairs_file, monkeypatch, capsys):
    """A traceback hides the one thing the user has to change."""
    line = words(tmp_path / "out", tiny_parent, pairs_file)
    monkeypatch.setattr(sys, "argv", ["hagmoe", "train", *line])
    hagmoe_main_exit(0)
    assert f"Written: {tmp_path / 'out/model'}" in capsys.readouterr().out
    hagmoe_main_exit(1)
    error = capsys.readouterr().err
    assert "error: output_dir=" in error
    assert "Traceback" not in error
    report_to = words(tmp_path / "reported", tiny_parent, pairs_file, report_to="trackio")
    monkeypatch.setattr(sys, "argv", ["hagmoe", "train", *report_to])
    monkeypatch.setattr("transformers.integrations.integration_utils.is_trackio_available", lambda: False)
    hagmoe_main_exit(1)
    error = capsys.readouterr().err
    assert "to be installed" in error
    assert "Traceback" not in error
    monkeypatch.setattr(sys, "argv", ["hagmoe", "train", "--help"])
    hagmoe_main_exit(0)
    shown = capsys.readouterr().out
    assert all(f"--{option}" in shown for option in ("config", "loss", "freeze", "learning_rate", "lora_rank", "resume"))


def hagmoe_main_exit(code: int) -> None:
    with pytest.raises(SystemExit) as exit_:
        hagmoe_main()
    assert (exit_.value.code or 0) == code
