"""Scripts that compute something of their own."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import analyze_experts
import fill_readme_tables
import generate
import profile_layers
import pytest
import torch
from conftest import spread, tiny_config
from transformers import AutoTokenizer, BertModel

from hagmoe_hf.modeling_hagmoe import HagMoeForMaskedLM, HagMoeModel

SCRIPTS = Path(__file__).parents[1] / "scripts"


def test_no_script_hides_a_module_of_python():
    """Python looks beside a script first: a profile.py there breaks torch.compile in every other script."""
    assert not {path.stem for path in SCRIPTS.glob("*.py")} & sys.stdlib_module_names


@pytest.mark.parametrize("options", [{}, {"num_experts_per_tok": 2}, {"mlp_layer_types": ["sparse"] * 3}])
def test_the_layers_costs_add_up_to_the_models(options):
    config = tiny_config(**options)
    rows = profile_layers.layer_costs(HagMoeModel(config), length=16)
    counts = config.parameter_counts()
    assert sum(row[1] for row in rows) == counts.total
    assert sum(row[2] for row in rows) == counts.active
    assert rows[0][3] == 0, "a lookup is no product"
    with pytest.raises(ValueError, match="BertModel is no HAG-MoE"):
        profile_layers.layer_costs(BertModel._from_config(BertModel.config_class(num_hidden_layers=1)), 16)


def test_longer_texts_need_more_memory():
    model = HagMoeModel(tiny_config()).eval()
    assert 0 < profile_layers.peak_activations(model, 8) < profile_layers.peak_activations(model, 64)


def test_blanks_are_filled_the_surest_first_and_words_stay(tiny_parent):
    """What was filled must not change again, and what was written never."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_parent)
    torch.manual_seed(0)
    model = spread(HagMoeForMaskedLM(tiny_config(vocab_size=len(tokenizer))))
    mask = tokenizer.mask_token
    text = f"the file {mask} of a {mask} is {mask} {mask}"
    rounds = [tokenizer(text)["input_ids"], *generate.fill(model, tokenizer, text, steps=4)]
    blanks = [ids.count(tokenizer.mask_token_id) for ids in rounds]
    assert blanks == [4, 3, 2, 1, 0]
    for before, after in itertools.pairwise(rounds):
        assert all(a == b for a, b in zip(before, after, strict=True) if a != tokenizer.mask_token_id)
    assert not set(rounds[-1][1:-1]) & set(tokenizer.all_special_ids)
    assert len(list(generate.fill(model, tokenizer, text, steps=1))) == 1
    with pytest.raises(ValueError, match="0 blanks and steps=2"):
        list(generate.fill(model, tokenizer, "no blank", steps=2))


def test_analyze_experts_is_the_command(tmp_path, monkeypatch):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "a"}\n{"text": "b"}\n')
    calls = []
    monkeypatch.setattr(
        analyze_experts, "analyze", lambda model, texts, **options: calls.append((model, texts.texts, options))
    )
    monkeypatch.setattr(
        sys, "argv", ["analyze_experts.py", "MODEL", str(texts), "--output", "out", "--checkpoints", "a", "b"]
    )
    analyze_experts.main()
    ((model, given, options),) = calls
    assert (model, given) == ("MODEL", ("a", "b"))
    assert options["output"] == "out"
    assert options["checkpoints"] == ["a", "b"]


@pytest.mark.slow
def test_the_gpu_bench_runs_to_its_end_on_a_cpu_and_goes_on_where_it_stopped(tiny_parent, tmp_path, monkeypatch):
    """A machine with a GPU is rare: what fails there for a reason that any machine shows costs its time."""
    bench = [sys.executable, str(SCRIPTS / "gpu_bench.py"), str(tmp_path)]
    options = ["--device", "cpu", "--rounds", "1", "--parent", str(tiny_parent)]
    subprocess.run([*bench, *options], check=True)
    result = json.loads((tmp_path / "gpu-bench.json").read_text())
    timed = {name: row for name, row in result["measured"].items() if not name.startswith(("what makes", "checks"))}
    assert len(timed) == 12
    compiled = timed["one query of 16 tokens, compiled, bfloat16"]["compiled against eager"]
    assert all(difference < 0.1 for difference in compiled.values()), compiled
    for name, row in timed.items():
        assert set(row["seconds"]) >= {"parent", "mixture", "nomic design"}, f"{name}: {row}"
    checks = json.loads((tmp_path / "gpu-checks.json").read_text())
    assert checks["exactness float32"] <= 2e-6
    experts = checks["grouped_mm against eager float32"]
    assert experts["largest difference"] <= 1e-5 < experts["largest output"]
    lost, failed = "training step, 256 pairs, bfloat16 autocast", "one query of 16 tokens, float32"
    del result["measured"][lost]
    result["measured"][failed] = {"did not run": "out of memory"}
    (tmp_path / "gpu-bench.json").write_text(json.dumps(result))
    subprocess.run([*bench, *options], check=True)
    again = json.loads((tmp_path / "gpu-bench.json").read_text())["measured"]
    assert all("seconds" in again[name] for name in (lost, failed))
    assert all(again[name] == row for name, row in result["measured"].items() if name != failed), "measured twice"
    monkeypatch.setattr(fill_readme_tables, "RESULTS", tmp_path)
    assert "| one query of 16 tokens, compiled, bfloat16 | mixture, compiled |" in fill_readme_tables.gpu_speed()
    assert "| sdpa | float32 | 0.0e+00 |" in fill_readme_tables.gpu()


@pytest.mark.slow
def test_the_gpu_bench_begins_nothing_after_its_minutes(tiny_parent, tmp_path):
    """A machine that is lent for minutes takes away what is not done by then."""
    command = [sys.executable, str(SCRIPTS / "gpu_bench.py"), str(tmp_path), "--device", "cpu", "--minutes", "0"]
    run = subprocess.run([*command, "--parent", str(tiny_parent)], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert "0 minutes are over: the next call goes on with 'what makes the host wait, float32'" in run.stdout
    assert not (tmp_path / "gpu-bench.json").exists()
