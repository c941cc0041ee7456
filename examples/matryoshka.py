"""Fine-tune a mixture with the stock MatryoshkaLoss, so that the first numbers of a vector are a good vector themselves.

Prints: how many of 200 new descriptions find their encyclopedia article, by the size that vectors are cut to.
Time: 87 s on one core.
"""

import argparse

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from sentence_transformers.util import truncate_embeddings

from hagmoe_hf import upcycle
from hagmoe_hf.demo import parent_folder
from hagmoe_hf.evaluation.kit import SHIPPED
from hagmoe_hf.training.router_callback import RouterCallback

SIZES = [384, 128, 64, 32, 16]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=30, help="optimizer steps of 16 pairs (default: %(default)s)")
options = parser.parse_args()

folder = SHIPPED / "retrieval/wiki_description_en"
queries, corpus, relevant = (Dataset.from_json(str(folder / f"{name}.jsonl.gz")) for name in ("queries", "corpus", "qrels"))
texts = {row["_id"]: row["text"] for rows in (queries, corpus) for row in rows}
pairs = Dataset.from_list([{"anchor": texts[row["query-id"]], "positive": texts[row["corpus-id"]]} for row in relevant])
train, test = pairs.select(range(400)), pairs.select(range(400, 600))


def accuracies(model: SentenceTransformer) -> list[float]:
    """For each size: the share of new descriptions that are nearest to their own article."""
    anchors, positives = (model.encode(test[name], convert_to_tensor=True) for name in ("anchor", "positive"))
    scores = [model.similarity(truncate_embeddings(anchors, n), truncate_embeddings(positives, n)) for n in SIZES]
    return [sum(best == own for own, best in enumerate(score.argmax(1).tolist())) / len(test) for score in scores]


model = upcycle(SentenceTransformer(str(parent_folder())), calibration_texts=train["positive"][:100])
model.max_seq_length = 64  # tokens; for speed
before = accuracies(model)
arguments = SentenceTransformerTrainingArguments(
    output_dir="matryoshka-run",
    max_steps=options.steps,
    per_device_train_batch_size=16,
    learning_rate=5e-5,
    batch_sampler="no_duplicates",
    save_strategy="no",
)
loss = MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), matryoshka_dims=SIZES)
trainer = SentenceTransformerTrainer(model, arguments, train_dataset=train, loss=loss, callbacks=[RouterCallback()])
trainer.train()
print("numbers  before   after")
for size, *values in zip(SIZES, before, accuracies(model), strict=True):
    print(f"{size:>7}  {values[0]:6.1%}  {values[1]:6.1%}")
