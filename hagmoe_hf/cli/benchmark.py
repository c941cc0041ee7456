"""The verb `hagmoe benchmark`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer


def benchmark(
    parent: Annotated[str, typer.Argument(help="Folder of the dense SentenceTransformer.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the report; run again to resume.")] = Path(
        "hagmoe_benchmark"
    ),
    mixture: Annotated[Path | None, typer.Option(help="Folder of a mixture of it; the parent upcycled by default.")] = None,
    onnx: Annotated[
        list[str] | None, typer.Option(help="An exported model to time as well: FOLDER/onnx/FILE.onnx. Repeatable.")
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(help=".jsonl, .csv or .parquet with 256 or more in a column `text`; the packaged corpus by default."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed calls per contestant; queries take ten times as many.", min=1)] = 9,
    threads: Annotated[int | None, typer.Option(help="Threads for torch; one per core by default.", min=1)] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Vary experts, groups, length and batch instead: sweep.json, .md and .png.")
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Only say where the mixture's time goes: profile.json, trace.json.")
    ] = False,
) -> None:
    """Time a mixture beside its PARENT, stock experts and nomic-embed-text-v2-moe's design, in turn."""
    from ..benchmark import sweeps
    from ..benchmark.command import benchmark as benchmark_library
    from ..benchmark.command import profile_mixture
    from ..benchmark.contestants import exported
    from ..benchmark.report import markdown

    lines = None if texts is None else _read(texts)
    if profile:
        profile_mixture(parent, out, mixture=mixture, texts=lines, threads=threads)
        print(f"Written: {out}/profile/profile.json, trace.json (open it in ui.perfetto.dev)")
        return
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    if sweep:
        print(sweeps.markdown(sweeps.sweep(parent, out, texts=lines, rounds=rounds, threads=threads, command=command)))
        print(f"Written: {out}/sweep.json, sweep.md and sweep.png")
        return
    report = benchmark_library(
        parent,
        out,
        mixture=mixture,
        others=[exported(Path(file)) for file in onnx or ()],
        texts=lines,
        rounds=rounds,
        threads=threads,
        command=command,
    )
    print(markdown(report))
    print(f"Written: {out}/benchmark.json, benchmark.md and benchmark.png")


def _read(path: Path) -> tuple[str, ...]:
    from ..analysis.texts import read_texts

    if not path.is_file():
        raise FileNotFoundError(f"texts={path} is not there; allowed: an existing file.")
    found = read_texts([str(path)], text_column="text")
    for reason, count in found.skipped.items():
        print(f"{path}: skipped {count}: {reason}")
    return found.texts
