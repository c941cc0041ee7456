"""The notebooks run from top to bottom, with the claims that they test."""

import ast
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
LONG = {"expert_analysis", "performance_comparison", "visualisation"}  # they run the real parent many times


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem not in LONG], ids=lambda path: path.stem)
def test_a_short_notebooks_code_runs_as_it_stands(path, tmp_path, monkeypatch):
    """It is the first code that many copy; a claim of theory that no longer holds must fail here."""
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__main__"}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, path.name, "exec"), names)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_a_kernel(path, tmp_path, monkeypatch):
    """As a person runs it."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=500, startup_timeout=300, kernel_name="python3", resources=where).execute()


def test_the_wanted_notebooks_are_there():
    names = {path.stem for path in NOTEBOOKS}
    assert names >= LONG | {"quickstart"}
    assert len([name for name in names if name.startswith("theory_")]) >= 4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_theory_notebook_tests_what_it_claims(path):
    """Prose alone is no check: each notebook asserts, and shows what it found."""
    notebook = nbformat.read(path, as_version=4)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    asserts = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Assert)]
    assert len(asserts) >= (3 if path.stem.startswith("theory_") else 1)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert outputs, "run it once before it is committed"
    assert not any(output.output_type == "error" for output in outputs)
