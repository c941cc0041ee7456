import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import TINY, spread
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM, BertModel

from hagmoe_hf import demo
from hagmoe_hf.cli.main import main
from hagmoe_hf.demo import parent_folder
from hagmoe_hf.files import new_folder


def hagmoe(*arguments: str, monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", ["hagmoe", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0


def test_upcycle_writes_a_model_and_its_report(tmp_path, monkeypatch, capsys, real_parent):
    out = tmp_path / "mixture"
    assert hagmoe("upcycle", parent_folder(), out, "--sparse-layers", "2,4", "--n-group", "2", monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "sparse layers: 2, 4" in printed
    assert json.loads((out / "upcycling_report.json").read_text())["sparse_layers"] == [2, 4]
    texts = ["one", "a second text"]
    mixture = SentenceTransformer(str(out), device="cpu")
    assert mixture[0].model.config.n_group == 2
    assert np.abs(mixture.encode(texts) - real_parent.encode(texts)).max() <= 2e-6
    assert [path.name for path in tmp_path.iterdir()] == ["mixture"], "no temporary folder may stay behind"


def test_gates_start_from_a_file_of_texts(tmp_path, monkeypatch, capsys):
    """From the shell, and for a bare encoder, whose tokenizer lies in the same folder."""
    parent, texts = tmp_path / "parent", tmp_path / "texts.txt"
    spread(BertModel(BertConfig(**{**TINY, "vocab_size": 30522}))).save_pretrained(parent)
    AutoTokenizer.from_pretrained(parent_folder()).save_pretrained(parent)
    texts.write_text("\n".join(demo.read_corpus()[0][:30]), encoding="utf-8")
    out = tmp_path / "out"
    assert hagmoe("upcycle", parent, out, "--calibration-texts", texts, monkeypatch=monkeypatch) == 0
    assert "gates started from 30 texts" in capsys.readouterr().out
    assert json.loads((out / "upcycling_report.json").read_text())["calibration"]["texts"] == 30
    texts.write_text("\n".join(f"{text[:20]}\t{text}" for text in demo.read_corpus()[0][:30]), encoding="utf-8")
    assert hagmoe("upcycle", parent, tmp_path / "paired", "--calibration-texts", texts, monkeypatch=monkeypatch) == 0
    assert "gates started from 60 texts" in capsys.readouterr().out
    words = ("--ngram-texts", texts, "--ngram-memory-size", 50)
    assert hagmoe("upcycle", parent, tmp_path / "memory", *words, monkeypatch=monkeypatch) == 0
    assert "n-gram memory: 50 n-grams" in capsys.readouterr().out
    rows = json.loads((tmp_path / "memory/config.json").read_text())["ngram_memory_size"]
    assert 50 <= rows < 100, "those, and some beginnings"
    words = ("--translations", texts, "--ngram-memory-size", 50)
    assert hagmoe("upcycle", parent, tmp_path / "fitted", *words, monkeypatch=monkeypatch) == 0
    assert "n-grams to 30 translations" in capsys.readouterr().out
    assert AutoModel.from_pretrained(tmp_path / "fitted").ngram_memory.rows.any()
    stay = tmp_path / "stay.txt"
    stay.write_text("\n".join(demo.read_corpus()[0][30:60]), encoding="utf-8")
    words = ("--calibration-texts", texts, "--preserved-texts", stay)
    assert hagmoe("upcycle", parent, tmp_path / "stays", *words, monkeypatch=monkeypatch) == 0
    assert "of the preserved texts open the first group" in capsys.readouterr().out
    assert json.loads((tmp_path / "stays/config.json").read_text())["preserve_first_group"] is True


def test_a_plain_transformers_folder_keeps_its_tokenizer(tmp_path, monkeypatch):
    """A model without its tokenizer cannot be used."""
    parent, out = tmp_path / "parent", tmp_path / "mixture"
    spread(BertForMaskedLM(BertConfig(**{**TINY, "vocab_size": 30522}))).save_pretrained(parent)
    AutoTokenizer.from_pretrained(parent_folder()).save_pretrained(parent)
    assert hagmoe("upcycle", parent, out, monkeypatch=monkeypatch) == 0
    assert AutoTokenizer.from_pretrained(out)("a text")["input_ids"]
    assert type(AutoModelForMaskedLM.from_pretrained(out)).__name__ == "HagMoeForMaskedLM"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["upcycle", "/no/such/folder", "OUT"], "parent='/no/such/folder' is no folder"),
        (["upcycle", "PARENT", "OUT", "--n-group", "3"], "n_group=3 is not possible"),
        (["upcycle", "PARENT", "OUT", "--sparse-layers", "9"], "names layer 9; allowed: 0 to 5"),
        (["upcycle", "PARENT", "FULL"], "exists; allowed: a new name, or an empty folder"),
        (["upcycle", "/no/[/x]", "OUT"], "parent='/no/[/x]' is no folder"),
        (["upcycle", "/no/[train]/:smile:", "OUT"], "parent='/no/[train]/:smile:' is no folder"),
    ],
)
def test_a_mistake_ends_in_one_line_and_leaves_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    """A traceback hides the one thing the user has to change."""
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep me")
    names = {"PARENT": parent_folder(), "OUT": tmp_path / "out", "FULL": full}
    assert hagmoe(*(names.get(word, word) for word in arguments), monkeypatch=monkeypatch) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "error: " in error
    assert message in error
    assert "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
    assert (full / "mine.txt").read_text() == "keep me"


