"""The verb `hagmoe encode`."""

from pathlib import Path
from typing import Annotated

import typer

from ..bulk import SHARD_ROWS


def encode(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a SentenceTransformer, or FOLDER/onnx/model.onnx.")],
    sources: Annotated[list[str], typer.Argument(help=".parquet, .jsonl or .csv files, or folders of them.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the shards; run again to resume.")],
    column: Annotated[str, typer.Option(help="Of the texts.")] = "text",
    id_column: Annotated[str | None, typer.Option(help="Copied beside the vectors, as text.")] = None,
    shard_rows: Annotated[
        int, typer.Option(help="Rows of a shard: what a killed process loses at most.", min=1)
    ] = SHARD_ROWS,
    batch_size: Annotated[int, typer.Option(help="Texts per forward pass.", min=1)] = 32,
    prompt: Annotated[str | None, typer.Option(help="Put before each text, like 'passage: '.")] = None,
    max_seq_length: Annotated[int | None, typer.Option(help="Cut texts after so many tokens.", min=1)] = None,
) -> None:
    """Encode a corpus that does not fit in memory with MODEL, to parquet; a killed run goes on where it stopped."""
    from accelerate import PartialState

    from ..bulk import encode as encode_library

    report = encode_library(
        model,
        sources,
        out,
        column=column,
        id_column=id_column,
        shard_rows=shard_rows,
        batch_size=batch_size,
        prompt=prompt,
        max_seq_length=max_seq_length,
        show_progress_bar=True,
    )
    PartialState().print(f"{report}\nWritten: {out}/shards")  # one process reports
    PartialState().destroy_process_group()  # one that is alive at a rank's exit may abort it, its work done
