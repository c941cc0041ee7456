"""The programs of examples/ run as a person runs them, offline, and print what they promise."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import time_examples

import hagmoe_hf

ROOT = Path(__file__).parents[1]
PROGRAMS = sorted((ROOT / "examples").glob("*.py"))
FAST = {"embed"}  # the others take more than some seconds even when short
SHARE, NUMBER = r"([01]\.\d+)", r"(\d+\.\d+)"

# What each must have printed; its groups are numbers, which the tests below look at
PROMISES = {
    "code_search": [f"MRR before: {SHARE}", f"MRR after: {SHARE}", "wrap long lines -> ."],
    "custom_experts": [rf"{name} +largest difference (\S+)," for name in ("segmented_mm", "grouped_mm", "every_expert")],
    "embed": ["4 vectors of 384 numbers", r"largest difference from the parent's: (\S+)"],
    "export_onnx": [rf"{name}, .* smallest cosine {SHARE}" for name in (r"model\.onnx", r"model_qint8\.onnx")],
    "look_inside": [f"layer {layer}: .* {NUMBER} bits about the domain" for layer in (1, 3)],
    "masked_lm_from_scratch": [f"held-out loss {NUMBER}; by frequency alone {NUMBER}", "paris is .* -> ."],
    "matryoshka": [rf"^ +{size} +{NUMBER}% +{NUMBER}%$" for size in (384, 128, 64, 32, 16)],
    "reranker": [
        rf"MRR@10 of the {what}: +{SHARE}" for what in ("embedding model", "untrained reranker", "trained reranker")
    ],
    "semantic_search": ["567 texts of 8 domains", f"free the disk space .*\n  {SHARE} "],
    "splade": [f"{when}: nDCG@10 {SHARE}" for when in ("^untrained", "^trained")],
    "text_classification": [f"accuracy {SHARE}; always the more frequent label: {SHARE}", r"two days\. -> {'label': '"],
    "upcycle_and_finetune": [f"{what}: {SHARE}" for what in ("untrained", "dense parent, trained", "mixture, trained")],
}
NO_NETWORK = """
import os, socket
def refuse(*arguments, **_):
    with open(os.environ["ATTEMPTS"], "a") as file:
        print(arguments, file=file)
    raise OSError("examples run offline")
socket.getaddrinfo = socket.socket.connect = refuse
"""


def run(program: Path, folder: Path) -> list[list[str]]:
    """The groups of each promise, from a run of a program in an empty folder that sees the package and nothing of ours."""
    packages, work, attempts = folder / "packages", folder / "work", folder / "attempts"
    packages.mkdir()
    work.mkdir()
    (packages / "hagmoe_hf").symlink_to(Path(hagmoe_hf.__file__).parent, target_is_directory=True)
    (packages / "sitecustomize.py").write_text(NO_NETWORK)
    (work / program.name).write_text(program.read_text(encoding="utf-8"), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(packages), "ATTEMPTS": str(attempts), "HF_HOME": str(folder / "home")}
    del environment["HF_HUB_OFFLINE"]  # nobody has to set it
    short = ["--steps", "2"] if "--steps" in program.read_text(encoding="utf-8") else []
    command = [sys.executable, program.name, *short]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    # For the card, sentence-transformers asks the Hub whether a folder's name is a model there; no answer is fine
    tried = attempts.read_text().splitlines() if attempts.exists() else []
    assert all("huggingface.co" in line for line in tried), tried
    found = [re.search(promise, done.stdout, re.MULTILINE) for promise in PROMISES[program.stem]]
    assert all(found), done.stdout
    return [list(match.groups()) for match in found if match]


@pytest.mark.parametrize(
    "program",
    [pytest.param(p, marks=[] if p.stem in FAST else pytest.mark.slow, id=p.stem) for p in PROGRAMS],
)
def test_a_program_runs_offline_and_prints_what_it_promises(program, tmp_path):
    """It is the first code that many copy."""
    numbers = [float(number) for groups in run(program, tmp_path) for number in groups]
    if program.stem in ("embed", "custom_experts"):
        assert max(numbers) <= 1e-5, "different implementations, and parent and mixture, give the same vectors"
    if program.stem == "export_onnx":
        assert numbers[0] >= 0.9999
        assert numbers[1] >= 0.95
    if program.stem in ("upcycle_and_finetune", "semantic_search", "code_search"):
        assert min(numbers) > 0.2, "two steps of training spoil nothing"


def test_every_program_says_what_it_shows_prints_and_takes():
    """Nobody should have to run one to know."""
    result = json.loads((ROOT / "docs/results/examples.json").read_text(encoding="utf-8"))["programs"]
    assert set(result) <= {program.name for program in PROGRAMS}
    assert {program.stem for program in PROGRAMS} == set(PROMISES)
    for program in PROGRAMS:
        doc = ast.get_docstring(ast.parse(program.read_text(encoding="utf-8"))) or ""
        assert "\nPrints: " in doc, program
        assert doc.endswith(time_examples.time_line(result.get(program.name))), program


def test_the_examples_readme_comes_from_the_result_file():
    """Its times and outputs are those that were seen, or they are advertising."""
    result = json.loads((ROOT / "docs/results/examples.json").read_text(encoding="utf-8"))
    text = (ROOT / "examples/README.md").read_text(encoding="utf-8")
    assert time_examples.filled(text, result) == text, "run: python scripts/time_examples.py docs/results/examples.json"


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.stem)
def test_a_program_is_whole_and_short(program):
    """One that needs a file of ours beside it cannot be copied; one that is long is not read."""
    source = program.read_text(encoding="utf-8")
    assert 20 <= len(source.splitlines()) <= 65
    modules = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    siblings = {path.stem for path in PROGRAMS}
    assert not {str(module).split(".")[0] for module in modules} & siblings


def test_the_trainers_logs_are_not_what_a_program_printed():
    """They would bury its few lines in the README."""
    output = "untrained: 0.1\n{'loss': 3.0}\ntrained: 0.2  \n"
    assert time_examples.printed(output) == ["untrained: 0.1", "trained: 0.2"]
