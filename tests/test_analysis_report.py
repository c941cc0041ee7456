import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from sentence_transformers import SentenceTransformer

from hagmoe_hf import upcycle
from hagmoe_hf.analysis import pictures
from hagmoe_hf.analysis import report as report_room
from hagmoe_hf.analysis.report import analyze
from hagmoe_hf.analysis.texts import Texts
from hagmoe_hf.cli.main import main

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture(scope="module")
def mixture_folder(tiny_parent, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture") / "tiny-mixture"
    upcycle(SentenceTransformer(str(tiny_parent), device="cpu"), sparse_layers=[0, 1]).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def texts(corpus):
    labels = tuple(("law", "<b>code</b>", "cooking")[row % 3] for row in range(48))
    languages = tuple(("en", "de")[row % 2] for row in range(48))
    return Texts(tuple(corpus[:48]), labels, languages, np.arange(48).reshape(-1, 2))


@pytest.fixture(scope="module")
def finished(mixture_folder, texts, tiny_parent, tmp_path_factory):
    """The folder of a whole report, and its numbers."""
    folder = tmp_path_factory.mktemp("report") / "out"
    early = str(mixture_folder)
    return folder, analyze(
        early,
        texts,
        folder,
        parent=str(tiny_parent),
        checkpoints=[early],
        importance_task="sts/wordsim353",
        command="hagmoe analyze '<b>mine</b>'",
    )


def test_the_report_has_all_its_parts(finished):
    folder, summary = finished
    page = (folder / "report.html").read_text(encoding="utf-8")
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert page.count("<img ") == len(pictures) >= 15
    assert {"load.png", "domain_experts.png", "language_divergence.png", "information.png", "map.png", "sentence0.png"} <= {
        *pictures
    }
    assert {"gate0.png", "cka.png", "coactivation.png", "importance.png", "saturation.png"} <= {*pictures}
    assert len(summary["findings"]) == page.count("<li>") == 5
    assert summary["saturation"]["shares"] == [[1.0, 1.0]], "a model agrees with itself"
    assert summary["drift"] == pytest.approx(0, abs=1e-5)
    assert np.abs(summary["importance"]["lost"]).max() < 0.05, "experts are copies"
    assert json.loads((folder / "report.json").read_text(encoding="utf-8")) == summary


def test_the_page_needs_nothing_from_elsewhere_and_lets_no_label_become_markup(finished):
    """It is mailed around and opened offline; a domain's name is data."""
    page = (finished[0] / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "http" not in page
    assert "<script" not in page
    assert "<b>" not in page
    assert "&lt;b&gt;mine&lt;/b&gt;" in page


def test_the_page_renders_in_a_browser(finished, tmp_path):
    """What a person sees: no error, every picture there, and nothing asked of the network."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser_path is None:
        pytest.skip(f"no browser on this machine; any of {', '.join(BROWSERS)} will do (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((finished[0] / "report.html").as_uri())
        widths = page.evaluate("[...document.images].map(image => image.complete ? image.naturalWidth : 0)")
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        is_wider = page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
        page.set_viewport_size({"width": 390, "height": 800})
        is_wider_on_a_phone = page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
        browser.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert len(widths) >= 15
    assert min(widths) > 300
    assert not is_wider
    assert not is_wider_on_a_phone
    picture = imread(tmp_path / "page.png")
    assert picture.shape[0] > 3000
    assert picture.std() > 0.05


def test_a_second_run_continues_and_does_not_trace_again(finished, mixture_folder, texts, monkeypatch):
    """The trace of a million tokens is the long part."""
    monkeypatch.setattr("hagmoe_hf.analysis.trace._rows", None)
    monkeypatch.setattr(report_room, "draw", lambda *arguments, **options: [])
    summary = analyze(str(mixture_folder), texts, finished[0])
    assert summary["layers"] == finished[1]["layers"]


def test_little_to_look_at_makes_a_report_that_says_so(mixture_folder, tmp_path):
    """One text, no columns: the page is there and names what is missing."""
    summary = analyze(str(mixture_folder), Texts(("a single text",)), tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "There is 1 text" in page
    assert "map.png" not in [path.name for path in (tmp_path / "out").iterdir()]
    assert len(summary["findings"]) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL", "NOTHING.jsonl"], "NOTHING.jsonl is not there"),
        (["MODEL", "BODY"], "no column 'text'; allowed: its columns ['body']"),
        (["DENSE", "TEXTS"], "BertModel has no sparse layers, so there is no routing to look at"),
        (["MODEL", "TEXTS", "--importance", "sts/none"], "importance_task='sts/none' is not possible; allowed: ["),
    ],
)
def test_a_mistake_ends_in_one_line(arguments, message, mixture_folder, tiny_parent, tmp_path, monkeypatch, capsys):
    names = {
        "MODEL": mixture_folder,
        "DENSE": tiny_parent,
        "BODY": tmp_path / "body.jsonl",
        "TEXTS": tmp_path / "texts.jsonl",
    }
    names["BODY"].write_text('{"body": "x"}\n')
    names["TEXTS"].write_text('{"text": "x"}\n')
    words = [str(names.get(word, word)) for word in arguments]
    monkeypatch.setattr(sys, "argv", ["hagmoe", "analyze", *words, "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        main()
    error = " ".join(capsys.readouterr().err.split())
    assert message in error
    assert "Traceback" not in error


def test_the_command_prints_the_findings(mixture_folder, tmp_path, monkeypatch, capsys):
    rows = [{"text": f"text number {row}", "domain": "ab"[row % 2]} for row in range(12)]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sys, "argv", ["hagmoe", "analyze", str(mixture_folder), str(file), "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert [line[0] for line in printed.splitlines()[:5]] == list("12345")
    assert (tmp_path / "out/report.html").stat().st_size > 100_000


def test_example_sentences_are_short_and_of_different_domains(mixture_folder, corpus):
    model = SentenceTransformer(str(mixture_folder), device="cpu")
    texts = Texts(tuple(corpus[:60]), tuple("abc"[row // 20] for row in range(60)))
    trace = report_room.record(model, texts)
    chosen = pictures.example_texts(trace)
    assert {texts.domains[texts.texts.index(text)] for text in chosen} == {"a", "b", "c"}
    assert all(len(model.tokenizer(text)["input_ids"]) in pictures.EXAMPLE_TOKENS for text in chosen)


def test_the_trace_is_the_only_folder_beside_the_files(finished):
    assert {path.name for path in Path(finished[0]).iterdir() if path.is_dir()} == {"trace", "checkpoints", "importance"}


def test_the_page_names_what_a_memory_learned(tiny_parent, corpus, tmp_path):
    """Words of the user's texts, which are data and no markup."""
    model = upcycle(SentenceTransformer(str(tiny_parent), device="cpu"), ngram_texts=corpus, ngram_memory_size=20)
    with torch.no_grad():
        model[0].model.ngram_memory.rows[5] = 0.01
    model.save_pretrained(str(tmp_path / "model"))
    summary = analyze(str(tmp_path / "model"), Texts(tuple(corpus[:8])), tmp_path / "out")
    (learned,) = summary["ngrams"]
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "What the memory learned most of" in page
    assert f"<td>{learned['shift']:.2f}</td>" in page
