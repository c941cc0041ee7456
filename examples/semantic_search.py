"""Search real texts by meaning with a mixture, through the stock `semantic_search`.

Prints: for each question the best three of the demo corpus's texts, in whatever words and language they are.
Time: 29 s on one core.
"""

from sentence_transformers import SentenceTransformer
from sentence_transformers.util import semantic_search

from hagmoe_hf import upcycle
from hagmoe_hf.demo import parent_folder, read_corpus

QUESTIONS = [
    "free the disk space of deleted rows in a database",
    "run a function in the background without blocking",
    "enzyme that transfers a methyl group",
    "a hacker's word for something hopelessly complicated",
    "comment configurer un hôte virtuel",
]

model = upcycle(SentenceTransformer(str(parent_folder())))
texts, domains = read_corpus()
corpus = model.encode_document(texts, convert_to_tensor=True, show_progress_bar=True)
print(f"{len(texts)} texts of {len(set(domains))} domains")

questions = model.encode_query(QUESTIONS, convert_to_tensor=True)
for question, hits in zip(QUESTIONS, semantic_search(questions, corpus, top_k=3), strict=True):
    print(f"\n{question}")
    for hit in hits:
        row = hit["corpus_id"]
        print(f"  {hit['score']:.2f} [{domains[row]}] {' '.join(texts[row].split())[:90]}")
