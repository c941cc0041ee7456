"""Force a router to send each language to a group of its own, and see which statistics notice.

    python scripts/planted_languages.py docs/results/planted-languages.json

Upcycles all-MiniLM-L6-v2 with one group per language, solves for the group gates that send every text of the kit's Wikipedia
sets to its language's group, and measures. Labels drawn at random stand beside the languages: nothing may be seen in them.
"""

import argparse
import json
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from hagmoe_hf import upcycle
from hagmoe_hf.analysis.probes import sparse_blocks
from hagmoe_hf.analysis.summary import findings, summarize
from hagmoe_hf.analysis.texts import Texts, label_ids
from hagmoe_hf.analysis.trace import record, sparse_encoder
from hagmoe_hf.demo import parent_folder
from hagmoe_hf.evaluation.kit import SHIPPED, find_sets
from hagmoe_hf.files import write_text
from hagmoe_hf.routing_hagmoe import attention_pool

SETS = {"en": ("classification/wiki_topic_en", "test"), "fr": ("classification/wiki_topic_fr", "test")}
SETS["es"] = ("retrieval/wiki_description_es", "corpus")
PER_LANGUAGE = 100
MARGIN = 20.0  # logit of a text's own group; the others' is 0


@torch.inference_mode()
def plant(model: SentenceTransformer, texts: Texts) -> None:
    """Set the group gates so that each text opens the group with the number of its language."""
    _, language_N = label_ids(texts.languages)
    encoder = sparse_encoder(model)
    for _, block in sparse_blocks(encoder):
        # Experts are still copies, so what one layer chooses does not move the next one's states
        summaries: list[torch.Tensor] = []

        def see(router, inputs, summaries=summaries):
            summaries.append(attention_pool(inputs[0].float(), router.attention_query, None)[0])

        hook = block.router.register_forward_pre_hook(see)
        for text in texts.texts:
            encoder(input_ids=model.preprocess([text])["input_ids"])
        hook.remove()
        wanted = MARGIN * np.eye(encoder.config.n_group)[language_N]
        gate, *_ = np.linalg.lstsq(torch.stack(summaries).double().numpy(), wanted, rcond=None)
        block.router.group_gate.weight.copy_(torch.from_numpy(gate.T))


def measure(model: SentenceTransformer, texts: Texts) -> dict:
    """What every statistic that claims to see languages says, in every sparse layer."""
    summary = summarize(record(model, texts))
    off_diagonal = ~np.eye(len(set(texts.languages)), dtype=bool)
    layers = []
    for row, layer in enumerate(summary["layers"]):
        information = layer["information"]
        layers.append(
            {
                "layer": layer["layer"],
                "I(group;language)": information["group;language"],
                "I(expert;language)": information["expert;language"],
                "I(group;random label)": information["group;domain"],
                "smallest divergence of two languages": float(
                    np.array(summary["labels"]["language"]["divergence"][row])[off_diagonal].min()
                ),
                "largest specialization": float(np.max(summary["labels"]["language"]["specialization"][row])),
                "same group: pairs of one language, others": [
                    layer["pairs"]["with_positive"],
                    layer["pairs"]["with_negatives"],
                ],
                "two tokens share an expert: of one text, of any": [
                    layer["consistency"]["within"],
                    layer["consistency"]["over_all"],
                ],
            }
        )
    summary["cka"] = None
    return {"layers": layers, "neighbours": summary["neighbours"], "finding": findings(summary)[2]}


def main() -> None:
    """Plant, measure before and after, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    sets = {kit_set.key: kit_set for kit_set in find_sets(SHIPPED)}
    found, languages = [], []
    for language, (key, file) in SETS.items():
        rows = sets[key].read()[file][:PER_LANGUAGE]
        found += [row["text"] for row in rows]
        languages += [language] * len(rows)
    random = np.random.default_rng(0).integers(0, 3, size=len(found))
    pairs = np.arange(len(found)).reshape(-1, 2)  # texts of one language
    texts = Texts(tuple(found), tuple(f"random {label}" for label in random), tuple(languages), pairs)
    model = upcycle(SentenceTransformer(str(parent_folder()), device="cpu"), n_group=len(SETS), num_experts=2 * len(SETS))
    model.max_seq_length = 64
    before = measure(model, texts)
    plant(model, texts)
    result = {
        "command": f"python scripts/planted_languages.py {output}",
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "transformers", "sentence-transformers")},
        "texts": len(found),
        "fresh": before,
        "planted": measure(model, texts),
    }
    write_text(output, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
