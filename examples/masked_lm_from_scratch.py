"""A mixture from nothing: a tokenizer trained on your texts, a small random HagMoeForMaskedLM, and the stock Trainer.

Prints: the held-out loss in nats per masked token, beside that of guessing by frequency, and what it puts in a blank.
Time: 2.0 min on one core.
"""

import argparse
from collections import Counter

import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments, pipeline

from hagmoe_hf import HagMoeConfig, HagMoeForMaskedLM
from hagmoe_hf.demo import parent_folder
from hagmoe_hf.evaluation.kit import SHIPPED
from hagmoe_hf.training.router_callback import RouterCallback

SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
LENGTH = 64  # tokens

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=200, help="optimizer steps of 32 texts (default: %(default)s)")
options = parser.parse_args()

texts = Dataset.from_json(str(SHIPPED / "retrieval/wiki_description_en/corpus.jsonl.gz"))["text"]
# The packaged tokenizer lends its normalisation and special tokens; the vocabulary is learned from the texts
tokenizer = AutoTokenizer.from_pretrained(parent_folder()).train_new_from_iterator(texts, vocab_size=4000)
tokens = Dataset.from_dict(tokenizer(list(texts), truncation=True, max_length=LENGTH, return_special_tokens_mask=True))
splits = tokens.train_test_split(test_size=200, seed=0)
ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
config = HagMoeConfig(**SIZES, **ids, max_position_embeddings=LENGTH, n_group=4, num_experts=8)
counts = config.parameter_counts()
print(f"{len(tokenizer)} tokens; {counts.total:,} parameters in the encoder, {counts.active:,} active per token")

arguments = TrainingArguments(
    output_dir="masked-lm-run",
    max_steps=options.steps,
    per_device_train_batch_size=32,
    per_device_eval_batch_size=32,
    learning_rate=2e-3,
    warmup_steps=0.1,
    save_strategy="no",
)
trainer = Trainer(
    HagMoeForMaskedLM(config),
    arguments,
    DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, seed=0),
    splits["train"],
    splits["test"],
    processing_class=tokenizer,
    callbacks=[RouterCallback()],
)
trainer.train()
seen = Counter(token for ids in splits["train"]["input_ids"] for token in ids[1:-1])
new = [seen[token] + 1 for ids in splits["test"]["input_ids"] for token in ids[1:-1]]
by_frequency = -np.log(np.array(new) / (sum(seen.values()) + len(tokenizer))).mean()
print(f"held-out loss {trainer.evaluate()['eval_loss']:.2f}; by frequency alone {by_frequency:.2f}")
trainer.save_model("masked-lm")
fill = pipeline("fill-mask", model="masked-lm")
for text in ("paris is the capital of [MASK].", "she was born in [MASK] york."):
    print(text, "->", ", ".join(f"{guess['token_str']} {guess['score']:.2f}" for guess in fill(text, top_k=3)))
