"""The verb `hagmoe serve`."""

from pathlib import Path
from typing import Annotated

import typer


def serve(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a SentenceTransformer, or FOLDER/onnx/model.onnx.")],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.", min=0, max=65535)] = 8000,
    workers: Annotated[int, typer.Option(help="Processes, each with the model; one that dies is replaced.", min=1)] = 1,
    name: Annotated[str | None, typer.Option(help="What requests call the model; its folder's name by default.")] = None,
    dimension: Annotated[list[int] | None, typer.Option(help="A shorter vector that may be asked for. Repeatable.")] = None,
    batch_texts: Annotated[int, typer.Option(help="Texts per forward pass, at most.", min=1)] = 32,
    max_bytes: Annotated[int, typer.Option(help="Of a request's body.", min=1)] = 1_000_000,
    max_texts: Annotated[int, typer.Option(help="Of a request.", min=1)] = 256,
    max_characters: Annotated[int, typer.Option(help="Of a text.", min=1)] = 20_000,
    max_waiting: Annotated[int, typer.Option(help="Texts accepted and not answered yet; more get a 429.", min=1)] = 2048,
) -> None:
    """Serve MODEL over HTTP: OpenAI's /v1/embeddings, with /health, /ready and /metrics."""
    from ..graphs import split_name
    from ..serving import Settings
    from ..serving import serve as serve_library

    serve_library(
        Settings(
            model=model,
            name=name or Path(split_name(model)[0]).name,
            dimensions=tuple(dimension or ()),
            batch_texts=batch_texts,
            request_bytes=max_bytes,
            texts=max_texts,
            characters=max_characters,
            waiting=max_waiting,
        ),
        host=host,
        port=port,
        workers=workers,
    )
