import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, spread, tiny_config
from hub_server import HubServer
from sentence_transformers import SentenceTransformer, models
from transformers import AutoTokenizer

from hagmoe_hf import HagMoeForMaskedLM, HagMoeModel, hub
from hagmoe_hf.cli.main import main
from hagmoe_hf.demo import parent_folder

ROOT = Path(__file__).parents[1]
TEXTS = ["free the disk space", "Wie spät ist es?"]
WITHOUT_PACKAGE = "import sys; sys.modules['hagmoe_hf'] = None\n"
WITH_PACKAGE = "import hagmoe_hf\n"


@pytest.fixture(scope="module")
def server():
    server = HubServer()
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A tiny mixture as a SentenceTransformer folder."""
    folder = tmp_path_factory.mktemp("saved")
    spread(HagMoeModel(tiny_config(vocab_size=30522))).save_pretrained(folder / "encoder")
    tokenizer = AutoTokenizer.from_pretrained(parent_folder())
    tokenizer.model_max_length = TINY["max_position_embeddings"]
    tokenizer.save_pretrained(folder / "encoder")
    encoder = models.Transformer(str(folder / "encoder"))
    model = SentenceTransformer(modules=[encoder, models.Pooling(TINY["hidden_size"])], device="cpu")
    model.save_pretrained(str(folder / "model"))
    return folder / "model"


@pytest.fixture(scope="module")
def fresh_process(server, tmp_path_factory):
    """Runs Python in a process of its own, with a cache of its own, against the small Hub."""

    def run(program: str, check: bool = True) -> subprocess.CompletedProcess:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "HF_ENDPOINT": server.address,
            "HF_HOME": str(tmp_path_factory.mktemp("cache")),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": "hf_loopback",
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert not check or done.returncode == 0, done.stderr[-3000:]
        return done

    return run


def push(fresh_process, folder: Path, repo: str, check: bool = True) -> subprocess.CompletedProcess:
    arguments = ["hagmoe", "push", str(folder), repo]
    return fresh_process(f"import sys; sys.argv = {arguments!r}\nfrom hagmoe_hf.cli.main import main\nmain()", check)


@pytest.fixture(scope="module")
def pushed(saved, server, fresh_process) -> dict[str, bytes]:
    """The files of the repository me/mixture after one push."""
    before = server.commits
    assert "/commit/" in push(fresh_process, saved, "me/mixture").stdout
    assert server.commits == before + 1, "several commits could be seen half done"
    return server.repositories["me/mixture"]


BOTH_DOORS = """
import json, torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer
sentences = SentenceTransformer("me/mixture", device="cpu"{trust})
model = AutoModel.from_pretrained("me/mixture"{trust}).eval()
batch = AutoTokenizer.from_pretrained("me/mixture"{trust})({texts!r}, padding=True, return_tensors="pt")
with torch.inference_mode():
    states = model(**batch).last_hidden_state
