"""Routing that nothing learns, in the place of every router: by a hash of the token, of the text, or by the true domain."""

import torch
from torch import Tensor, nn

from hagmoe_hf import HagMoeModel
from hagmoe_hf.routing_hagmoe import Routing, route

PRIME = 2_654_435_761  # Knuth's multiplicative hash: neighbouring ids part
CERTAIN = 1e4  # a logit that leaves nothing to the others

# Domains share the eight experts of the ceiling arm so that each has about the same number of steps.
EXPERT_OF_DOMAIN = {
    "biomedical": 0, "security": 0,
    "lexical": 1,
    "dictionary": 2, "encyclopedia": 2,
    "software": 3, "cooking": 3,
    "software-bitext": 4,
    "ui-bitext": 5,
    "code": 6, "python-docs": 6, "programming-docs": 6,
    "kernel-docs": 7, "sysadmin-docs": 7, "unix-manual": 7,
}  # fmt: skip
# What a set of the kit is about, in terms of the training domains.
DOMAIN_OF_SET = {
    "bitext.debian_ddtp": "software-bitext",
    "classification.debian_section": "software",
    "classification.uci_sentences": "encyclopedia",
    "classification.wiki_topic_en": "encyclopedia",
    "classification.wiki_topic_fr": "encyclopedia",
    "clustering.debian_section": "software",
    "clustering.wiki_topic_en": "encyclopedia",
    "pair_classification.go_synonym_vs_sibling": "biomedical",
    "reranking.faq_tech": "programming-docs",
    "reranking.wiki_description_en": "encyclopedia",
    "retrieval.arxiv_tags": "python-docs",
    "retrieval.debian_faq_xlingual": "sysadmin-docs",
    "retrieval.debian_packages": "software",
    "retrieval.faq_tech": "programming-docs",
    "retrieval.wiki_description_en": "encyclopedia",
    "retrieval.wiki_description_es": "encyclopedia",
    "sts.rg65_en_es": "lexical",
    "sts.simlex999": "lexical",
    "sts.wordsim353": "lexical",
}


class FixedRouter(nn.Module):
    """A router without parameters.

    Args:
        config: Of the mixture; one choice, over all experts.
        rule: "token hash", "text hash" or "domain".
    """

    def __init__(self, config, rule: str):
        super().__init__()
        self.config, self.rule = config, rule
        self.input_ids: Tensor | None = None  # (B, L), seen in every forward pass
        self.expert: Tensor | None = None  # (B,) of the texts' domains, for "domain"

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None, packing=None) -> Routing:
        """As `HagMoeRouter`: (B, L, D) states, or (1, T, D) of the real tokens alone; only their shape is used."""
        ids_BL, text_BL = self.input_ids, torch.arange(len(hidden_states), device=hidden_states.device)[:, None]
        if packing is not None:  # the encoder has left the padding out
            ids_BL, text_BL = ids_BL[ids_BL != self.config.pad_token_id].unsqueeze(0), packing.sequence_index
        text_BL = text_BL.expand(hidden_states.shape[:2])
        key_BL = ids_BL * PRIME % 2**32
        if token_mask is not None:
            key_BL = key_BL * token_mask
        if self.rule == "text hash":  # of the sum over its own tokens
            texts = key_BL.new_zeros(text_BL.shape.numel()).index_add(0, text_BL.flatten(), key_BL.flatten())
            key_BL = (texts * PRIME % 2**32)[text_BL]
        expert_BL = key_BL // 2**16 % self.config.num_experts
        if self.rule == "domain":
            expert_BL = self.expert[text_BL] if len(self.expert) > 1 else self.expert.expand(text_BL.shape)
        logits_BLE = CERTAIN * nn.functional.one_hot(expert_BL, self.config.num_experts).float()
        return route(
            None, logits_BLE, token_mask, topk_group=1, top_k=1, combine_rule="selection", dtype=hidden_states.dtype
        )


def fix_routing(encoder: HagMoeModel, rule: str) -> list[FixedRouter]:
    """Replace every router of a mixture.

    Returns:
        The new routers; for "domain" their `expert` must be set before a forward pass.
    """
    routers = []
    for layer in encoder.config.sparse_layers:
        block = encoder.layers[layer].mlp
        block.router = FixedRouter(encoder.config, rule)
        routers.append(block.router)

    def see(module: nn.Module, args: tuple) -> None:
        for router in routers:
            router.input_ids = args[0]

    # Not on the encoder itself: sentence-transformers calls its forward method past all hooks
    encoder.embeddings.word_embeddings.register_forward_pre_hook(see)
    return routers


def set_domain(encoder: HagMoeModel, domain: str) -> None:
    """Tell the routers by domain what the coming texts are; of no consequence for others."""
    expert = torch.tensor([EXPERT_OF_DOMAIN[domain]], device=encoder.device)
    for module in encoder.modules():
        if isinstance(module, FixedRouter):
            module.expert = expert
