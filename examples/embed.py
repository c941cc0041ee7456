"""Upcycle a dense embedding model, save the mixture, and use it from its folder as any other SentenceTransformer.

Prints: how many parameters it has, how far its vectors are from its parent's, and the similarities of four texts.
Time: 14 s on one core.
"""

import numpy as np
from sentence_transformers import SentenceTransformer

from hagmoe_hf import upcycle
from hagmoe_hf.demo import parent_folder

TEXTS = [
    "How do I free the disk space of deleted rows?",
    "VACUUM reclaims storage occupied by dead tuples.",
    "Soak the lentils, then simmer them with cumin.",
    "A recipe for lentil soup",
]

parent = SentenceTransformer(str(parent_folder()))  # all-MiniLM-L6-v2; a Hub id or your own folder works as well
mixture = upcycle(parent)
report = mixture.upcycling_report
print(f"{report.parent_parameters:,} parameters became {report.total_parameters:,}, {report.active_parameters:,} per token")
mixture.save_pretrained("minilm-mixture")

# In another process this line needs `import hagmoe_hf` before it, once, and nothing else
model = SentenceTransformer("minilm-mixture")
vectors = model.encode(TEXTS)
print(f"\n{len(TEXTS)} vectors of {vectors.shape[1]} numbers")
print(f"largest difference from the parent's: {np.abs(vectors - parent.encode(TEXTS)).max():.1e}")

print("\nsimilarities:")
for text, row in zip(TEXTS, model.similarity(vectors, vectors).tolist(), strict=True):
    print("  ", *(f"{value:5.2f}" for value in row), "", text)