mask = batch["attention_mask"].unsqueeze(-1)
means = (states * mask).sum(1) / mask.sum(1)
modules = [type(sentences[0].model).__module__, type(model).__module__]
print(json.dumps([modules, sentences.encode({texts!r}).tolist(), means.tolist()]))
"""


@pytest.mark.parametrize(
    ("prelude", "trust"), [(WITHOUT_PACKAGE, ", trust_remote_code=True"), (WITH_PACKAGE, "")], ids=["without", "with"]
)
def test_what_is_pushed_is_pulled_with_and_without_the_package(prelude, trust, saved, pushed, fresh_process):
    """People on the other side have the package, or have only transformers and trust the code; nobody has both habits."""
    expected = SentenceTransformer(str(saved), device="cpu").encode(TEXTS)
    done = fresh_process(prelude + BOTH_DOORS.format(trust=trust, texts=TEXTS))
    modules, *both = json.loads(done.stdout.splitlines()[-1])
    for module, vectors in zip(modules, both, strict=True):
        assert np.abs(np.array(vectors) - expected).max() <= 1e-6
        assert module.startswith("transformers_modules" if trust else "hagmoe_hf")


def test_a_push_carries_everything_and_no_pickle(pushed):
    files = pushed
    assert {"model.safetensors", "tokenizer.json", "modules.json", "README.md", "requirements.txt"} <= files.keys()
    assert {path.name for path in hub.HUB_FILES} <= files.keys()
    assert not [name for name in files if name.endswith(hub.PICKLES)]
    assert json.loads(files["config.json"])["auto_map"]["AutoModelForMaskedLM"] == "modeling_hagmoe.HagMoeForMaskedLM"
    modules = json.loads(files["modules.json"])
    assert all(module["type"].startswith("sentence_transformers.") for module in modules)
    assert b"transformers>=" in files["requirements.txt"]


def test_the_cards_snippets_work(pushed, fresh_process):
    """A card is pasted from, with the package and without."""
    card = pushed["README.md"].decode()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    with_package, without_package = (
        [block for block in blocks if ("import hagmoe_hf" in block) == wanted and "me/mixture" in block]
        for wanted in (True, False)
    )
    assert with_package
    assert without_package
    fresh_process(with_package[0] + "\nassert vectors.shape == (2, 32)")
    fresh_process(WITHOUT_PACKAGE + without_package[-1] + "\nassert vectors.shape == (2, 32)")


def test_an_interrupted_upload_leaves_the_remote_as_it_was(saved, server, fresh_process, tmp_path):
    """Half a model under a name that people load would break all of them at once."""
    push(fresh_process, saved, "me/updated")
    before, commits = dict(server.repositories["me/updated"]), server.commits
    shutil.copytree(saved, tmp_path / "changed")
    spread(HagMoeModel(tiny_config(vocab_size=30522)), seed=1).save_pretrained(tmp_path / "changed")
    server.refuse_uploads_after = len(server.large_files)
    done = push(fresh_process, tmp_path / "changed", "me/updated", check=False)
    server.refuse_uploads_after = None
    assert done.returncode != 0
    assert server.repositories["me/updated"] == before
    assert server.commits == commits
    push(fresh_process, tmp_path / "changed", "me/updated")
    assert server.repositories["me/updated"]["model.safetensors"] != before["model.safetensors"]


def test_a_models_own_push_to_hub_carries_its_code(server, fresh_process, tmp_path):
    """The door that transformers gives every model; saving locally stays free of code."""
    model = spread(HagMoeForMaskedLM(tiny_config()))
    model.save_pretrained(tmp_path / "local")
    assert not list((tmp_path / "local").glob("*.py"))
    fresh_process(
        "from transformers import AutoModelForMaskedLM\nimport hagmoe_hf\n"
        f"model = AutoModelForMaskedLM.from_pretrained({str(tmp_path / 'local')!r})\n"
        "model.push_to_hub('me/mlm')\n"
        f"model.save_pretrained({str(tmp_path / 'again')!r})\n"
    )
    assert {path.name for path in hub.HUB_FILES} <= server.repositories["me/mlm"].keys()
    assert not list((tmp_path / "again").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "again/config.json").read_text())
    ids = torch.arange(3, 9).unsqueeze(0)
    with torch.inference_mode():
        expected = model(ids).logits
    done = fresh_process(
        WITHOUT_PACKAGE + "import json, torch\nfrom transformers import AutoModelForMaskedLM\n"
        "model = AutoModelForMaskedLM.from_pretrained('me/mlm', trust_remote_code=True).eval()\n"
        "print(json.dumps(model(torch.arange(3, 9).unsqueeze(0)).logits.tolist()))"
    )
    assert np.abs(np.array(json.loads(done.stdout.splitlines()[-1])) - expected.numpy()).max() <= 1e-5


def test_a_pickle_is_refused(saved, tmp_path):
    """It can run anything on the machine that loads it."""

    shutil.copytree(saved, tmp_path / "model")
    torch.save({}, tmp_path / "model/optimizer.pt")
    with pytest.raises(ValueError, match=r"holds \['optimizer\.pt'\].*allowed: safetensors only"):
        hub.push_to_hub(tmp_path / "model", "me/mixture")


def test_a_dense_model_is_refused():
    with pytest.raises(ValueError, match="model_type='bert'; allowed: a saved 'hagmoe'"):
        hub.push_to_hub(parent_folder(), "me/mixture")


def test_a_missing_folder_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hagmoe", "push", "/no/such/folder", "me/mixture"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert "is no folder; allowed: a folder that a model was saved to" in capsys.readouterr().err


def test_a_push_that_fails_says_why_and_leaves_the_model_as_it_was(monkeypatch):
    """A wrong token once ended in a missing attribute of ours."""

    def refused(*arguments, **options):
        raise OSError("401: no such token")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refused)
    monkeypatch.setattr("transformers.utils.hub.create_repo", refused, raising=False)  # older transformers call this one
    model = HagMoeModel(tiny_config())
    with pytest.raises(OSError, match="no such token"):
        model.push_to_hub("me/mixture")
    assert not hasattr(model.config, "auto_map")
