"""transformers' own model test-suite, run out of tree on a tiny HAG-MoE."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conformance.prepare import suite_folder

ROOT = Path(__file__).parents[1]
LEAST_PASSED = 105
FAST = "config or roundtrip or save_load or initialization or tied or signature or attention_outputs or hidden_states"


def run_suite(shape: str, report: Path, *options: str) -> ElementTree.Element:
    """Run the suite in a process of its own; its JUnit report."""
    folder = suite_folder()
    environment = {
        **os.environ,
        "HAGMOE_SHAPE": shape,
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "--timeout=300", "--tb=short"]
    command += [f"--junitxml={report}", f"--rootdir={folder}", "-c", os.devnull, *options, str(folder / "test_hagmoe.py")]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout[-3000:] + done.stderr[-3000:]
    return ElementTree.parse(report).getroot().find("testsuite")


def failures(suite: ElementTree.Element) -> list[str]:
    return [case.get("name") for case in suite if case.find("failure") is not None or case.find("error") is not None]


def passed(suite: ElementTree.Element) -> int:
    return len({case.get("name") for case in suite if not len(case)})


@pytest.mark.parametrize("shape", ["bert", "modernbert"])
def test_the_fast_part_of_the_common_suite_passes(shape, tmp_path):
    """Saving, loading, resizing, tying, recorded outputs: what every tool around transformers takes for granted."""
    suite = run_suite(shape, tmp_path / "report.xml", "-k", FAST)
    assert not failures(suite)
    assert passed(suite) >= 20


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["bert", "modernbert"])
def test_the_whole_common_suite_passes(shape, tmp_path):
    """A native model of transformers has to pass it; a stock BERT passes about as many, the rest do not apply."""
    suite = run_suite(shape, tmp_path / "report.xml")
    assert not failures(suite)
    assert passed(suite) >= LEAST_PASSED
