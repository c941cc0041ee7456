"""What keeps the tree honest: who may import whom, and documents that say what is so."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import fill_readme_tables
import pytest

import hagmoe_hf

ROOT = Path(__file__).parents[1]
PACKAGE = Path(hagmoe_hf.__file__).parent  # of the wheel, where only that is installed
README = (ROOT / "README.md").read_text(encoding="utf-8")

# A room knows only rooms of lower rank, and itself.
RANKS = {
    "version": 0,
    "files": 0,
    "sentence": 0,
    "texts": 0,
    "configuration_hagmoe": 0,
    "families": 0,
    "kernels_hagmoe": 0,
    "ngrams_hagmoe": 0,
    "routing_hagmoe": 0,
    "model_card": 1,
    "modeling_hagmoe": 1,
    "importing": 2,
    "hub": 2,
    "calibration": 2,
    "ngram_memory": 2,
    "translations": 3,
    "packing": 4,
    "upcycling": 3,
    "evaluation": 4,
    "export": 4,
    "graphs": 1,
    "training": 4,
    "analysis": 5,
    "bulk": 5,
    "serving": 5,
    "demo": 6,
    "benchmark": 7,
    "cli": 8,
}
HUB_FILES = ("configuration_hagmoe.py", "kernels_hagmoe.py", "ngrams_hagmoe.py", "routing_hagmoe.py", "modeling_hagmoe.py")


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, int]]:
    """(module, level) of every import, lazy ones included; absolute imports of the package count as relative ones."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(f"{node.module or ''}.{alias.name}".strip("."), node.level) for alias in node.names]
    return found


def rooms_known_to(path: Path) -> set[str]:
    known = set()
    for module, level in imports(path):
        if level == 0:
            if module.split(".")[0] == PACKAGE.name:
                known.add(module.split(".")[1] if "." in module else "")
            continue
        base = path.relative_to(PACKAGE).parts[:-1]
        target = [*base[: len(base) - (level - 1)], *module.split(".")]
        known.add(target[0])
    return known


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_knows_only_rooms_below_it(path):
    """Circles and upward imports are how a small package becomes one big file."""
    own = room(path)
    for other in rooms_known_to(path) - {own}:
        assert other in RANKS, f"{path} imports {other}, which has no rank"
        assert RANKS[other] < RANKS[own], f"{path} ({own}) must not import {other}"


def test_plots_never_see_a_model():
    """A picture must be drawable from recorded numbers alone."""
    for path in PACKAGE.rglob("plots.py"):
        assert not {module.split(".")[0] for module, _ in imports(path)} & {"torch", "transformers", "sentence_transformers"}


@pytest.mark.parametrize("name", HUB_FILES)
def test_a_file_that_travels_to_the_hub_needs_only_what_is_there(name):
    """On the Hub there is no hagmoe_hf: one import too many and trust_remote_code fails."""
    allowed = {"torch", "transformers", "huggingface_hub", "safetensors"} | sys.stdlib_module_names
    for module, level in imports(PACKAGE / name):
        if level:
            assert level == 1
            assert f"{module.split('.')[0]}.py" in HUB_FILES
        else:
            assert module.split(".")[0] in allowed, module
    docstrings = re.findall(r'"""(.*?)"""', (PACKAGE / name).read_text(encoding="utf-8"), re.DOTALL)
    assert not any(re.search(r"^\s*from \.", text, re.MULTILINE) for text in docstrings), "transformers would follow it"


def test_importing_the_package_loads_nothing_optional():
    """Registration must stay cheap, and work without the extras."""
    program = "import sys, hagmoe_hf; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded
    assert not {"sentence_transformers", "datasets", "matplotlib", "mteb", "sklearn"} & set(loaded)


def test_looking_inside_needs_no_evaluation_library():
    """`pip install hagmoe_hf[sentence,plots]` is what its guide says; mteb and its dependencies are many."""
    program = "import sys, hagmoe_hf.analysis.report; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"mteb", "matplotlib", "sklearn"} & set(loaded)


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_readmes_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wanted = {word for block in code_blocks("bash") for word in re.findall(r"^make ([a-z-]+)", block, re.MULTILINE)}
    assert wanted == {"demo", "test"}
    assert wanted <= targets


def test_the_readmes_file_tree_is_the_tree_on_disk():
    """A README that draws files which do not exist is how trust ends."""
    tree = re.search(r"## Files\n\n```\n(.*?)```", README, re.DOTALL)[1]
    drawn = {line.split()[0] for line in tree.splitlines()}
    inside = {path.name + "/" * path.is_dir() for path in PACKAGE.iterdir()} - {"__pycache__/", "py.typed"}
    folders = {
        f"{path}/" for path in ("tests", "scripts", "docs", "deploy", "examples", "model_cards") if (ROOT / path).is_dir()
    }
    assert drawn == inside | folders | {"hagmoe_hf/"}


def test_the_readmes_tables_come_from_the_result_files():
    """A figure that was typed, or is older than its file, is not a result."""
    for file in fill_readme_tables.FILES:
        text = file.read_text(encoding="utf-8")
        assert fill_readme_tables.filled(text) == text, "run: python scripts/fill_readme_tables.py"


def test_ci_runs_the_readmes_test_command():
    assert "make test\n" in (ROOT / ".ci/run").read_text()


def test_every_demo_text_says_where_it_comes_from():
    """It is redistributed, so each line carries its source and a permissive licence."""
    import json

    allowed = {"WordNet-3.0", "BSD-3", "Apache-2.0", "MIT", "PSF-2.0", "CC-BY-4.0", "PostgreSQL", "public-domain"}
    rows = [json.loads(line) for line in (PACKAGE / "demo/corpus.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 500
    assert all(row["source"] and row["license"] in allowed for row in rows)
