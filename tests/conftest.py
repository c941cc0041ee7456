"""What the tests share: tiny models whose weights are spread wide enough to matter, and the real parent."""

import json
import os
import random
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import numpy as np
import pytest
import torch
from ablation_helpers import dev, pairs, prepared  # noqa: F401  # fixtures, here for more than one file
from sentence_transformers import SentenceTransformer, models
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedModel

from hagmoe_hf import HagMoeConfig, upcycle
from hagmoe_hf.demo import parent_folder, read_corpus
from hagmoe_hf.sentence import encoder_of

TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

# Every way of routing that the configuration knows
MODES = {
    "groups by sequence": {},
    "groups by token": {"group_routing": "token"},
    "groups by word embeddings": {"group_input": "word_embeddings"},
    "two open groups": {"topk_group": 2},
    "flat token router": {"n_group": 1},
    "sequence router": {"n_group": 8},
    "token router, one expert per group": {"n_group": 8, "group_routing": "token"},
    "two experts, selection": {"num_experts_per_tok": 2},
    "two experts, normalized": {"n_group": 1, "num_experts_per_tok": 2, "combine_rule": "normalized"},
    "three experts over two groups": {"num_experts_per_tok": 3, "topk_group": 2, "combine_rule": "normalized"},
    "sequence router, two groups": {"n_group": 8, "topk_group": 2, "num_experts_per_tok": 2},
}


# The shape of each family, on top of TINY
SHAPES = {
    "bert": {},
    "roberta": {"position_offset": 2, "pad_token_id": 1, "type_vocab_size": 1},
    "modernbert": {
        "type_vocab_size": 0,
        "position_embedding_type": "rope",
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "sliding_window": 3,
        "norm_placement": "pre",
        "gated_mlp": True,
        "attention_bias": False,
        "mlp_bias": False,
        "norm_bias": False,
        "classifier_head": "transform",
        "classifier_pooling": "mean",
        "classifier_bias": False,
    },
    "nomic_bert": {
        "position_embedding_type": "rope",
        "gated_mlp": True,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
    },
}


def tiny_config(**changes) -> HagMoeConfig:
    return HagMoeConfig(**{**TINY, **changes})


def spread(model: PreTrainedModel, scale: float = 0.3, seed: int = 0) -> PreTrainedModel:
    """Give every parameter values wide enough that a misplaced one shows, and different for every expert."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name.lower() and name.endswith("weight") else scale * noise)
    return model.eval()


def route_hard(model: PreTrainedModel, scale: float = 100.0) -> PreTrainedModel:
    """Make routers decide far from their small initial values: probabilities near 0 and 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".router." in name:
                parameter.mul_(scale)
    return model


# The same examples every time: what fails, fails by the change, and not by chance
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """Every test draws the same numbers, whichever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def tiny_bert_config() -> BertConfig:
    return BertConfig(**TINY)


@pytest.fixture(scope="session")
def real_parent() -> SentenceTransformer:
    return SentenceTransformer(str(parent_folder()), device="cpu")


@pytest.fixture(scope="session")
def real_mixture(real_parent) -> SentenceTransformer:
    return upcycle(real_parent)


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    texts, _ = read_corpus()
    return texts


@pytest.fixture(scope="session")
def tiny_parent(tmp_path_factory, corpus) -> Path:
    """The folder of a dense SentenceTransformer of a few thousand weights, whose tokenizer knows the corpus."""
    from hagmoe_hf.training.mlm import train_tokenizer

    encoder, folder = (tmp_path_factory.mktemp(name) for name in ("encoder", "parent"))
    tokenizer = train_tokenizer(corpus, vocab_size=500)
    tokenizer.model_max_length = TINY["max_position_embeddings"]
    tokenizer.save_pretrained(encoder)
    torch.manual_seed(0)
    BertModel(BertConfig(**{**TINY, "vocab_size": len(tokenizer)})).save_pretrained(encoder)
    SentenceTransformer(str(encoder), device="cpu").save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def exported(tiny_parent, corpus, tmp_path_factory):
    """(mixture, folder, report) of an export with int8; all experts of the mixture differ."""
    from hagmoe_hf.export import export

    mixture, folder = upcycle(str(tiny_parent)), tmp_path_factory.mktemp("exported") / "mixture"
    spread(encoder_of(mixture), scale=0.2)
    return mixture, folder, export(mixture, folder, corpus[:60], int8=True)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny random parent, upcycled, with the real tokenizer, as a SentenceTransformer folder."""
    folder = tmp_path_factory.mktemp("tiny")
    parent = spread(BertModel(BertConfig(**{**TINY, "vocab_size": 30522, **NO_DROPOUT})), scale=0.2)
    upcycle(parent, sparse_layers=[0, 2]).save_pretrained(folder / "encoder")
    AutoTokenizer.from_pretrained(parent_folder()).save_pretrained(folder / "encoder")
    transformer = models.Transformer(str(folder / "encoder"))
    transformer.max_seq_length = 24
    SentenceTransformer(modules=[transformer, models.Pooling(32)], device="cpu").save_pretrained(str(folder / "model"))
    return folder / "model"


@pytest.fixture
def tiny(tiny_folder):
    return SentenceTransformer(str(tiny_folder), device="cpu")


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory, corpus) -> Path:
    """Halves of real texts as pairs, with a label that says whether they belong together, in three domains."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    halves = [(words[: len(words) // 2], words[len(words) // 2 :]) for words in map(str.split, corpus) if len(words) > 3]
    with path.open("w", encoding="utf-8") as file:
        for row, (first, second) in enumerate(halves[:240]):
            other = second if row % 2 else halves[row - 1][1]
            anchor, positive, negative = " ".join(first), " ".join(second), " ".join(halves[row - 1][1])
            texts = {"anchor": anchor, "positive": positive, "negative": negative}
            scored = {"sentence1": anchor, "sentence2": " ".join(other), "label": row % 2}
            domain = ("docs", "code", "words")[min(row // 120 + row % 2, 2)]
            file.write(json.dumps({"domain": domain, **texts, **scored}) + "\n")
    return path
