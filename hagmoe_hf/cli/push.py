"""The verb `hagmoe push`."""

from pathlib import Path
from typing import Annotated

import typer

from ..hub import push_to_hub


def push(
    folder: Annotated[Path, typer.Argument(help="Folder that a mixture was saved to.")],
    repo: Annotated[str, typer.Argument(help="owner/name on the Hub; made where it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    message: Annotated[str, typer.Option(help="Message of the commit.")] = "Upload a HAG-MoE",
) -> None:
    """Publish a mixture with its code, card and requirements, in one commit."""
    print(push_to_hub(folder, repo, private=private, message=message))
