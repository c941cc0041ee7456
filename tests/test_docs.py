"""What the documentation shows is run, and what it links to is there.

A page's blocks run in order, in a folder that holds what the page takes as given: tiny models under the names in the text. A
block that cannot run here says why in a mark before it: `<!-- needs: gpu -->`, `hub` or `time`.
"""

import json
import re
import shlex
import sys
from pathlib import Path

import pandas
import pytest
import yaml
from doc_blocks import Block, read_blocks
from draw_architecture import drawing
from evaluation_helpers import shipped_rows, small_kit, write_rows
from sentence_transformers import SentenceTransformer

import hagmoe_hf
from hagmoe_hf import demo, upcycle
from hagmoe_hf.cli.main import app
from hagmoe_hf.evaluation import kit
from hagmoe_hf.training.curriculum import read_curriculum

ROOT = Path(__file__).parents[1]
SLOW = ("analysis", "evaluation", "export")  # long; tests of the rooms do the same to tiny models
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
CODE = ("python", "bash", "yaml", "json")
# What a page's Python takes as given, beside the files in the folder
GIVEN = {
    "analysis.md": "from sentence_transformers import SentenceTransformer\nmodel = SentenceTransformer('MODEL')",
    "training.md": """
from datasets import load_dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss
model = SentenceTransformer("MODEL")
data = load_dataset("parquet", data_files="pairs.parquet", split="train").select_columns(["anchor", "positive"])
args = SentenceTransformerTrainingArguments("script", max_steps=1, per_device_train_batch_size=4, report_to="none")
loss = MultipleNegativesRankingLoss(model)
""",
}
# The tiny parent is 32 numbers wide, its rows are few, and there is no GPU
TINY = {
    "matryoshka_dims: [384, 192, 96]": "matryoshka_dims: [32, 16]",
    "calibration_rows: 200": "calibration_rows: 20",
    "bf16: true": "bf16: false",
}


@pytest.fixture(scope="module")
def prepared(tiny_parent, pairs_file, corpus, tmp_path_factory) -> Path:
    """A folder with everything that the pages name."""
    folder = tmp_path_factory.mktemp("reader")
    upcycle(SentenceTransformer(str(tiny_parent), device="cpu")).save_pretrained(str(folder / "MODEL"))
    for name in ("PARENT", "my-dense-model"):
        (folder / name).symlink_to(tiny_parent)
    (folder / "my-mixture").symlink_to(folder / "MODEL")
    rows = [json.loads(line) for line in pairs_file.read_text(encoding="utf-8").splitlines()]
    pandas.DataFrame([{**row, "split": "train"} for row in rows[:96]]).to_parquet(folder / "pairs.parquet")
    texts = [{"text": text, "domain": ("law", "code")[row % 2], "lang": "en"} for row, text in enumerate(corpus[:24])]
    for name in ("texts.jsonl", "hagmoe_hf/demo/corpus.jsonl"):
        write_rows(folder / name, texts)
    (folder / "texts.txt").write_text("\n".join(" ".join(text.split()) for text in corpus[:64]), encoding="utf-8")
    halves = [text.split() for text in corpus[:64]]
    lines = [f"{' '.join(words[: len(words) // 2])}\t{' '.join(words[len(words) // 2 :])}" for words in halves]
    (folder / "pairs.txt").write_text("\n".join(lines), encoding="utf-8")
    small_kit(folder / "my_data")
    write_rows(folder / "kit/sts/wordsim353/test.jsonl", shipped_rows("sts/wordsim353", "test")[:60])
    (folder / "kit/retrieval").mkdir()
    (folder / "kit/retrieval/papers").symlink_to(folder / "my_data/retrieval/papers")
    return folder


@pytest.fixture
def reader(prepared, tiny_parent, tmp_path, monkeypatch) -> Path:
    """A folder of its own for a page, with tiny things in the place of big ones."""
    for path in prepared.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kit, "SHIPPED", prepared / "kit")
    monkeypatch.setattr(demo, "parent_folder", lambda: tiny_parent)
    return tmp_path


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] if page.stem in SLOW else [], id=page.name) for page in PAGES]
)
def test_what_a_page_shows_works_as_written(page, reader, monkeypatch):
    """A newcomer pastes it, in order, and leaves when it fails."""
    blocks = [block for block in read_blocks(page) if block.language in CODE and not block.needs]
    for block in blocks:
        named = re.match(r"# ([\w.]+\.yaml)\b", block.code)
        if block.language == "yaml" and named:
            (reader / named[1]).write_text(made_tiny(block.code), encoding="utf-8")
    names: dict = {"__name__": "__main__"}
    exec(GIVEN.get(page.name, ""), names)
    for block in blocks:
        where = f"{page.name}:{block.line}"
        if block.language == "python":
            exec(compile(block.code, where, "exec"), names)
        elif block.language == "bash":
            for line in block.code.replace("\\\n", " ").splitlines():
                run_line(line, where, monkeypatch)
        else:
            check_data(block, reader)


