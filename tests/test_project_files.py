"""The files around the code: they promise things, too."""

import ast
import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from transformers import AutoModel, BertConfig

import hagmoe_hf

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = Path(hagmoe_hf.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
ISSUE_FILES = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
SCHEMAS = {
    "github-workflows": WORKFLOWS,
    "github-issue-forms": [path for path in ISSUE_FILES if path.stem != "config"],
    "github-issue-config": [path for path in ISSUE_FILES if path.stem == "config"],
    "citation-file-format": [ROOT / "CITATION.cff"],
}


def requirements() -> list[Requirement]:
    """Everything that pyproject.toml asks for, the package's own extras left out."""
    extras = PROJECT["optional-dependencies"].values()
    found = [Requirement(line) for line in [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]]
    return [requirement for requirement in found if requirement.name != PROJECT["name"]]


def pins(file: str) -> dict[str, str]:
    """Name -> version of a constraints file."""
    lines = [line.split("#")[0].strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines if line)}


def asked_for_by(extra: str) -> list[Requirement]:
    """What the package and an extra need, with the extras that it names in turn."""
    found = [Requirement(line) for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"][extra]]]
    others = [name for requirement in found if requirement.name == PROJECT["name"] for name in requirement.extras]
    named = [requirement for requirement in found if requirement.name != PROJECT["name"]]
    return [*named, *(requirement for name in others for requirement in asked_for_by(name))]


def test_the_lowest_versions_are_the_lower_bounds():
    """CI tests what this file says; a bound that differs is one that nobody tries."""
    bounds = {
        canonicalize_name(requirement.name): specifier.version
        for requirement in asked_for_by("test")
        for specifier in requirement.specifier
        if specifier.operator in (">=", "==")
    }
    assert pins("constraints-lowest.txt") == bounds


def test_every_requirement_is_pinned_to_a_version_that_it_allows():
    """What `make` installs tomorrow must be what was tested today."""
    pinned = pins("constraints.txt")
    for requirement in requirements():
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}: constraints.txt has {version}"


def test_the_pinned_versions_run_on_the_oldest_python_that_they_are_for():
    """Debian 12 has Python 3.11.2, and a pin for 3.11.5 made `make test` impossible there."""
    pinned = pins("constraints.txt")
    versions = [found for found in distributions() if pinned.get(canonicalize_name(found.name)) == found.version]
    assert len(versions) > 50
    asked = {found.name: found.metadata["Requires-Python"] for found in versions}
    assert not {name: asks for name, asks in asked.items() if asks and not SpecifierSet(asks).contains("3.11.0")}


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == hagmoe_hf.__version__
    assert citation["license"] == PROJECT["license"]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_what_github_reads_is_what_it_accepts(schema):
    """GitHub tells of a mistake in these files only after they are merged, or not at all."""
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *map(str, SCHEMAS[schema])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_workflows_run_make_targets_that_exist():
    """What CI runs is what a contributor can run."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    jobs = [job for path in WORKFLOWS for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values()]
    commands = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    wanted = {command.removeprefix("make ") for command in commands}
    assert wanted >= {"lint", "test", "test-lowest", "wheel-test", "docs"}
    assert wanted <= targets


def test_the_oldest_python_and_two_newer_ones_are_tried():
    jobs = yaml.safe_load(WORKFLOWS[0].read_text(encoding="utf-8"))["jobs"]
    assert len(jobs["tests"]["strategy"]["matrix"]["python-version"]) == 3
    oldest = next(step["with"]["python-version"] for step in jobs["lowest"]["steps"] if "with" in step)
    assert PROJECT["requires-python"] == f">={oldest}"


def test_links_between_the_documents_of_the_project_lead_somewhere():
    for name in ("CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "SECURITY.md"):
        for target in re.findall(r"\]\(([^)]+)\)", (ROOT / name).read_text(encoding="utf-8")):
            assert target.startswith("https://") or (ROOT / target.split("#")[0]).exists(), f"{name}: {target}"


UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_in_the_package_unpickles(path):
    """SECURITY.md promises it: a pickle runs whatever its author wanted."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & UNSAFE_MODULES
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in UNSAFE_MODULES
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert called not in ("yaml.load", "yaml.unsafe_load", "eval", "exec"), f"line {node.lineno}"
            assert called != "torch.load" or keywords.get("weights_only") == "True", f"line {node.lineno}"
            assert keywords.get("allow_pickle", "False") == "False", f"line {node.lineno}"
            assert keywords.get("trust_remote_code", "False") == "False", f"line {node.lineno}"


class Malice:
    """What a hostile checkpoint does to whoever unpickles it."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("load", [AutoModel.from_pretrained, hagmoe_hf.upcycle], ids=["load", "upcycle"])
def test_a_hostile_checkpoint_runs_nothing(load, tmp_path):
    """People try models of strangers."""
    folder, ran = tmp_path / "model", tmp_path / "ran"
    BertConfig(**TINY, architectures=["BertModel"]).save_pretrained(folder)
    torch.save({"embeddings.word_embeddings.weight": Malice(ran)}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights_only|unsupported|unpickl|safetensors"):
        load(str(folder))
    assert not ran.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert ran.exists(), "it would have, otherwise"
