"""One command gives tables that say what was measured, and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from evaluation_helpers import small_kit, tiny_model

from hagmoe_hf.cli.main import app
from hagmoe_hf.evaluation.command import evaluate
from hagmoe_hf.evaluation.report import markdown, to_dict

RESULTS = Path(__file__).parents[1] / "docs/results"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    small_kit(root / "kit")
    about = {"domain": "science", "languages": ["en", "fr"], "licence": "CC0"}
    (root / "kit/manifest.json").write_text(json.dumps({"retrieval/papers": about}), encoding="utf-8")
    models = [tiny_model(root / name, seed) for name, seed in (("one", 0), ("other", 1))]
    return root, [str(model) for model in models]


def test_the_command_gives_tables_json_and_a_plot(folders):
    """Whoever decides reads the table, whoever checks reads the JSON: they must not disagree."""
    pytest.importorskip("bm25s")
    root, (one, other) = folders
    command = [sys.executable, "-m", "hagmoe_hf.cli.main", "evaluate", one, "--against", other, "bm25"]
    command = [sys.executable, "-c", "from hagmoe_hf.cli.main import main; main()", *command[3:]]
    command += ["--tasks", "retrieval", "sts/words", "reranking", "--kit", str(root / "kit"), "-o", str(root / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert "Evaluating" in done.stderr  # the progress bar
    report = json.loads((root / "out/report.json").read_text(encoding="utf-8"))
    table = (root / "out/report.md").read_text(encoding="utf-8")
    assert table.strip() in done.stdout
    assert table == markdown(report)
    assert (root / "out/report.png").read_bytes().startswith(b"\x89PNG")
    first, second, bm25 = report["models"]
    assert set(first["tasks"]) == {"retrieval/papers", "sts/words", "reranking/leads"}
    assert set(bm25["tasks"]) == {"retrieval/papers", "reranking/leads"}
    assert first["label"] != second["label"]  # both folders are called "model"
    assert set(first["domains"]) == {"science", "unstated"}
    assert set(second["difference"]["tasks"]) == set(first["tasks"])
    for task, gap in second["difference"]["tasks"].items():
        assert gap["value"] == pytest.approx(first["tasks"][task]["score"] - second["tasks"][task]["score"])
        assert gap["low"] <= gap["high"]
    assert first["embedding_statistics"]["nan_count"] == 0
    assert bm25["embedding_statistics"] is None
    assert report["command"].startswith("hagmoe evaluate")
    assert {"mteb", "torch", "hagmoe_hf"} <= set(report["versions"])


def test_a_report_can_be_made_again_from_what_is_stored(folders):
    """Figures that cannot be reproduced cannot be trusted."""
    root, (one, _) = folders
    reports = [
        to_dict(evaluate(one, kit=root / "kit", tasks=["sts"], output=root / name)) for name in ("first", "second", "first")
    ]
    for report in reports:
        del report["date"]
        for model in report["models"]:
            for task in model["tasks"].values():
                del task["seconds"]
    assert reports[0] == reports[1] == reports[2]


def test_what_cannot_be_evaluated_is_refused_by_name(folders):
    """A typing error must not cost an hour of evaluation first."""
    root, (one, _) = folders
    with pytest.raises(ValueError, match="task 'sts/word' is not possible; allowed: one of"):
        evaluate(one, kit=root / "kit", tasks=["sts/word"], output=root / "none")
    with pytest.raises(ValueError, match="is the same as"):
        evaluate(one, [one], kit=root / "kit", output=root / "none")
    with pytest.raises(ValueError, match="bm25 can run none of the tasks"):
        evaluate(one, ["bm25"], kit=root / "kit", tasks=["sts"], output=root / "none")


def test_the_committed_baseline_is_what_its_json_says():
    """The docs print this table: a figure typed by hand would be found here."""
    report = json.loads((RESULTS / "kit-baseline.json").read_text(encoding="utf-8"))
    assert (RESULTS / "kit-baseline.md").read_text(encoding="utf-8") == markdown(report)
    assert (RESULTS / "kit-baseline.png").read_bytes().startswith(b"\x89PNG")
    mixture, parent, bm25 = report["models"]
    assert (mixture["label"], parent["label"], bm25["label"]) == ("all-MiniLM-L6-v2-hagmoe", "all-MiniLM-L6-v2", "bm25")
    assert mixture["tasks"].keys() == parent["tasks"].keys()
    for task, entry in mixture["tasks"].items():
        assert entry["score"] == pytest.approx(parent["tasks"][task]["score"], abs=1e-4), task


def test_the_verb_is_registered():
    """`hagmoe evaluate` is what all docs say."""
    assert "evaluate" in [command.name or command.callback.__name__ for command in app.registered_commands]