def made_tiny(code: str) -> str:
    """A configuration with what the tiny parent can do."""
    for written, tiny in TINY.items():
        code = code.replace(written, tiny)
    return code


def run_line(line: str, where: str, monkeypatch) -> None:
    """`hagmoe` runs in this process, to be fast; what installs or makes is checked for what it names."""
    words = shlex.split(line, comments=True)
    if not words or words == ["source", ".venv/bin/activate"] or words[:3] == ["python3", "-m", "venv"]:
        return
    if words[0] == "hagmoe":
        monkeypatch.setattr(sys, "argv", words)
        app(words[1:], standalone_mode=False)
    elif words[:2] == ["pip", "install"]:
        extras = re.fullmatch(r"(?:\.|hagmoe_hf)(?:\[([\w,]+)\])?", words[-1])
        assert extras, f"{where}: {line}"
        assert set((extras[1] or "").split(",")) - {""} <= set(all_extras()), f"{where}: {line}"
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), f"{where}: {line}"
    else:
        pytest.fail(f"{where}: nothing here runs {line!r}; teach this function, or mark the block with what it needs")


def check_data(block: Block, folder: Path) -> None:
    """A phase file is read as `hagmoe train` reads it; options have run with the command; JSON is JSON."""
    if block.language == "json":
        json.loads(block.code)
    elif "phases:" in block.code:
        read_curriculum(folder / "curriculum.yaml")
    else:
        yaml.safe_load(block.code)


def all_extras() -> list[str]:
    """The optional dependencies in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    return re.findall(r"^(\w+) = ", section, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_what_it_is(page):
    """A block without a language would neither run nor be looked at."""
    for block in read_blocks(page):
        assert block.language in CODE or (page.name, block.heading) == ("README.md", "Files"), f"{page.name}:{block.line}"


def test_a_mark_that_nobody_knows_is_refused(tmp_path):
    """A misspelt mark would take a block out of the tests for no reason."""
    (tmp_path / "page.md").write_text("# A\n<!-- needs: luck -->\n```bash\nhagmoe\n```\n", encoding="utf-8")
    with pytest.raises(ValueError, match="'luck' is no mark; allowed: gpu, hub, time"):
        read_blocks(tmp_path / "page.md")


def test_a_shell_line_that_nothing_runs_is_no_pass(monkeypatch):
    with pytest.raises(pytest.fail.Exception, match="nothing here runs 'rm -rf build'"):
        run_line("rm -rf build", "page.md:1", monkeypatch)


EVERY_PAGE = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_inside_the_project_lead_somewhere(page):
    """The site checks its own pages; the README, notebooks and pictures are seen where the repository is shown, too."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "#")):
            continue
        file, _, anchor = target.partition("#")
        assert (page.parent / file).exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (page.parent / file).read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_every_module_has_a_place_in_the_reference():
    """A room that the reference forgets is one that users have to read in the source."""
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/api").glob("*.md"))
    shown = re.findall(r"^\.\. automodule:: (\S+)", text, re.MULTILINE)
    assert len(shown) == len(set(shown))
    package = Path(hagmoe_hf.__file__).parent
    modules = {".".join(path.relative_to(package.parent).with_suffix("").parts) for path in package.rglob("*.py")}
    hidden = {"hagmoe_hf.version"} | {name for name in modules if name.endswith(".__init__")}
    packages = {"hagmoe_hf.bulk", "hagmoe_hf.demo"}  # those that are imported by their own name
    assert set(shown) == (modules - hidden) | packages


def test_the_extras_are_explained():
    """Whoever misses one must find out what it is for."""
    page = (ROOT / "docs/installation.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set(all_extras())


def test_the_drawing_is_the_scripts():
    """It follows the default configuration, and so must the file."""
    assert (ROOT / "docs/architecture.svg").read_text(encoding="utf-8") == drawing()


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    """`make docs`; a reference or link that leads nowhere is a warning."""
    build = pytest.importorskip("sphinx.cmd.build", reason="pip install hagmoe_hf[docs]")
    assert (
        build.main(["-W", "--keep-going", "-q", "-d", str(tmp_path / "trees"), str(ROOT / "docs"), str(tmp_path / "html")])
        == 0
    )
    page = (tmp_path / "html/api/modeling.html").read_text(encoding="utf-8")
    assert 'id="hagmoe_hf.modeling_hagmoe.HagMoeModel.forward"' in page
