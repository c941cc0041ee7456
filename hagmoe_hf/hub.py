"""To the Hub: a folder with everything that people there need, with and without this package, in one commit."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from . import configuration_hagmoe, kernels_hagmoe, modeling_hagmoe, ngrams_hagmoe, routing_hagmoe
from .configuration_hagmoe import HagMoeConfig
from .model_card import published_card

_MODULES = (configuration_hagmoe, kernels_hagmoe, ngrams_hagmoe, routing_hagmoe, modeling_hagmoe)
HUB_FILES = tuple(Path(str(module.__file__)) for module in _MODULES)
REQUIREMENTS = """# What the code beside the weights needs; or install hagmoe_hf, and leave trust_remote_code out.
torch>=2.11
transformers>=5.17,<6
"""
PICKLES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
NOT_PUBLISHED = ("checkpoint-*", "runs", ".git*", ".cache", "__pycache__")


def push_to_hub(
    model: Any, repo_id: str, *, private: bool = False, token: str | None = None, message: str = "Upload a HAG-MoE"
) -> str:
    """Publish a mixture: weights, tokenizer, stock modules, code, card and a requirements note, in a single commit.

    Large files go first and a commit names them last, so an upload that stops on the way leaves the repository as it was.

    Args:
        model: A folder, a HAG-MoE model, or a `SentenceTransformer` with one.
        repo_id: "owner/name" on the Hub; made where it does not exist.
        private: Whether a new repository is private.
        token: Access token; the one that is logged in where None.
        message: Message of the commit.

    Returns:
        The address of the commit.

    Raises:
        ValueError: The folder holds no HAG-MoE, or a pickle; the message names it.
        FileNotFoundError: There is no such folder.
    """
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder) / "model"
        if isinstance(model, str | os.PathLike):
            source = Path(model).expanduser()
            if not source.is_dir():
                raise FileNotFoundError(f"{source} is no folder; allowed: a folder that a model was saved to.")
            shutil.copytree(source, staged, ignore=shutil.ignore_patterns(*NOT_PUBLISHED))
        else:
            model.save_pretrained(str(staged))
        complete(staged, repo_id)
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=staged, commit_message=message).commit_url)


def complete(folder: Path, repo_id: str) -> None:
    """Add to a saved mixture what only the Hub needs: code, `auto_map`, requirements, and a card that names `repo_id`.

    Raises:
        ValueError: The folder holds no HAG-MoE, or a pickle; the message names it.
    """
    pickles = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in PICKLES)
    if pickles:
        raise ValueError(f"The folder holds {pickles}, and a pickle can run anything; allowed: safetensors only.")
    encoder = _encoder_folder(folder)
    path = encoder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = auto_map()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for file in HUB_FILES:
        shutil.copyfile(file, encoder / file.name)
    (folder / "requirements.txt").write_text(REQUIREMENTS, encoding="utf-8")
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    card.write_text(published_card(text, repo_id, _model_type(folder)), encoding="utf-8")


def auto_map() -> dict[str, str]:
    """Which class each Auto class finds in the code beside the weights."""
    found = {"AutoConfig": f"configuration_hagmoe.{HagMoeConfig.__name__}"}
    for name in modeling_hagmoe.__all__:
        task = name.removeprefix("HagMoe")
        auto_class = f"Auto{task}" if task == "Model" else f"AutoModel{task}"
        if task == "Model" or task.startswith("For"):
            found[auto_class] = f"modeling_hagmoe.{name}"
    return found


def _model_type(folder: Path) -> str | None:
    """The sentence-transformers class that was saved, None for a bare transformers model."""
    if not (folder / "modules.json").is_file():
        return None
    config = folder / "config_sentence_transformers.json"
    stated = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    return stated.get("model_type", "SentenceTransformer")


def _encoder_folder(folder: Path) -> Path:
    """Where the encoder lies: in the folder itself, or where a SentenceTransformer's first module is.

    Raises:
        ValueError: There is no HAG-MoE.
    """
    encoder = folder
    if (folder / "modules.json").is_file():
        encoder = folder / json.loads((folder / "modules.json").read_text(encoding="utf-8"))[0]["path"]
    path = encoder / "config.json"
    model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type") if path.is_file() else None
    if model_type != HagMoeConfig.model_type or not list(encoder.glob("*.safetensors")):
        raise ValueError(
            f"The folder holds a model of model_type={model_type!r}; allowed: a saved {HagMoeConfig.model_type!r} with its "
            "safetensors."
        )
    return encoder
