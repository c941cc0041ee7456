"""The files under deploy/, as far as they can be checked without a container engine or a cluster."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

import hagmoe_hf
from hagmoe_hf.cli.main import app

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
TOOLS = Path(sys.executable).parent


def tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess:
    if not (TOOLS / name).exists():
        pytest.skip(f"needs {name}: pip install hagmoe_hf[dev]")
    return subprocess.run([TOOLS / name, *map(str, arguments)], capture_output=True, text=True)


def kubernetes_documents(text: str) -> list[dict]:
    return list(yaml.safe_load_all(text))


def test_the_dockerfile_passes_hadolint(tmp_path):
    assert not tool("hadolint", DEPLOY / "Dockerfile").stdout
    bad = tmp_path / "Dockerfile"
    bad.write_text((DEPLOY / "Dockerfile").read_text().replace("--no-cache-dir ", ""))
    assert "DL3042" in tool("hadolint", bad).stdout, "a linter that finds nothing wrong here finds nothing"


def test_the_compose_file_has_the_schema_of_compose(tmp_path):
    check = ("check-jsonschema", "--builtin-schema", "vendor.compose-spec")
    run = tool(*check, DEPLOY / "compose.yaml")
    assert run.returncode == 0, run.stdout
    bad = tmp_path / "compose.yaml"
    bad.write_text((DEPLOY / "compose.yaml").read_text().replace("read_only:", "readonly:"))
    assert tool(*check, bad).returncode != 0


def test_the_manifest_has_the_schema_of_kubernetes():
    """A misspelt field is dropped in silence by a lenient cluster: the pod runs without its limit."""
    validator = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate: pip install hagmoe_hf[dev]")
    text = (DEPLOY / "kubernetes.yaml").read_text()
    for document in kubernetes_documents(text):
        validator.validate(document, "1.32", strict=True)
    bad = text.replace("readOnlyRootFilesystem", "readOnlyRootFileSystem")
    with pytest.raises(validator.ValidationError):
        validator.validate(kubernetes_documents(bad)[0], "1.32", strict=True)


def test_the_service_finds_the_pods_and_the_probes_their_paths():
    deployment, service = kubernetes_documents((DEPLOY / "kubernetes.yaml").read_text())
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["ports"][0]["name"] == service["spec"]["ports"][0]["targetPort"]
    source = (Path(hagmoe_hf.__file__).parent / "serving.py").read_text()
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert f'"{container[probe]["httpGet"]["path"]}"' in source
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in deployment["spec"]["template"]["spec"]["volumes"]}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_what_the_containers_start_is_a_command_that_exists():
    """An option that was renamed would show in production first."""
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    deployment = kubernetes_documents((DEPLOY / "kubernetes.yaml").read_text())[0]
    docker = (DEPLOY / "Dockerfile").read_text()
    commands = [
        yaml.safe_load(re.search(r"^CMD (\[.*\])", docker, re.MULTILINE)[1]),
        compose["services"]["embeddings"]["command"],
        deployment["spec"]["template"]["spec"]["containers"][0]["args"],
    ]
    serve = get_command(app).commands["serve"]
    for command in commands:
        values = serve.make_context("serve", list(command)).params
        assert (values["model"], values["host"], values["name"]) == ("/model", "0.0.0.0", "model")
    assert yaml.safe_load(re.search(r"^ENTRYPOINT (\[.*\])", docker, re.MULTILINE)[1]) == ["hagmoe", "serve"]
    uid = re.search(r"^USER (\d+)", docker, re.MULTILINE)[1]
    assert deployment["spec"]["template"]["spec"]["securityContext"]["runAsUser"] == int(uid) > 0
