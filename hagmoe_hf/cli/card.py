"""The verb `hagmoe card`."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from ..configuration_hagmoe import HagMoeConfig
from ..files import write_text
from ..model_card import measured_card


def card(
    model: Annotated[Path, typer.Argument(help="Folder of a trained mixture, or its config.json.")],
    out: Annotated[Path, typer.Argument(help="The card to write, such as MODEL/README.md; one that is there is replaced.")],
    name: Annotated[str | None, typer.Option(help="Of the model; by default that of OUT's folder.")] = None,
    base_model: Annotated[str | None, typer.Option(help="The parent's Hub id.")] = None,
    license: Annotated[str | None, typer.Option(help="Of the weights, such as apache-2.0.")] = None,
    training: Annotated[Path | None, typer.Option(help="The YAML file of `hagmoe train`.")] = None,
    notes: Annotated[
        Path | None, typer.Option(help="Markdown about the training, where the other files do not tell.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="The data_report.json of `hagmoe train`.")] = None,
    evaluation: Annotated[Path | None, typer.Option(help="The report.json of `hagmoe evaluate`.")] = None,
    benchmark: Annotated[Path | None, typer.Option(help="The benchmark.json of `hagmoe benchmark`.")] = None,
) -> None:
    """Write a card with everything that was measured, and with what the model is bad at, from the files that say so."""
    config = _mapping(model / "config.json" if model.is_dir() else model)
    kind, wanted = config.get("model_type"), HagMoeConfig.model_type
    if kind != wanted:
        raise ValueError(f"{model}: model_type={kind!r} is not possible; allowed: {wanted!r}, as `hagmoe upcycle` writes.")
    text = measured_card(
        HagMoeConfig(**config),
        name=name or out.resolve().parent.name,
        command=shlex.join(["hagmoe", *sys.argv[1:]]),
        base_model=base_model,
        license=license,
        training=_mapping(training) if training else None,
        notes=notes.read_text(encoding="utf-8") if notes else None,
        data=_mapping(data) if data else None,
        evaluation=_mapping(evaluation) if evaluation else None,
        benchmark=_mapping(benchmark) if benchmark else None,
    )
    write_text(out, text)
    print(f"Written: {out}")


def _mapping(path: Path) -> dict[str, Any]:
    """What a JSON or YAML file holds.

    Raises:
        ValueError: It is neither, or no mapping.
        OSError: It cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read ({error}); allowed: a JSON or YAML mapping.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; allowed: a JSON or YAML mapping.")
    return content
