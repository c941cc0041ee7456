"""A learned sparse retriever: a mixture with a masked-LM head inside a stock SparseEncoder (SPLADE).

Prints: nDCG@10 on new descriptions, how many words of the vocabulary a text activates, and the words of one text.
all-MiniLM-L6-v2 comes without a masked-LM head, so this one starts random; for real use start from a masked LM.
Time: 2.5 min on one core.
"""

import argparse

from datasets import Dataset
from sentence_transformers import SparseEncoder, SparseEncoderTrainer, SparseEncoderTrainingArguments
from sentence_transformers.sparse_encoder.evaluation import SparseInformationRetrievalEvaluator
from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss
from sentence_transformers.sparse_encoder.modules import SpladePooling, Transformer
from transformers import AutoModelForMaskedLM, AutoTokenizer

from hagmoe_hf import upcycle
from hagmoe_hf.demo import parent_folder
from hagmoe_hf.evaluation.kit import SHIPPED
from hagmoe_hf.training.router_callback import RouterCallback

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=60, help="optimizer steps of 8 pairs (default: %(default)s)")
options = parser.parse_args()

upcycle(AutoModelForMaskedLM.from_pretrained(parent_folder())).save_pretrained("splade")
AutoTokenizer.from_pretrained(parent_folder()).save_pretrained("splade")
model = SparseEncoder(modules=[Transformer("splade", transformer_task="fill-mask", max_seq_length=48), SpladePooling("max")])

folder = SHIPPED / "retrieval/wiki_description_en"
queries, corpus, relevant = (Dataset.from_json(str(folder / f"{name}.jsonl.gz")) for name in ("queries", "corpus", "qrels"))
texts = {row["_id"]: row["text"] for rows in (queries, corpus) for row in rows}
pairs = Dataset.from_list([{"anchor": texts[row["query-id"]], "positive": texts[row["corpus-id"]]} for row in relevant])
train, test = pairs.select(range(500)), pairs.select(range(500, 600))
evaluator = SparseInformationRetrievalEvaluator(
    queries=dict(enumerate(test["anchor"])),
    corpus=dict(enumerate(test["positive"])),
    relevant_docs={row: {row} for row in range(len(test))},
    batch_size=16,
)
arguments = SparseEncoderTrainingArguments(
    output_dir="splade-run",
    max_steps=options.steps,
    per_device_train_batch_size=8,
    learning_rate=1e-4,
    learning_rate_mapping={r".*lm_head\..*": 2e-3},
    batch_sampler="no_duplicates",
    save_strategy="no",
)
ranking = SparseMultipleNegativesRankingLoss(model)
loss = SpladeLoss(model, ranking, query_regularizer_weight=5e-4, document_regularizer_weight=3e-4)
trainer = SparseEncoderTrainer(model, arguments, train_dataset=train, loss=loss, callbacks=[RouterCallback()])
for when, train_now in (("untrained", False), ("trained", True)):
    if train_now:
        trainer.train()
    scores = evaluator(model)
    active = f"{scores['query_active_dims']:.0f} words active in a query, {scores['corpus_active_dims']:.0f} in an article"
    print(f"{when}: nDCG@10 {scores['dot_ndcg@10']:.3f}; {active}")
words = model.decode(model.encode_query(test[0]["anchor"]), top_k=8)
print(f"{test[0]['anchor']} ->", ", ".join(f"{word} {weight:.2f}" for word, weight in words))
