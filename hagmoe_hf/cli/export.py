"""The verb `hagmoe export`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..demo import read_corpus
from ..files import read_lines


def export(
    model: Annotated[str, typer.Argument(help="Local folder or Hub id of a mixture.")],
    out: Annotated[Path, typer.Argument(help="New folder for the mixture with its graphs.")],
    format: Annotated[Literal["onnx", "openvino"], typer.Option(help="Of the graph.")] = "onnx",
    int8: Annotated[bool, typer.Option("--int8", help="Write an int8 graph beside the float32 one.")] = False,
    reduce_range: Annotated[
        bool, typer.Option("--reduce-range", help="With --int8: weights of 7 bits, for x86 CPUs without VNNI.")
    ] = False,
    verify: Annotated[
        Path | None, typer.Option(help="File of real texts, one a line, to compare with torch; the demo's by default.")
    ] = None,
) -> None:
    """Write MODEL with an ONNX or OpenVINO graph, checked against torch. OUT appears whole, or not at all."""
    from ..export import export as export_library

    texts = read_corpus()[0] if verify is None else read_lines(verify)
    report = export_library(model, out, texts, format=format, int8=int8, reduce_range=reduce_range)
    for name, check in report.checks.items():
        print(
            f"{name}: {report.megabytes[name]} MB, {check.texts} texts against torch: "
            f"largest difference {check.largest_difference:.1e}, smallest cosine {check.smallest_cosine:.6f}"
        )
    if report.int8_share is not None:
        print(f"int8: {report.int8_share:.1%} of the weights but the embeddings")
    print(f"Written: {out}")
