"""Routing that nothing learns, in the place of every router: by a hash of the token, of the text, by domain, by subject."""

from typing import cast

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from hagmoe_hf import HagMoeModel, sentence
from hagmoe_hf.calibration import _choose, _gate
from hagmoe_hf.routing_hagmoe import Routing, attention_pool, attention_pool_packed, route

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
        rule: "token hash", "text hash", "domain" or "subject".
    """

    def __init__(self, config, rule: str):
        super().__init__()
        self.config, self.rule = config, rule
        self.input_ids: Tensor | None = None  # (B, L), seen in every forward pass
        self.expert: Tensor | None = None  # (B,) of the texts' domains, for "domain"
        if rule == "subject":
            self.register_buffer("keys", torch.zeros(config.num_experts, config.hidden_size))
            self.register_buffer("bias", torch.zeros(config.num_experts))
        self.embedded: Tensor | None = None  # (B, L, D), seen in every forward pass

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None, packing=None, group_states=None) -> Routing:
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
        elif self.rule == "subject":
            with torch.autocast(hidden_states.device.type, enabled=False):  # the same while training and after
                expert_BL = _choose(self.mean_embeddings(token_mask, packing), self.keys, self.bias)[text_BL]
        logits_BLE = CERTAIN * nn.functional.one_hot(expert_BL, self.config.num_experts).float()
        return route(
            None, logits_BLE, token_mask, topk_group=1, top_k=1, combine_rule="selection", dtype=hidden_states.dtype
        )

    def mean_embeddings(self, token_mask: Tensor | None, packing=None) -> Tensor:
        """(B, D) mean of the embeddings of every text's real tokens: what it is about, before any layer that learns."""
        embedded, query = cast(Tensor, self.embedded), cast(Tensor, self.embedded).new_zeros(self.config.hidden_size)
        if packing is None:
            return attention_pool(embedded, query, token_mask)
        return attention_pool_packed(embedded, query, packing)[0][packing.starts()]


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

    def see_embedded(module: nn.Module, args: tuple, embedded_BLD: Tensor) -> None:
        for router in routers:
            router.embedded = embedded_BLD.detach().float()

    # Not on the encoder itself: sentence-transformers calls its forward method past all hooks
    encoder.embeddings.word_embeddings.register_forward_pre_hook(see)
    encoder.embeddings.register_forward_hook(see_embedded)
    return routers


@torch.no_grad()
def start_subjects(model: SentenceTransformer, pairs: list[tuple[str, str]], seed: int) -> None:
    """Let every router by subject take clusters of what the texts of pairs share in their embeddings."""
    encoder = sentence.encoder_of(model)
    routers = [module for module in encoder.modules() if isinstance(module, FixedRouter)]
    pooled: list[Tensor] = []
    handle = routers[0].register_forward_hook(lambda router, args, _: pooled.append(router.mean_embeddings(*args[1:3])))
    tokens: list[Tensor] = []
    for first in range(0, len(pairs), 32):
        texts = [text for pair in pairs[first : first + 32] for text in pair]
        features = model.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(encoder.device)
        encoder(input_ids=features["input_ids"], attention_mask=features["attention_mask"])
        tokens.append(features["attention_mask"].sum(1).float())
    handle.remove()
    item_N = torch.arange(len(pairs)).repeat_interleave(2)
    generator = torch.Generator().manual_seed(seed)
    keys_ED, bias_E = _gate(torch.cat(pooled).cpu(), torch.cat(tokens).cpu(), len(routers[0].bias), generator, item_N)
    for router in routers:
        router.keys.copy_(keys_ED)
        router.bias.copy_(bias_E)


def set_domain(encoder: HagMoeModel, domain: str) -> None:
    """Tell the routers by domain what the coming texts are; of no consequence for others."""
    expert = torch.tensor([EXPERT_OF_DOMAIN[domain]], device=encoder.device)
    for module in encoder.modules():
        if isinstance(module, FixedRouter):
            module.expert = expert
