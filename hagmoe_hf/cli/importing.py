"""The verb `hagmoe import-nomic-moe`."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from ..files import new_folder
from ..importing import COMPANIONS, import_nomic_moe, nomic_moe_folder


def import_nomic_moe_command(
    source: Annotated[str, typer.Argument(help="Local folder or Hub id of a nomic-embed-text-v2-moe checkpoint.")],
    out: Annotated[Path, typer.Argument(help="New folder for the mixture.")],
    allow_key_mismatch: Annotated[
        bool, typer.Option("--allow-key-mismatch", help="Go on where weights are missing or left over.")
    ] = False,
) -> None:
    """Make a HAG-MoE with the outputs of nomic-embed-text-v2-moe. OUT appears whole, or not at all."""
    nomic = nomic_moe_folder(source)
    with new_folder(out) as folder:
        import_nomic_moe(nomic, allow_key_mismatch).save_pretrained(folder)
        for name in COMPANIONS:
            if (nomic / name).is_file():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(nomic / name, folder / name)
    print(f"Written: {out}")
