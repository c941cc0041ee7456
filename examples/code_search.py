"""Find functions by what they do: fine-tune a mixture on some modules of Python's library, search in others.

Prints: mean reciprocal rank of a function by the first line of its docstring, before and after, and some searches.
The functions are those of the Python that runs this, so figures differ a little between versions.
Time: 91 s on one core.
"""

import argparse
import ast
import importlib
import inspect
import re

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.util import semantic_search

from hagmoe_hf import upcycle
from hagmoe_hf.demo import parent_folder
from hagmoe_hf.training.router_callback import RouterCallback

TRAINED = "argparse asyncio.base_events calendar difflib email.utils inspect ipaddress os pathlib random statistics tarfile"
SEARCHED = "bisect collections datetime fractions heapq shutil tempfile textwrap urllib.parse uuid zipfile"
QUESTIONS = ["delete a folder and everything in it", "the smallest items of a list", "wrap long lines"]


def functions(modules: str) -> Dataset:
    """Functions as (first line of the docstring, code without docstring)."""
    trees = [ast.parse(inspect.getsource(importlib.import_module(module))) for module in modules.split()]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and len(node.body) > 1]
    documented = [(doc, node) for node in nodes if (doc := ast.get_docstring(node))]
    for _, node in documented:
        del node.body[0]
    return Dataset.from_list([{"anchor": doc.split("\n")[0], "positive": ast.unparse(node)} for doc, node in documented])


def reciprocal_rank(model: SentenceTransformer, rows: Dataset) -> float:
    """Mean of 1 / rank of each docstring's own function among all of them."""
    scores = model.similarity(model.encode_query(rows["anchor"]), model.encode_document(rows["positive"]))
    return float((1 / (scores >= scores.diagonal().unsqueeze(1)).sum(1)).mean())


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=25, help="optimizer steps of 16 functions (default: %(default)s)")
options = parser.parse_args()

train, test = functions(TRAINED), functions(SEARCHED)
model = upcycle(SentenceTransformer(str(parent_folder())), calibration_texts=train["positive"][:100])
model.max_seq_length = 64  # tokens; for speed
print(f"{len(train)} functions to train on, {len(test)} to search in; MRR before: {reciprocal_rank(model, test):.3f}")
arguments = SentenceTransformerTrainingArguments(
    output_dir="code-search-run",
    max_steps=options.steps,
    per_device_train_batch_size=16,
    learning_rate=5e-5,
    batch_sampler="no_duplicates",
    save_strategy="no",
)
loss = MultipleNegativesRankingLoss(model)
SentenceTransformerTrainer(model, arguments, train_dataset=train, loss=loss, callbacks=[RouterCallback()]).train()
print(f"MRR after: {reciprocal_rank(model, test):.3f}")
found = semantic_search(model.encode_query(QUESTIONS), model.encode_document(test["positive"]), top_k=3)
for question, hits in zip(QUESTIONS, found, strict=True):
    print(question, "->", *(re.search(r"def (\w+)", test[hit["corpus_id"]]["positive"])[1] for hit in hits))
