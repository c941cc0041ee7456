"""Turn an embedding model into a reranker: a mixture with a classification head inside a stock CrossEncoder.

Prints: the mean reciprocal rank of the right article among 10 near ones, beside the embedding model that it came from,
before and after a short training; then one ranking.
Time: 1.8 min on one core.
"""

import argparse

from datasets import Dataset
from sentence_transformers import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments, SentenceTransformer
from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.sentence_transformer.evaluation import RerankingEvaluator
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hagmoe_hf import upcycle
from hagmoe_hf.demo import parent_folder
from hagmoe_hf.evaluation.kit import SHIPPED
from hagmoe_hf.training.router_callback import RouterCallback

PARENT = str(parent_folder())

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=50, help="optimizer steps of 16 pairs (default: %(default)s)")
options = parser.parse_args()

# The head is new, hence random: training has to teach it
mixture = upcycle(AutoModelForSequenceClassification.from_pretrained(PARENT, num_labels=1))
mixture.save_pretrained("reranker")
AutoTokenizer.from_pretrained(PARENT).save_pretrained("reranker")
model = CrossEncoder("reranker", max_length=64)

# Descriptions, each with its article and 9 of the articles that are near it
rows = Dataset.from_json(str(SHIPPED / "reranking/wiki_description_en/test.jsonl.gz"))
rows = [row | {"negative": row["negative"][:9]} for row in rows]
train, test = rows[:120], rows[120:]
pairs = [
    {"query": row["query"], "text": text, "label": float(text in row["positive"])}
    for row in train
    for text in row["positive"] * 3 + row["negative"]
]
embedder = RerankingEvaluator(test, at_k=10)(SentenceTransformer(PARENT))
print(f"MRR@10 of the embedding model:    {embedder['mrr@10']:.3f}")
evaluator = CrossEncoderRerankingEvaluator(test, at_k=10, show_progress_bar=False)
print(f"MRR@10 of the untrained reranker: {evaluator(model)['mrr@10']:.3f}")
arguments = CrossEncoderTrainingArguments(
    output_dir="reranker-run",
    max_steps=options.steps,
    per_device_train_batch_size=16,
    learning_rate=1e-4,
    save_strategy="no",
)
loss, data = BinaryCrossEntropyLoss(model), Dataset.from_list(pairs)
CrossEncoderTrainer(model, arguments, train_dataset=data, loss=loss, callbacks=[RouterCallback()]).train()
print(f"MRR@10 of the trained reranker:   {evaluator(model)['mrr@10']:.3f}")

query, candidates = test[0]["query"], test[0]["positive"] + test[0]["negative"]
print(f"\n{query} (number 0 is right)")
for hit in model.rank(query, candidates, top_k=3):
    print(f"  {hit['score']:.2f} number {hit['corpus_id']}: {candidates[hit['corpus_id']][:80]}")
