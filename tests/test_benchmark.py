import json

import pytest
import torch

from hagmoe_hf import sentence
from hagmoe_hf.benchmark import measure, report, sweeps, workloads
from hagmoe_hf.benchmark.command import benchmark
from hagmoe_hf.benchmark.contestants import Contestant, line_up
from hagmoe_hf.benchmark.profiling import profile_encoder
from hagmoe_hf.demo import read_corpus

TEXTS = read_corpus()[0][:256]


@pytest.fixture(scope="module")
def contestants(tiny_parent, tmp_path_factory):
    return line_up(tiny_parent, tmp_path_factory.mktemp("models"))


def test_calls_alternate_and_the_warm_up_is_not_timed():
    """Blocks of one contestant would let a busy minute decide the comparison."""
    calls = []
    seconds = measure.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * 3
    assert [len(values) for values in seconds.values()] == [2, 2]


def test_ratios_are_paired_by_round():
    """A round in which everything was slow must not look like a slow contestant."""
    ratios = measure.speed_ratios({"parent": [1.0, 10.0, 2.0], "fast": [0.5, 5.0, 1.0]}, "parent")
    assert ratios["fast"] == {"lower quartile": 2.0, "median": 2.0, "upper quartile": 2.0}


def test_a_query_has_exactly_the_tokens_that_its_row_says(tiny_parent):
    """A row of 16 tokens measured with 20 would flatter nobody, and mislead."""
    tokenizer = sentence.load(str(tiny_parent)).tokenizer
    assert len(tokenizer(workloads.query_of(tokenizer, TEXTS, 8))["input_ids"]) == 8
    with pytest.raises(ValueError, match="No text begins with 5000 tokens; allowed"):
        workloads.query_of(tokenizer, TEXTS, 5000)


def test_all_mixtures_of_the_line_up_are_the_same_model(contestants):
    """What differs between them may be the time and nothing else."""
    vectors = []
    for contestant in contestants:
        with contestant.running():
            vectors.append(torch.from_numpy(contestant.load().encode(TEXTS[:8])))
    for same in (1, 2, 3):
        assert torch.allclose(vectors[same], vectors[0], atol=1e-5)
    for same in (5, 6):
        assert torch.allclose(vectors[same], vectors[4], atol=1e-5)
    assert not torch.allclose(vectors[4], vectors[0], atol=1e-2)


def test_stock_contestants_compute_padding(contestants):
    """Otherwise the rival would run on our kernels, and the comparison would say nothing."""
    stock = next(c for c in contestants if c.as_stock)
    model, seen = stock.load(), []
    sentence.encoder_of(model).layers[0].mlp.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape[:2].numel())
    )
    pair = [TEXTS[0][:5], TEXTS[0][:30]]
    short, long = (len(model.tokenizer(text)["input_ids"]) for text in pair)
    model.encode(pair)
    with stock.running():
        model.encode(pair)
    assert short < long
    assert seen == [short + long, 2 * long]


def test_a_run_writes_every_workload_and_resumes(tiny_parent, tmp_path, monkeypatch):
    """An interrupted benchmark must not start again, nor mix with one that was run otherwise."""
    nothing = {"loading": {"speed against the parent": {}, "seconds": {}, "rounds": 1}, "memory": None}
    monkeypatch.setattr(workloads, "load_and_memory", lambda *_: nothing)
    monkeypatch.setattr(workloads, "QUERY_TOKENS", (8,))
    monkeypatch.setattr("hagmoe_hf.benchmark.command.NUM_TEXTS", 64)
    ready = {"models": line_up(tiny_parent, tmp_path / "models")}
    threads = torch.get_num_threads() + 1
    first = benchmark(tiny_parent, tmp_path, texts=TEXTS, rounds=1, threads=threads, command="a")
    assert first["threads"] == threads
    assert torch.get_num_threads() == threads - 1, "the caller's own"
    assert set(first["workloads"]) == {
        "encode, batch 32",
        "encode, batch 128",
        "one query, 8 tokens",
        "training step",
        "loading and memory",
    }
    assert (tmp_path / "benchmark.png").is_file()
    assert "| mixture |" in (tmp_path / "benchmark.md").read_text("utf-8")
    path = tmp_path / "benchmark.json"
    report_ = json.loads(path.read_text("utf-8"))
    report_["workloads"].pop("training step")
    report_["workloads"]["encode, batch 32"]["what"] = "kept"
    path.write_text(json.dumps(report_), encoding="utf-8")
    again = benchmark(tiny_parent, tmp_path, texts=TEXTS, rounds=1, threads=threads, command="a")
    assert again["workloads"]["encode, batch 32"]["what"] == "kept"
    assert "training step" in again["workloads"]
    other = benchmark(tiny_parent, tmp_path, texts=TEXTS, rounds=1, threads=threads, command="b")
    assert other["workloads"]["encode, batch 32"]["what"] != "kept"
    assert [c.name for c in ready["models"]] == other["contestants"]


