"""The verb `hagmoe analyze`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer


def analyze(
    model: Annotated[str, typer.Argument(help="Local folder or Hub id of a HAG-MoE.")],
    texts: Annotated[list[str], typer.Argument(help=".jsonl, .csv or .parquet files, or names for `datasets`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for report, pictures and trace; run again to resume.")],
    text_column: Annotated[
        str | None, typer.Option(help="Column of texts; `text`, or both of `anchor` and `positive`, by default.")
    ] = None,
    max_texts: Annotated[int | None, typer.Option(help="Take a random sample of so many.", min=1)] = None,
    parent: Annotated[str | None, typer.Option(help="The dense model it came from, to measure the drift.")] = None,
    checkpoint: Annotated[
        list[str] | None, typer.Option(help="An earlier state of the model; repeat it, in time, for saturation curves.")
    ] = None,
    importance: Annotated[
        str | None, typer.Option(help="A set of the kit, like sts/wordsim353, to score with each expert taken out.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Put before each text, like 'query: '.")] = None,
    batch_size: Annotated[int, typer.Option(help="Texts per forward pass.", min=1)] = 32,
    seed: Annotated[int, typer.Option(help="Seed of shuffles, samples and the map.", min=0, max=2**32 - 1)] = 0,
) -> None:
    """Look inside MODEL with TEXTS: what each expert learned, as one page with pictures, numbers behind them."""
    from ..analysis.report import analyze as analyze_library
    from ..analysis.texts import read_texts

    summary = analyze_library(
        model,
        read_texts(texts, text_column=text_column, max_texts=max_texts, seed=seed),
        out,
        parent=parent,
        checkpoints=checkpoint or (),
        importance_task=importance,
        batch_size=batch_size,
        prompt=prompt,
        seed=seed,
        show_progress_bar=True,
        command=shlex.join(["hagmoe", *sys.argv[1:]]),
    )
    for number, finding in enumerate(summary["findings"], start=1):
        print(f"{number}. {finding}")
    print(f"Written: {out}/report.html and report.json")
