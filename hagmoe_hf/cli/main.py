"""The verbs of `hagmoe`. Each parses, calls the library once, and prints; nobody imports this."""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import typer
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from rich.text import Text
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel

from .. import demo as demo_room
from ..files import new_folder, read_lines
from ..translations import fit_translations
from ..upcycling import upcycle as upcycle_library
from . import evaluate as evaluate_verb
from .analyze import analyze
from .benchmark import benchmark
from .card import card
from .encode import encode
from .export import export
from .importing import import_nomic_moe_command
from .push import push
from .serve import serve
from .train import train

app = typer.Typer(
    help="HAG-MoE: turn a dense text encoder into a mixture of experts with the same vectors.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _layer_list(value: str) -> list[int]:
    if value == "none":
        return []
    try:
        return [int(layer) for layer in value.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{value!r} is not possible; allowed: layer numbers like 1,3,5, or none.") from None


def _items(path: Path) -> list[tuple[str, ...]]:
    """Texts that belong together, line by line."""
    return [tuple(line.split("\t")) for line in read_lines(path)]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"hagmoe_hf {version('hagmoe_hf')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """HAG-MoE: turn a dense text encoder into a mixture of experts with the same vectors."""


@app.command()
def upcycle(
    parent: Annotated[str, typer.Argument(help="Local folder or Hub id of a dense model.")],
    out: Annotated[Path, typer.Argument(help="New folder for the mixture.")],
    sparse_layers: Annotated[
        str | None,
        typer.Option(
            help="Layers that become mixtures, like 1,3, or none (for a memory alone); by default every second one but "
            "the last, or all with --preserved-texts."
        ),
    ] = None,
    n_group: Annotated[
        int | None,
        typer.Option(help="Expert groups; 1 for a plain token router; by default 4, or 2 with --preserved-texts."),
    ] = None,
    num_experts: Annotated[
        int | None,
        typer.Option(
            help="Routed experts per sparse layer, over all groups; by default 8, or with --preserved-texts as many "
            "in each group as a token passes."
        ),
    ] = None,
    num_experts_per_tok: Annotated[int, typer.Option(help="Routed experts that each token passes.")] = 1,
    topk_group: Annotated[int, typer.Option(help="Groups that stay open for a text.")] = 1,
    shared_expert_fraction: Annotated[
        float | None,
        typer.Option(help="Share of the neurons that every token passes; by default 0.5, or 0 with --preserved-texts."),
    ] = None,
    group_routing: Annotated[Literal["sequence", "token"], typer.Option(help="Who opens groups.")] = "sequence",
    group_input: Annotated[
        Literal["hidden_states", "word_embeddings"] | None,
        typer.Option(help="What a text's groups are chosen from; by default word embeddings with --preserved-texts."),
    ] = None,
    combine_rule: Annotated[Literal["selection", "normalized"], typer.Option(help="Weights of the experts.")] = "selection",
    calibration_texts: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 file from which the gates start: one text per line, or several that belong together, between tabs."
        ),
    ] = None,
    ngram_texts: Annotated[
        Path | None,
        typer.Option(help="UTF-8 file of all texts to train on, as above: their frequent n-grams get a memory."),
    ] = None,
    ngram_memory_size: Annotated[int, typer.Option(help="Most n-grams in that memory.", min=1)] = 65536,
    preserved_texts: Annotated[
        Path | None,
        typer.Option(help="UTF-8 file of texts, one per line, whose vectors are to stay while the mixture learns others."),
    ] = None,
    translations: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 file of texts, each with a tab and its translation: the memory starts where those texts start. "
            "Where --ngram-texts are not given, it is one of the translations' n-grams."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the new routers.", min=0, max=2**32 - 1)] = 0,
    allow_key_mismatch: Annotated[
        bool, typer.Option("--allow-key-mismatch", help="Go on where weights are missing or left over.")
    ] = False,
) -> None:
    """Make a HAG-MoE with its parent's vectors (but where --translations say others). OUT appears whole, or not at all."""
    pairs = None if translations is None else _items(translations)
    remembered = None if ngram_texts is None else _items(ngram_texts)
    if pairs is not None and remembered is None:
        remembered = [pair[1:] for pair in pairs]
    with new_folder(out) as folder:
        mixture = upcycle_library(
            parent,
            sparse_layers=None if sparse_layers is None else _layer_list(sparse_layers),
            n_group=n_group,
            num_experts=num_experts,
            num_experts_per_tok=num_experts_per_tok,
            topk_group=topk_group,
            shared_expert_fraction=shared_expert_fraction,
            group_routing=group_routing,
            group_input=group_input,
            combine_rule=combine_rule,
            calibration_texts=None if calibration_texts is None else _items(calibration_texts),
            ngram_texts=remembered,
            ngram_memory_size=ngram_memory_size,
            preserved_texts=None if preserved_texts is None else _items(preserved_texts),
            seed=seed,
            allow_key_mismatch=allow_key_mismatch,
        )
        tokenizer = None
        if isinstance(mixture, PreTrainedModel):  # a SentenceTransformer saves its own
            tokenizer = AutoTokenizer.from_pretrained(parent)
            tokenizer.save_pretrained(folder)
        fit = None if pairs is None else fit_translations(mixture, pairs, tokenizer=tokenizer)
        mixture.save_pretrained(str(folder))
        report = json.dumps(mixture.upcycling_report.to_dict(), indent=2)
        (folder / "upcycling_report.json").write_text(report + "\n", encoding="utf-8")
    print(mixture.upcycling_report)
    if fit is not None:
        print(fit)
    print(f"Written: {out}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="New folder for the demo's model and plot.")] = Path("hagmoe_demo"),
) -> None:
    """Upcycle a real packaged model offline, compare, search, look inside, save and reload."""
    difference = demo_room.run(out)
    if difference > demo_room.LARGEST_DIFFERENCE:
        raise typer.Exit(1)


app.command(cls=evaluate_verb.SpacedLists)(evaluate_verb.evaluate)
app.command()(analyze)
app.command()(benchmark)
app.command()(encode)
app.command()(card)
app.command()(export)
app.command()(push)
app.command()(serve)
app.command("import-nomic-moe")(import_nomic_moe_command)
app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(train)


def main() -> None:
    """Run `hagmoe`; what a user can mend ends in one line on stderr instead of a traceback."""
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError, StrictDataclassError, SafetensorError) as error:
        Console(stderr=True).print(Text.assemble(("error:", "bold red"), f" {error}"), soft_wrap=True)
        sys.exit(1)
