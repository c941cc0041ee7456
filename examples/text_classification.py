"""Classify sentences with a mixture: `AutoModelForSequenceClassification` and transformers' stock Trainer.

Prints: the accuracy on 600 sentences of reviews that were not trained on, beside always saying the more frequent label.
Time: 63 s on one core.
"""

import argparse

import numpy as np
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, pipeline

from hagmoe_hf import upcycle
from hagmoe_hf.demo import parent_folder
from hagmoe_hf.evaluation.kit import SHIPPED
from hagmoe_hf.training.router_callback import RouterCallback

LABELS = ["neg", "pos"]
FOLDER = SHIPPED / "classification/uci_sentences"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=50, help="optimizer steps of 32 sentences (default: %(default)s)")
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(parent_folder())
names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: label for label, name in enumerate(LABELS)}}
model = upcycle(AutoModelForSequenceClassification.from_pretrained(parent_folder(), num_labels=len(LABELS), **names))


def prepared(name: str, count: int) -> Dataset:
    """The first rows of one of the set's files, tokenized."""
    rows = Dataset.from_json(str(FOLDER / f"{name}.jsonl.gz")).select(range(count))
    tokens = rows.map(lambda row: tokenizer(row["text"], truncation=True) | {"labels": LABELS.index(row["label"])})
    return tokens.remove_columns(rows.column_names)


arguments = TrainingArguments(
    output_dir="sentiment-run",
    max_steps=options.steps,
    per_device_train_batch_size=32,
    per_device_eval_batch_size=32,
    learning_rate=1e-4,
    save_strategy="no",
)
train, test = prepared("train", 1200), prepared("test", 600)
trainer = Trainer(model, arguments, train_dataset=train, processing_class=tokenizer, callbacks=[RouterCallback()])
trainer.train()
logits, labels, _ = trainer.predict(test)
constant = np.bincount(labels).max() / len(labels)
print(f"accuracy {(logits.argmax(-1) == labels).mean():.3f}; always the more frequent label: {constant:.3f}")

trainer.save_model("sentiment")
classify = pipeline("text-classification", model="sentiment")  # stock classes find the mixture, as everywhere
for text in ("The battery died after two days.", "Would go there again any time."):
    print(text, "->", classify(text)[0])
