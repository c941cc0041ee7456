"""Your own experts: register an implementation with transformers, and choose it by name as any other.

This one is the plainest there is: every expert computes every token, and the weights of the chosen ones decide.
Prints: how far its vectors are from those of the package's own experts, and the speed of each.
Time: 28 s on one core.
"""

import time

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hagmoe_hf import upcycle
from hagmoe_hf.demo import parent_folder, read_corpus


def every_expert(self: torch.nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """All experts on all tokens, for experts as BERT has them: two matrices with biases, no gate.

    Args:
        self: The module: `up_proj` (experts, inner, hidden), `down_proj` (experts, hidden, inner), their biases, `act_fn`.
        hidden_states: (tokens, hidden).
        top_k_index: (tokens, k), the experts that each token chose; `num_experts` stands for none, at padding.
        top_k_weights: (tokens, k).
    """
    inner = self.act_fn(torch.einsum("th,eih->tei", hidden_states, self.up_proj) + self.up_proj_bias)
    outputs = torch.einsum("tei,ehi->teh", inner, self.down_proj) + self.down_proj_bias
    weights = outputs.new_zeros(len(hidden_states), self.num_experts + 1).scatter(1, top_k_index, top_k_weights)
    return torch.einsum("te,teh->th", weights[:, :-1], outputs)


ALL_EXPERTS_FUNCTIONS.register("every_expert", every_expert)

mixture = upcycle(SentenceTransformer(str(parent_folder())))
with torch.no_grad():
    for name, parameter in mixture.named_parameters():
        if ".experts." in name:  # a fresh mixture's experts are equal, which would hide a token sent to the wrong one
            parameter.add_(torch.randn_like(parameter) * 0.02)
mixture.save_pretrained("noisy-mixture")
texts = read_corpus()[0][::6]
expected = SentenceTransformer("noisy-mixture").encode(texts)
for name in ("segmented_mm", "grouped_mm", "every_expert"):  # the package's own, transformers', this program's
    model = SentenceTransformer("noisy-mixture", model_kwargs={"experts_implementation": name})
    start = time.perf_counter()
    vectors = model.encode(texts)
    speed = len(texts) / (time.perf_counter() - start)
    print(f"{name:<12} largest difference {np.abs(vectors - expected).max():.1e}, {speed:.0f} texts/s")
