"""Small inputs for the ablation's apparatus, and runs on them."""

import dataclasses
import math
from pathlib import Path

import pandas as pd
import pytest
from ablation import inputs, loop
from ablation.arms import TABLES, Arm
from ablation.budgets import Budget
from ablation.loop import Setting
from ablation.models import build
from ablation.routers import set_domain
from evaluation_helpers import shipped_rows, write_rows
from sentence_transformers import SentenceTransformer

from hagmoe_hf import sentence
from hagmoe_hf.demo import read_corpus

ARMS = {arm.name: arm for table_arms in TABLES.values() for arm in table_arms}
TINY_BUDGET = Budget("tiny", 8, 6, 16, (1e-3,), (0, 1), 10, 2, calibration_pairs=20)
# Arms of the tables, as far as three layers go
LAYERS = {"layer-3": [1], "layers-2-4": [0, 1], "layers-3-4-5": [1, 2], "layers-1-2-3-4": [0, 1, 2], "pairs-held": [1, 2]}


def fitted(arm: Arm) -> Arm:
    """The arm on a parent of three layers."""
    return dataclasses.replace(arm, upcycling={**arm.upcycling, "sparse_layers": LAYERS.get(arm.name, [0, 1])})


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, tiny_parent) -> Path:
    """Inputs of real texts in three domains, some of whose pairs repeat the kit."""
    folder = tmp_path_factory.mktemp("ablation")
    kit = folder / "kit"
    write_rows(kit / "sts/wordsim353/test.jsonl", shipped_rows("sts/wordsim353", "test")[:60])
    queries, corpus, qrels = (shipped_rows("retrieval/arxiv_tags", name) for name in ("queries", "corpus", "qrels"))
    asked = {row["_id"] for row in queries[:20]}
    write_rows(kit / "retrieval/arxiv_tags/queries.jsonl", queries[:20])
    write_rows(kit / "retrieval/arxiv_tags/corpus.jsonl", corpus)
    write_rows(kit / "retrieval/arxiv_tags/qrels.jsonl", [row for row in qrels if row["query-id"] in asked])
    texts, _ = read_corpus()
    halves = [(words[: len(words) // 2], words[len(words) // 2 :]) for words in map(str.split, texts) if len(words) > 3]
    rows = [
        {"domain": ("code", "lexical", "software")[i % 3], "anchor": " ".join(a), "positive": " ".join(b), "split": "train"}
        for i, (a, b) in enumerate(halves[:300])
    ]
    for row in rows[::8]:
        row["split"] = "dev"
    rows += [{"domain": "code", "anchor": row["text"], "positive": "leak", "split": "train"} for row in corpus[:3]]
    languages = ["xx" if row["domain"] == "lexical" and i % 5 else "en" for i, row in enumerate(rows)]
    pd.DataFrame(rows).assign(lang=languages).to_parquet(folder / "pairs.parquet")
    inputs.prepare(folder / "pairs.parquet", kit, tiny_parent, folder / "inputs", 24, None, seed=0)
    return folder / "inputs"


@pytest.fixture(scope="session")
def pairs(prepared) -> inputs.Pairs:
    return inputs.load_pairs(prepared, "train", TINY_BUDGET.max_length, "cpu")


@pytest.fixture(scope="session")
def dev(prepared) -> inputs.Pairs:
    return inputs.load_pairs(prepared, "dev", TINY_BUDGET.max_length, "cpu", TINY_BUDGET.dev_rows)


def setting(arm: Arm, folder: Path, **changes) -> Setting:
    return Setting(fitted(arm), dataclasses.replace(TINY_BUDGET, **changes), 1e-3, 0, folder, "cpu")


def trained(arm: Arm, prepared: Path, pairs, dev, work: Path, deadline: float = math.inf, **changes):
    texts = inputs.calibration_pairs(prepared, TINY_BUDGET)
    return loop.train(setting(arm, prepared, **changes), pairs, dev, texts, work, deadline)


def model_of(arm: Arm, folder: Path) -> SentenceTransformer:
    model = build(fitted(arm), folder / "parent", inputs.calibration_pairs(folder, TINY_BUDGET), 0, "cpu").eval()
    set_domain(sentence.encoder_of(model), "code")
    return model
