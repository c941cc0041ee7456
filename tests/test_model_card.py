"""Cards say what was measured, and nothing else."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import tiny_config
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from hagmoe_hf.cli.main import main
from hagmoe_hf.model_card import TEMPLATE, measured_card, published_card, upcycled_card

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/results"
CARDS = sorted((ROOT / "model_cards").glob("*/README.md"))


def evaluation(tasks: dict[str, dict], macro: dict | None = None) -> dict:
    """A report of a model and its parent, with the given differences."""
    scores = {"type": "STS", "domain": "words", "metric": "cosine_spearman", "score": 0.5, "revision": "0" * 40}
    model = {
        "label": "model",
        "macro": 0.5,
        "worst_domain": "words",
        "tasks": {name: scores for name in tasks},
        "domains": {"words": 0.5},
        "languages": {"en": 0.5},
    }
    difference = {"macro": macro or {"value": 0.0, "low": None, "high": None}, "domains": {}, "tasks": tasks}
    versions = {"torch": "2.13.0"}
    models = [{**model, "difference": None}, {**model, "label": "parent", "difference": difference}]
    return {"command": "hagmoe evaluate", "date": "2026-11-22", "versions": versions, "models": models}


def named_under(card: str, heading: str) -> list[str]:
    """The sets in the list below a line."""
    return re.findall(r"^- (\S+) \(", card.split(f"{heading}\n\n", 1)[1].split("\n\n", 1)[0], re.MULTILINE)


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.parent.name)
def test_a_committed_card_is_what_its_last_line_makes(path, tmp_path, monkeypatch):
    """Its readers decide by its numbers; one typed by hand, or older than its file, would mislead them."""
    text = path.read_text(encoding="utf-8")
    command = re.search(r"This page was made by `(.+)`\.\n\Z", text)[1]
    out = tmp_path / "README.md"
    written = str(path.relative_to(ROOT))
    arguments = [str(out) if word == written else word for word in shlex.split(command)]
    assert str(out) in arguments
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [*arguments, *(() if "--name" in arguments else ("--name", path.parent.name))])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    made = out.read_text(encoding="utf-8").replace(f" --name {path.parent.name}`.", "`.").replace(str(out), written)
    assert made == text, "run: make cards"


def test_there_is_a_card_for_the_first_run():
    assert CARDS


def test_the_hub_finds_every_score(tmp_path):
    """The Hub shows what `model-index` says, not what the tables say: they must not differ."""
    report = json.loads((RESULTS / "first-run-kit.json").read_text(encoding="utf-8"))
    card = ModelCard(CARDS[0].read_text(encoding="utf-8"))
    assert card.data.library_name == "sentence-transformers"
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert card.data.model_name == CARDS[0].parent.name
    found = {result.dataset_config: (result.metric_type, result.metric_value) for result in card.data.eval_results}
    tasks = report["models"][0]["tasks"]
    assert found == {name: (task["metric"], task["score"]) for name, task in tasks.items()}
    assert all(f"{task['score']:.4f}" in card.text for task in tasks.values())


def test_the_first_runs_card_says_where_it_is_worse_than_its_parent():
    """Nobody should find out by deploying it."""
    gaps = json.loads((RESULTS / "first-run-kit.json").read_text(encoding="utf-8"))["models"][1]["difference"]["tasks"]
    card = CARDS[0].read_text(encoding="utf-8")
    worse = named_under(card, "Worse, and the interval leaves out 0:")
    assert worse
    assert set(worse) == {name for name, gap in gaps.items() if gap["high"] < 0}


def test_the_templates_own_words_hold_no_figure():
    """A number in it would be one typed by hand, and the same for all models."""
    words = re.sub(r"\{\{.*?\}\}|\{%.*?%\}", "", TEMPLATE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert set(re.findall(r"\d+", words)) <= {"95", "0", "1"}, "95 % intervals, 'leaves out 0', 'above 1'"


numbers = st.floats(-1, 1)
gaps = st.tuples(numbers, numbers, numbers).map(lambda v: dict(zip(("low", "value", "high"), sorted(v), strict=True)))
unknown = numbers.map(lambda value: {"value": value, "low": None, "high": None})


@settings(max_examples=15, deadline=None)
@given(st.lists(gaps | unknown, min_size=1, max_size=6))
def test_every_loss_is_told_and_no_gain_is_called_one(differences):
    """Who deploys it must read of every set that it loses on, and of no gain that may be chance."""
    tasks = {f"sts/{i}": gap for i, gap in enumerate(differences)}
    card = measured_card(tiny_config(), name="x", command="hagmoe card", evaluation=evaluation(tasks))
    worse, lower, better = (
        named_under(card, heading)
        for heading in (
            "Worse, and the interval leaves out 0:",
            "Lower, and it may be chance:",
            "Better than parent, and the interval leaves out 0:",
        )
    )
    assert set(worse + lower) >= {name for name, gap in tasks.items() if gap["value"] < 0}
    assert set(worse) == {name for name, gap in tasks.items() if gap["high"] is not None and gap["high"] < 0}
    assert set(better) == {name for name, gap in tasks.items() if gap["low"] is not None and gap["low"] > 0}
    assert [tasks[name]["value"] for name in worse] == sorted(tasks[name]["value"] for name in worse)


@pytest.mark.parametrize(
    ("macro", "words"),
    [
        ({"value": -0.1, "low": -0.2, "high": -0.05}, "-0.1000 [-0.2000, -0.0500]: it is worse."),
        ({"value": 0.1, "low": 0.05, "high": 0.2}, "it is better."),
        ({"value": 0.1, "low": -0.05, "high": 0.2}, "the two cannot be told apart."),
    ],
)
def test_the_mean_gets_the_verdict_of_its_interval(macro, words):
    card = measured_card(tiny_config(), name="x", command="y", evaluation=evaluation({"sts/a": macro}, macro))
    assert words in card


def test_what_was_not_measured_is_said():
    """Silence reads like a pass."""
    card = measured_card(tiny_config(), name="x", command="hagmoe card x")
    assert "Nobody has measured it" in card
    assert card.count("Not measured.\n") == 2
    assert card.count("Not stated.\n") == 3
    assert ModelCard(card).data.eval_results is None
    counts = tiny_config().parameter_counts()
    assert f"{counts.total:,}; {counts.active:,} of them active" in card


def test_a_rerankers_card_says_how_to_rerank():
    """Whoever copies the snippet must not get vectors of a model that was made to give scores."""
    card = published_card(upcycled_card("the report", "", "CrossEncoder", "text-ranking"), "me/reranker", "CrossEncoder")
    assert ModelCard(card).data.pipeline_tag == "text-ranking"
    assert 'CrossEncoder("me/reranker", trust_remote_code=True)\nscores = model.predict(' in card
    assert "its scores are its parent's" in card
    assert "SentenceTransformer" not in card


def test_publishing_twice_changes_nothing_the_second_time():
    """Whoever trains a published mixture on publishes its card again."""
    once = published_card(upcycled_card("the report", ""), "me/mixture", "SentenceTransformer")
    assert published_card(once, "me/mixture", "SentenceTransformer") == once
    more = once.replace(
        "## Load without hagmoe_hf", "## Load without hagmoe_hf\n\nOld.\n\n## Mine\n\nKept.\n\n## Load without hagmoe_hf", 1
    )
    again = published_card(more, "me/mixture", "SentenceTransformer")
    assert again.count("## Load without hagmoe_hf") == 1
    assert "Kept." in again
    assert "Old." not in again


def test_a_measured_card_can_be_published():
    """`hagmoe push` completes it as any other."""
    card = published_card(measured_card(tiny_config(), name="x", command="y"), "me/mixture", "SentenceTransformer")
    assert 'SentenceTransformer("me/mixture")' in card
    assert 'SentenceTransformer("me/mixture", trust_remote_code=True)' in card
    assert "path/or/hub-id" not in card


@pytest.mark.parametrize(
    ("option", "content", "missing", "wanted"),
    [
        ("evaluation", {"command": "hagmoe analyze"}, "date", "report.json that `hagmoe evaluate`"),
        ("evaluation", {**evaluation({}), "models": []}, "models/label", "report.json that `hagmoe evaluate`"),
        ("evaluation", {**evaluation({}), "models": [{"label": "a"}]}, "models/macro", "report.json that `hagmoe evaluate`"),
        ("benchmark", {"sweeps": {}}, "command", "benchmark.json that `hagmoe benchmark`"),
        ("data", {}, "read", "data_report.json that `hagmoe train`"),
    ],
)
def test_another_commands_file_is_refused(option, content, missing, wanted):
    """`hagmoe analyze` and `hagmoe evaluate` both write a report.json; a KeyError would not say which one is wanted."""
    with pytest.raises(ValueError, match=f"{option} without '{missing}' is not possible; allowed: the {wanted} writes"):
        measured_card(tiny_config(), name="x", command="y", **{option: content})


def test_a_dense_model_gets_no_mixtures_card(tmp_path, monkeypatch, capsys):
    """It would say of somebody's BERT that it has experts."""
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "bert"}')
    monkeypatch.setattr(sys, "argv", ["hagmoe", "card", str(tmp_path), str(tmp_path / "README.md")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert "model_type='bert' is not possible; allowed: 'hagmoe'" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[1]", "holds a list; allowed: a JSON or YAML mapping"),
        ("a.json", "{", "cannot be read"),
        ("a.json", b"\xff", "cannot be read"),
        ("a.yaml", "a: [", "cannot be read"),
        ("a.yaml", None, "No such file"),
    ],
)
def test_a_file_that_says_nothing_is_refused(name, content, message, tmp_path, monkeypatch, capsys):
    """An empty section would look as if nothing had been measured."""
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    config = str(RESULTS / "first-run-config.json")
    monkeypatch.setattr(sys, "argv", ["hagmoe", "card", config, str(tmp_path / "README.md"), "--training", str(path)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "README.md").exists()
