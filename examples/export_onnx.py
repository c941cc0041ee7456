"""Export a mixture as ONNX graphs, in float32 and int8, and encode with them through sentence-transformers.

Prints: size, speed and closeness to torch of both graphs.
Time: 1.9 min on one core.
"""

import time

import numpy as np
from sentence_transformers import SentenceTransformer

from hagmoe_hf import upcycle
from hagmoe_hf.demo import parent_folder, read_corpus
from hagmoe_hf.export import export, load

mixture = upcycle(SentenceTransformer(str(parent_folder()), device="cpu"))
texts = read_corpus()[0][::4]
report = export(mixture, "minilm-onnx", texts[:80], int8=True)  # refuses a float32 graph that differs from torch
models = {"torch": mixture} | {name: load("minilm-onnx", name) for name in report.megabytes}
expected = mixture.encode(texts)
for name, model in models.items():
    start = time.perf_counter()
    vectors = model.encode(texts)
    speed = len(texts) / (time.perf_counter() - start)
    cosine = (vectors * expected).sum(axis=1).min()  # this model's vectors have length 1
    difference = np.abs(vectors - expected).max()
    size = f", {report.megabytes[name]:.0f} MB" if name in report.megabytes else ""
    print(f"{name}{size}: {speed:.0f} texts/s, largest difference {difference:.1e}, smallest cosine {cosine:.4f}")