def test_no_layer_need_be_a_mixture(tmp_path, tiny_parent, monkeypatch):
    assert hagmoe("upcycle", tiny_parent, tmp_path / "out", "--sparse-layers", "none", monkeypatch=monkeypatch) == 0
    assert set(json.loads((tmp_path / "out/config.json").read_text())["mlp_layer_types"]) == {"dense"}


def test_what_is_no_layer_list_is_refused(tmp_path, monkeypatch, capsys):
    code = hagmoe("upcycle", parent_folder(), tmp_path / "out", "--sparse-layers", "one", monkeypatch=monkeypatch)
    assert code != 0
    assert "allowed: layer numbers like 1,3,5, or none" in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize("arguments", [["upcycle", "PARENT", "OUT"], ["analyze", "PARENT", "a.jsonl", "--out", "OUT"]])
@pytest.mark.parametrize("seed", ["-1", "4294967296", "99999999999999999999"])
def test_a_seed_that_some_library_cannot_take_is_refused_first(arguments, seed, tmp_path, monkeypatch, capsys):
    """The map of `analyze` is drawn last; its generator would refuse the seed after an hour's work."""
    names = {"PARENT": parent_folder(), "OUT": tmp_path / "out"}
    assert hagmoe(*(names.get(word, word) for word in arguments), "--seed", seed, monkeypatch=monkeypatch) == 2
    assert "'--seed'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--tasks", "--out", "OUT"], ["--out", "OUT", "--against"]])
def test_an_empty_list_is_not_taken_for_everything(arguments, tmp_path, monkeypatch, capsys):
    """`--tasks $TASKS` with a variable that is not set would run the whole kit."""
    out = tmp_path / "out"
    words = [out if word == "OUT" else word for word in arguments]
    assert hagmoe("evaluate", parent_folder(), *words, monkeypatch=monkeypatch) == 2
    assert "no value is not possible; allowed: one or more." in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"txt": "a"}\n', "a.jsonl has no column 'text'; allowed: its columns ['txt']"),
        ("a.jsonl", "not json\n", "a.jsonl has no column 'text'"),
        ("a.txt", "a text\n", "a.txt has an unknown ending; allowed: "),
        ("a.jsonl", None, "a.jsonl is not there; allowed: an existing file"),
        ("a.jsonl", 'not json\n{"text": "a"}\n{"text": null}\n', "1 texts given; allowed: 256 or more"),
    ],
)
def test_texts_that_cannot_be_timed_name_their_file(name, content, message, tmp_path, monkeypatch, capsys):
    """A `KeyError: 'text'` does not say which of the files on the command line is meant."""
    path, out = tmp_path / name, tmp_path / "out"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    assert hagmoe("benchmark", parent_folder(), "--texts", path, "--out", out, monkeypatch=monkeypatch) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert not out.exists()
    if message.startswith("1 texts"):
        assert f"{path}: skipped 1: not a JSON object\n{path}: skipped 1: no text\n" in printed.out


