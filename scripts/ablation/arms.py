"""What is compared, as data. An arm is trained as every other, but for what its entry says."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Arm:
    """One line of a table.

    Attributes:
        name: Of its files and in tables.
        about: What it is, and what it is for.
        kind: "dense", "wide" (dense with the default mixture's total parameters) or "mixture".
        upcycling: Options of `hagmoe_hf.upcycle`.
        calibrated: Whether the gates start from texts.
        paired: Whether they start from what the texts of pairs share.
        routing: "learned", or what replaces every router: "token hash", "text hash", "domain", or "subject", where a text's
            expert in all layers is that of its mean embedding, which no training moves.
        mean_pooled: Whether the attention gate's query stays 0, so that it takes the mean.
        balancing: Arguments of `RouterCallback`; None for no balancing.
        shared_rate: Factor on the learning rate of all that is neither expert nor router; 0 keeps it as the parent's.
        expert_rate: Factor on the learning rate of the routed experts.
        router_rate: Factor on the learning rate of the routers.
        embedding_rate: Factor on the learning rate of the word embeddings, which stay where it is 0; for dense arms.
        shared_gradient: Part of the sum over all experts' gradients in each expert's, from 0 to 1, where they stay equal.
        frozen_gates: Share of the steps in which the routers stay as they are.
        branches: Whether it goes on from the dense parent's run, where its budget follows another: upcycled after that.
        dense_share: Share of the steps that train the dense parent, before it is upcycled.
        average: Decay of the weights' moving average, which is what is evaluated at the end; 0 for none.
        interpolated: Part of the way from where they started at which the weights are left after training, but for the
            memory's (WiSE-FT, arXiv 2109.01903); 1 for all of it.
        distillation: Weight of the parent's similarities in the loss.
        mixed_batches: Whether a batch holds pairs of all domains, instead of one.
        memory: Most n-grams of the training pairs in an n-gram memory; 0 for none.
        memory_order: Tokens of the longest of them.
        memory_scale: How many times as fast as the learning rate the memory learns.
        memory_rate: Factor on the memory's learning rate, beside that; its rows stay as they start where it is 0.
        fitted: Whether the memory starts from translations, by least squares.
        words: Whether it knows those of dictionaries, and starts from their translations, too; nothing is trained on them.
        trains_on_words: Whether it is trained on dictionaries' pairs, as one more domain of translations, in as many steps.
        preserved: Language whose texts have a group of their own, and none of whose n-grams are in the memory; "" for none.
        every_text: Whether its group is started from all texts for calibration, instead of every third.
        translations_tell: Whether translations and dictionaries alone tell what is in that language, as for `hagmoe train`
            without `preserve_where`; otherwise every text's language is known.
        all_learn: Whether more learns than the memory and the other groups' experts, where a language is preserved.
        still_experts: Whether the experts of that language stay nevertheless.
        preserved_rate: Factor on their learning rate, beside `expert_rate`, where they do not.
    """

    name: str
    about: str
    kind: str = "mixture"
    upcycling: Mapping[str, Any] = field(default_factory=dict)
    calibrated: bool = False
    paired: bool = False
    routing: str = "learned"
    mean_pooled: bool = False
    balancing: Mapping[str, float] | None = field(default_factory=dict)
    shared_rate: float = 1.0
    expert_rate: float = 1.0
    router_rate: float = 1.0
    embedding_rate: float = 0.0
    shared_gradient: float = 0.0
    frozen_gates: float = 0.0
    branches: bool = False
    dense_share: float = 0.0
    average: float = 0.0
    interpolated: float = 1.0
    distillation: float = 0.0
    mixed_batches: bool = False
    memory: int = 0
    memory_order: int = 4
    memory_scale: float = 100.0
    memory_rate: float = 1.0
    fitted: bool = False
    words: bool = False
    trains_on_words: bool = False
    preserved: str = ""
    every_text: bool = False
    translations_tell: bool = False
    all_learn: bool = False
    still_experts: bool = False
    preserved_rate: float = 1.0


DENSE = Arm("dense", "the parent, trained as it is: what a mixture has to beat", kind="dense")
WIDE = Arm(
    "dense-wide", "the parent widened to the mixture's total parameters: an upper control, at more FLOPs", kind="wide"
)
HAG = Arm("hag", "the default: four groups by text, two experts each by token")
CALIBRATED = replace(HAG, name="hag-calibrated", about="the default, its gates started from texts", calibrated=True)
FLAT = Arm("flat", "a plain token router over the same eight experts", upcycling={"n_group": 1})
SEQUENCE = Arm("sequence", "one expert per group: a text is one expert's", upcycling={"n_group": 8})
MEAN_POOLED = replace(
    HAG, name="hag-mean-pooled", about="the default with a mean instead of an attention gate", mean_pooled=True
)


FOUR_LAYERS = replace(
    CALIBRATED,
    name="layers-1-2-3-4",
    about="four sparse layers instead of two",
    upcycling={"sparse_layers": [1, 2, 3, 4]},
)

PAIRED = replace(
    FOUR_LAYERS, name="pairs-1-2-3-4", about="the same, its gates started from what the texts of pairs share", paired=True
)

HELD = replace(
    PAIRED, name="pairs-held", about="the same, and its gates stay as they started", frozen_gates=1.0, balancing=None
)

BRANCH = replace(
    PAIRED,
    name="branch",
    about="upcycled from the dense parent's earlier run, gates from what pairs share; they stay, and nothing balances",
    frozen_gates=1.0,
    balancing=None,
    branches=True,
)

SUBJECT = Arm(
    "branch-subject",
    "upcycled after that run; a text has one expert of eight in all layers, by what pairs share in still embeddings",
    upcycling={"sparse_layers": [1, 2, 3, 4], "n_group": 8},
    paired=True,
    routing="subject",
    balancing=None,
    branches=True,
)


# The parent's blocks whole: one for English, others for other languages
HOME: Mapping[str, Any] = {
    "sparse_layers": [0, 1, 2, 3, 4, 5],
    "shared_expert_fraction": 0.0,
    "group_input": "hidden_states",
}
LANGUAGES = Arm(
    "hag-languages",
    "English keeps the parent's experts, a second group learns other languages, with a memory of their n-grams",
    upcycling={**HOME, "n_group": 2, "num_experts": 2},
    balancing=None,
    expert_rate=2.0,
    memory=65536,
    preserved="en",
)

TRANSLATIONS = replace(
    LANGUAGES,
    name="hag-translations",
    about="English keeps the parent's experts; a group for other languages, and a memory that starts from translations",
    expert_rate=4.0,
    fitted=True,
)

MEMORY_WORDS = replace(
    TRANSLATIONS,
    name="memory-words",
    about="the parent with a memory that holds dictionaries, without experts; all weights learn: does the mixture matter?",
    upcycling={"sparse_layers": []},
    all_learn=True,
    memory=131072,
    words=True,
)

WORDS = replace(
    MEMORY_WORDS,
    name="hag-words",
    about="English experts learn slowly, those of other languages fast; a memory that holds dictionaries",
    upcycling=TRANSLATIONS.upcycling,
    expert_rate=2.0,
    frozen_gates=1.0,
    preserved_rate=0.25,
)

# Groups that stay groups of languages, whatever the layers learn
STEADY = replace(
    WORDS,
    name="hag-steady",
    about="groups from word embeddings, which do not drift; English experts learn at the dense parent's rate",
    upcycling={**WORDS.upcycling, "group_input": "word_embeddings"},
    memory_rate=0.0,
    preserved_rate=0.5,
)

# The same, with what its gates are not sure of in the group that is preserved, as `upcycle` starts them now
SURE = replace(
    STEADY,
    name="hag-sure",
    about="hag-steady, its gates started from more texts, and what they are not sure of opens the English group",
    every_text=True,
)

MEMORY: Mapping[str, Any] = {"memory": 65536, "balancing": None}


def _fixed(name: str, about: str, routing: str, **upcycling: Any) -> Arm:
    return Arm(name, about, upcycling=upcycling, routing=routing, balancing=None)


def _variant(name: str, about: str, **changes: Any) -> Arm:
    """The calibrated default with something changed."""
    return replace(CALIBRATED, name=name, about=about, **changes)


TABLES: dict[int, tuple[Arm, ...]] = {
    # Does it pay, and does what is particular about it matter?
    1: (
        DENSE,
        HAG,
        CALIBRATED,
        FLAT,
        MEAN_POOLED,
        SEQUENCE,
        _fixed("token-hash", "experts by a hash of the token: does learning to route matter?", "token hash", n_group=1),
        _fixed("text-hash", "one expert by a hash of the text: does learning to route matter?", "text hash", n_group=8),
        _fixed("domain-label", "one expert by the true domain: a ceiling for groups by domain", "domain", n_group=8),
        WIDE,
    ),
    # How it learns
    2: (
        DENSE,
        CALIBRATED,
        _variant("experts-x4", "experts learn four times as fast: their gradients are rare", expert_rate=4.0),
        _variant("shared-x0.3", "what is shared learns slowly, experts fast", shared_rate=0.3, expert_rate=3.0),
        _variant("experts-only-x3", "only experts and routers learn", shared_rate=0.0, expert_rate=3.0),
        _variant("experts-only-x10", "the same, experts faster", shared_rate=0.0, expert_rate=10.0),
        replace(DENSE, name="dense-x0.3", about="the dense parent at three tenths of the rate", shared_rate=0.3),
        _variant("gradient-0.2", "experts learn to a fifth from each other's tokens", shared_gradient=0.2),
        _variant("gradient-0.5", "experts learn as much from each other's tokens as from their own", shared_gradient=0.5),
        _variant("gradient-1", "experts learn the same: the dense parent, trained in a mixture's form", shared_gradient=1.0),
        _variant("router-x10", "routers learn ten times as fast", router_rate=10.0),
        _variant("frozen-gates", "gates held for the first quarter", frozen_gates=0.25),
        _variant("no-balancing", "nothing balances", balancing=None),
        _variant("balancing-x0.1", "biases move ten times as slowly", balancing={"bias_update_rate": 0.005}),
        _variant(
            "aux-loss", "an auxiliary term instead of biases", balancing={"bias_update_rate": 0.0, "aux_loss_coef": 0.01}
        ),
        _variant("branch-late", "half of the steps dense, then upcycled", dense_share=0.5),
        _variant("average", "weights averaged over the end", average=0.98),
        replace(DENSE, name="dense-average", about="the same of the dense parent", average=0.98),
        _variant("distilled", "keeps the parent's similarities", distillation=0.3),
        replace(DENSE, name="dense-distilled", about="the same of the dense parent", distillation=0.3),
        _variant("mixed", "batches of all domains", mixed_batches=True),
        replace(DENSE, name="dense-mixed", about="the same of the dense parent", mixed_batches=True),
    ),
    # What it is made of
    3: (
        DENSE,
        CALIBRATED,
        _variant("layer-3", "one sparse layer", upcycling={"sparse_layers": [3]}),
        _variant("layers-2-4", "later layers", upcycling={"sparse_layers": [2, 4]}),
        _variant("layers-3-4-5", "the last three layers", upcycling={"sparse_layers": [3, 4, 5]}),
        FOUR_LAYERS,
        PAIRED,
        HELD,
        _variant("groups-2x4", "two groups of four", upcycling={"n_group": 2}),
        _variant("groups-8x2", "eight groups of two", upcycling={"n_group": 8, "num_experts": 16}),
        _variant("groups-8x1", "eight groups of one", upcycling={"n_group": 8}),
        _variant("groups-16x1", "sixteen groups of one", upcycling={"n_group": 16, "num_experts": 16}),
        _variant("shared-0", "nothing shared", upcycling={"shared_expert_fraction": 0.0}),
        _variant("shared-0.25", "a quarter shared", upcycling={"shared_expert_fraction": 0.25}),
        _variant("shared-0.75", "three quarters shared", upcycling={"shared_expert_fraction": 0.75}),
        _variant("two-experts", "two experts per token, at more FLOPs", upcycling={"num_experts_per_tok": 2}),
        _variant(
            "two-experts-normalized",
            "two experts per token over two groups, weighed by the router, at more FLOPs",
            upcycling={"num_experts_per_tok": 2, "topk_group": 2, "combine_rule": "normalized"},
        ),
    ),
    # The same training, upcycled late: experts part from a dense model that was trained already
    4: (
        DENSE,
        BRANCH,
        SUBJECT,
        replace(BRANCH, name="branch-texts", about="the same, gates from texts alone", paired=False),
        replace(BRANCH, name="branch-balanced", about="the same as branch, but biases balance", balancing={}),
        replace(BRANCH, name="branch-learned", about="the same, and gates learn", balancing={}, frozen_gates=0.0),
    ),
    # A memory of n-grams, alone and with experts
    5: (
        DENSE,
        Arm("memory", "the parent with a memory alone, no experts", upcycling={"sparse_layers": []}, **MEMORY),
        Arm("unigrams", "the same for single tokens only", upcycling={"sparse_layers": []}, **{**MEMORY, "memory_order": 1}),
        replace(
            CALIBRATED,
            name="hag-memory-one-rate",
            about="the default, gates from pairs, and a memory",
            paired=True,
            memory=65536,
        ),
    ),
    # An English parent learns other languages
    6: (
        DENSE,
        replace(DENSE, name="dense-x2", about="the same at twice the rate", shared_rate=2.0),
        LANGUAGES,
        replace(
            LANGUAGES,
            name="hag-languages-all",
            about="the same groups and memory, and all weights learn, but for gates and embeddings",
            expert_rate=1.0,
            frozen_gates=1.0,
            all_learn=True,
        ),
        replace(
            LANGUAGES,
            name="hag-three-groups",
            about="the same, three groups for other languages",
            upcycling={**HOME, "n_group": 4, "num_experts": 4},
        ),
        replace(LANGUAGES, name="hag-languages-experts", about="the same without a memory", memory=0),
        replace(
            LANGUAGES,
            name="memory-languages",
            about="the parent with a memory alone, of n-grams that English does not have",
            upcycling={"sparse_layers": []},
        ),
    ),
    # The same with a memory that starts from translations
    7: (
        DENSE,
        replace(
            DENSE,
            name="dense-embeddings",
            about="the same, and its word embeddings learn, ten times as fast: do rows for words need a memory?",
            embedding_rate=10.0,
        ),
        TRANSLATIONS,
        replace(
            TRANSLATIONS,
            name="hag-translations-all",
            about="a group for English, one for others, a memory that starts from translations; gates and embeddings stay",
            expert_rate=2.0,
            frozen_gates=1.0,
            all_learn=True,
        ),
        replace(
            TRANSLATIONS,
            name="hag-translations-home",
            about="the same, and the experts of English stay as well",
            expert_rate=2.0,
            frozen_gates=1.0,
            all_learn=True,
            still_experts=True,
        ),
        WORDS,
        replace(
            WORDS,
            name="hag-words-slow",
            about="the same, English experts at a tenth of the others' rate",
            preserved_rate=0.1,
        ),
        replace(
            WORDS,
            name="hag-words-interpolated",
            about="hag-words, its weights but for the memory left at three quarters of their way",
            interpolated=0.75,
        ),
        replace(WORDS, name="hag-words-slow-memory", about="hag-words, its memory at a tenth of the rate", memory_rate=0.1),
        replace(WORDS, name="hag-words-held", about="hag-words, its memory stays as translations set it", memory_rate=0.0),
        replace(
            WORDS,
            name="hag-translations-held",
            about="the same without dictionaries, as the recipe is where there are none",
            memory_rate=0.0,
            words=False,
        ),
        replace(DENSE, name="dense-interpolated", about="the same of the dense parent", interpolated=0.75),
        replace(
            MEMORY_WORDS,
            name="flat-words",
            about="the same two experts and memory under a plain token router, which learns and is balanced",
            upcycling={**HOME, "n_group": 1, "num_experts": 2},
            expert_rate=1.0,
            balancing={},
        ),
        MEMORY_WORDS,
        replace(
            MEMORY_WORDS,
            name="memory-words-held",
            about="the same, and the memory stays as translations set it: does the mixture matter then?",
            memory_rate=0.0,
        ),
        replace(
            TRANSLATIONS, name="hag-translations-unfitted", about="the first, its memory empty at the start", fitted=False
        ),
        replace(
            TRANSLATIONS,
            name="memory-translations",
            about="the parent with that memory alone, which learns on",
            upcycling={"sparse_layers": []},
        ),
    ),
    # The same where English pairs are trained on, too
    8: (
        DENSE,
        replace(
            DENSE,
            name="dense-words",
            about="the parent, trained on the dictionaries' pairs as well: is it the memory, or what dictionaries say?",
            trains_on_words=True,
        ),
        replace(
            WORDS,
            name="recipe",
            about="the recipe as it was: groups from hidden states, languages as translations alone tell them; English slow",
            memory_rate=0.0,
            translations_tell=True,
        ),
        STEADY,
        replace(STEADY, name="hag-steady-slow", about="the same, English experts at half of that", preserved_rate=0.25),
        SURE,
        replace(SURE, name="hag-sure-without-words", about="hag-sure without dictionaries", words=False),
        replace(
            SURE,
            name="memory-mixed",
            about="the parent with the same memory, without experts: does the mixture matter?",
            upcycling={"sparse_layers": []},
            preserved_rate=1.0,
        ),
    ),
}
