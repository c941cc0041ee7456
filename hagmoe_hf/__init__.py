"""HAG-MoE: upcycle a dense text encoder into a mixture of experts that is an ordinary Hugging Face model.

Importing this package once registers the model, so that `AutoModel`, `AutoConfig` and `SentenceTransformer` find it.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
)

from .configuration_hagmoe import HagMoeConfig
from .modeling_hagmoe import (
    HagMoeForMaskedLM,
    HagMoeForMultipleChoice,
    HagMoeForQuestionAnswering,
    HagMoeForSequenceClassification,
    HagMoeForTokenClassification,
    HagMoeModel,
)
from .translations import TranslationFit, fit_translations
from .upcycling import UpcyclingReport, upcycle
from .version import __version__

AutoConfig.register(HagMoeConfig.model_type, HagMoeConfig, exist_ok=True)
AutoModel.register(HagMoeConfig, HagMoeModel, exist_ok=True)
AutoModelForTextEncoding.register(HagMoeConfig, HagMoeModel, exist_ok=True)
AutoModelForMaskedLM.register(HagMoeConfig, HagMoeForMaskedLM, exist_ok=True)
AutoModelForSequenceClassification.register(HagMoeConfig, HagMoeForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(HagMoeConfig, HagMoeForTokenClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(HagMoeConfig, HagMoeForQuestionAnswering, exist_ok=True)
AutoModelForMultipleChoice.register(HagMoeConfig, HagMoeForMultipleChoice, exist_ok=True)

__all__ = [
    "HagMoeConfig",
    "HagMoeForMaskedLM",
    "HagMoeForMultipleChoice",
    "HagMoeForQuestionAnswering",
    "HagMoeForSequenceClassification",
    "HagMoeForTokenClassification",
    "HagMoeModel",
    "TranslationFit",
    "UpcyclingReport",
    "__version__",
    "fit_translations",
    "upcycle",
]