def test_a_metric_that_nobody_measures_ends_in_one_line(tmp_path, tiny_parent, pairs_file, monkeypatch, capsys):
    """The trainer names the metrics that there are, in a KeyError; a traceback would bury them."""
    options = {
        "--model": tiny_parent,
        "--train_data": pairs_file,
        "--eval_data": pairs_file,
        "--output_dir": tmp_path / "out",
        "--max_steps": 1,
        "--eval_strategy": "steps",
        "--eval_steps": 1,
        "--save_steps": 1,
        "--load_best_model_at_end": "true",
        "--metric_for_best_model": "nope",
        "--use_cpu": "true",
    }
    assert hagmoe("train", *(word for pair in options.items() for word in pair), monkeypatch=monkeypatch) == 1
    error = capsys.readouterr().err
    assert "error: The `metric_for_best_model` training argument is set to 'eval_nope'" in error
    assert "'eval_loss'" in error
    assert "Traceback" not in error


def test_a_full_disk_ends_in_one_line_and_leaves_nothing(tmp_path, tiny_parent, monkeypatch, capsys):
    """safetensors has an error of its own for it, which is no OSError."""

    def full(*arguments, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    assert hagmoe("upcycle", tiny_parent, tmp_path / "out", monkeypatch=monkeypatch) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    """One line with a missing key would tell neither the user nor us what broke."""

    def broken(arguments):
        raise KeyError("experts")

    monkeypatch.setattr("hagmoe_hf.training.run.main", broken)
    monkeypatch.setattr(sys, "argv", ["hagmoe", "train"])
    with pytest.raises(KeyError, match="experts"):
        main()


def test_two_processes_cannot_both_write_the_same_folder(tmp_path):
    """The second must lose with a message, not mix its files into the first's."""
    out = tmp_path / "out"
    slow = new_folder(out)
    (slow.__enter__() / "a").write_text("slow")
    with new_folder(out) as fast:
        (fast / "b").write_text("fast")
    with pytest.raises(FileExistsError, match="exists; allowed: a new name"):
        slow.__exit__(None, None, None)
    assert [path.name for path in out.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_upcycling_leaves_no_half_model(tmp_path):
    """kill -9 cannot be caught: the name the user gave must not exist, or hold everything."""
    out = tmp_path / "out"
    program = (
        "import sys, time\n"
        "from hagmoe_hf.files import new_folder\n"
        "with new_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'model.safetensors').write_text('half')\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(out)], stdout=subprocess.PIPE, env=os.environ)
    assert process.stdout.readline().strip() == b"writing"
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.1)
    assert not out.exists()
    with new_folder(out) as folder:
        (folder / "whole").write_text("whole")
    assert [path.name for path in out.iterdir()] == ["whole"]


def test_the_demo_tells_the_whole_story(tmp_path, monkeypatch):
    """It is the first thing a newcomer runs."""
    texts, domains = demo.read_corpus()
    monkeypatch.setattr(demo, "read_corpus", lambda: (texts[::12], domains[::12]))
    lines: list[str] = []
    difference = demo.run(tmp_path / "demo", lines.append)
    story = "\n".join(lines)
    assert difference <= demo.LARGEST_DIFFERENCE
    assert "as promised" in story
    for query in (*demo.QUERIES, *demo.FOREIGN_QUERIES):
        assert query in story
    assert "AutoModel:           largest difference 0.0e+00" in story
    assert (tmp_path / "demo/domains.png").stat().st_size > 10_000
    assert (tmp_path / "demo/model/model.safetensors").exists()
    with pytest.raises(FileExistsError):
        demo.run(tmp_path / "demo", lines.append)


def test_the_version_is_shown(monkeypatch, capsys):
    assert hagmoe("--version", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.startswith("hagmoe_hf 0.")