def test_what_cannot_be_measured_is_refused(tiny_parent, tmp_path):
    """A handful of texts has no mixed lengths, and no round no time."""
    with pytest.raises(ValueError, match="3 texts given; allowed: 256 or more"):
        benchmark(tiny_parent, tmp_path, texts=TEXTS[:3])
    with pytest.raises(ValueError, match=r"mixture=.* is a 'bert'; allowed: a HAG-MoE"):
        line_up(tiny_parent, tmp_path, tiny_parent)
    with pytest.raises(ValueError, match="rounds=0; allowed: 1 or more"):
        benchmark(tiny_parent, tmp_path, texts=TEXTS, rounds=0)


@pytest.mark.slow
def test_load_time_and_memory_come_from_a_process_of_their_own(contestants):
    """In one process, the first contestant's memory would hide the next one's."""
    result = workloads.load_and_memory(contestants[:2], TEXTS[:32], 8, 1)
    assert all(value["median"] > 0 for value in result["loading"]["seconds"].values())
    assert result["memory"]["times the parent's"]["parent"] == 1
    with pytest.raises(RuntimeError, match="'gone' failed"):
        workloads.load_and_memory([Contestant("gone", "no/such/folder")], TEXTS[:32], 8, 1)


def test_a_profile_names_layers_and_operations(contestants, tmp_path):
    """Whoever asks where the time goes needs both."""
    result = profile_encoder(contestants[1].load(), TEXTS[:8], tmp_path, repeats=2)
    assert "layers.1.mlp" in result["modules"]
    assert any(name.startswith("aten::") for name in result["operations"])
    assert (tmp_path / "trace.json").is_file()


def test_a_report_shows_every_contestant_it_has_a_figure_for(tmp_path):
    """A contestant that was not run must be an empty cell, not another's figure."""
    spread = {"lower quartile": 1.0, "median": 1.25, "upper quartile": 1.5}
    one = {"speed against the parent": {"parent": spread}, "seconds": {"parent": spread}, "rounds": 3}
    text = report.markdown(
        {
            "contestants": ["parent", "absent"],
            "workloads": {"encode": one, "loading and memory": {"loading": one | {"rounds": 1}}},
            "command": "c",
            "date": "d",
            "processor": "p",
            "threads": 2,
            "versions": {"torch": "1"},
        }
    )
    assert "| parent | 1.25 [1.00, 1.50] | 1.25 |" in text, "what was timed once has no spread"
    assert "| absent |  |  |" in text


@pytest.mark.slow
def test_a_sweep_covers_every_size_and_resumes(tiny_parent, tmp_path, monkeypatch):
    """What the documentation says of larger mixtures comes from here, and an interrupted sweep goes on."""
    chosen = {"EXPERTS": (4, 8), "GROUPS": (1, 2), "BLOCK_GROUPS": (2,), "LENGTHS": (8, 16), "BATCHES": (16,)}
    for name, sizes in chosen.items():
        monkeypatch.setattr(sweeps, name, sizes)
    done = sweeps.sweep(tiny_parent, tmp_path, texts=TEXTS, rounds=1, command="sweep")
    assert {name: list(sizes) for name, sizes in done["sweeps"].items()} == {
        "experts": ["4", "8"],
        "groups": ["1", "2"],
        "groups, one query": ["1", "2"],
        "groups of whole blocks, one query": ["2"],
        "tokens per text": ["8", "16"],
        "texts per batch": ["16"],
    }
    assert all(size["speed"]["median"] > 0 for sizes in done["sweeps"].values() for size in sizes.values())
    assert (tmp_path / "sweep.png").is_file()
    assert "| groups | 2 |" in (tmp_path / "sweep.md").read_text()
    monkeypatch.setattr(sweeps, "interleave", None)
    assert sweeps.sweep(tiny_parent, tmp_path, texts=TEXTS, rounds=1, command="sweep") == json.loads(
        (tmp_path / "sweep.json").read_text()
    )


def test_the_models_of_a_length_sweep_truncate_alike(tiny_parent, monkeypatch):
    """A parent with longer texts than its mixture's would make the mixture look fast."""
    monkeypatch.setattr(sweeps, "LENGTHS", (8,))
    dense, seen = sentence.load(str(tiny_parent), device="cpu"), set()
    before = dense.max_seq_length

    def watch(models, texts, batch_size, rounds):
        for model in models.values():
            seen.add(model.preprocess(list(texts))["input_ids"].shape)
        return {name: [1.0, 1.0] for name in models}

    monkeypatch.setattr(sweeps, "_seconds", watch)
    sweeps._lengths(dense, TEXTS, 2)
    assert seen == {(64, 8)}
    assert dense.max_seq_length == before
