"""The verb `hagmoe evaluate`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

_SPACED = ("--against", "--tasks")  # options that take several values, as in --tasks STSBenchmark NFCorpus


class SpacedLists(TyperCommand):
    """A command whose list options may be written as `--tasks A B` instead of `--tasks A --tasks B`."""

    def parse_args(self, ctx, args):
        """Repeat the option before each of its values, then parse as usual."""
        spread: list[str] = []
        option = ""
        for word, following in zip(args, [*args[1:], "-"], strict=True):
            if word.startswith("-"):
                option = word if word in _SPACED else ""
                if option and following.startswith("-"):
                    raise typer.BadParameter("no value is not possible; allowed: one or more.", ctx, param_hint=f"'{word}'")
                spread += [] if option else [word]
            else:
                spread += [option, word] if option else [word]
        return super().parse_args(ctx, spread)


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder, Hub id, or FOLDER/onnx/model.onnx; comes before the options.")],
    against: Annotated[
        list[str] | None, typer.Option(help="Models to compare with, or bm25; differences are to the first.")
    ] = None,
    kit: Annotated[Path | None, typer.Option(help="Folder of local sets KIND/SET; the one that ships by default.")] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="Sets of the kit (KIND/SET or KIND), or mteb's names when online.")
    ] = None,
    benchmark: Annotated[str | None, typer.Option(help="A benchmark of mteb, like 'MTEB(eng, v2)', when online.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for scores and report; run again to resume.")] = Path(
        "hagmoe_evaluation"
    ),
    batch_size: Annotated[int, typer.Option(help="Texts per forward pass.", min=1)] = 32,
) -> None:
    """Score MODEL with stock MTEB, offline on the kit, and say whether it is better than others."""
    from ..evaluation.command import evaluate as evaluate_library
    from ..evaluation.kit import SHIPPED
    from ..evaluation.report import markdown, to_dict

    report = evaluate_library(
        model,
        against or (),
        output=out,
        kit=kit or SHIPPED,
        tasks=tasks or (),
        benchmark=benchmark,
        batch_size=batch_size,
        show_progress_bar=True,
        command=shlex.join(["hagmoe", *sys.argv[1:]]),
    )
    print(markdown(to_dict(report)))
    print(f"Written: {out}/report.json, report.md and report.png")
