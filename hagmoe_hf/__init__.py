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
    AutoModelForTokenClassification,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
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
from .upcycling import UpcyclingReport, upcycle
from .version import __version__

AutoConfig.register(HagMoeConfig.model_type, HagMoeConfig, exist_ok=True)
AutoModel.register(HagMoeConfig, HagMoeModel, exist_ok=True)
AutoModelForMaskedLM.register(HagMoeConfig, HagMoeForMaskedLM, exist_ok=True)
AutoModelForSequenceClassification.register(HagMoeConfig, HagMoeForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(HagMoeConfig, HagMoeForTokenClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(HagMoeConfig, HagMoeForQuestionAnswering, exist_ok=True)
AutoModelForMultipleChoice.register(HagMoeConfig, HagMoeForMultipleChoice, exist_ok=True)
# Registering does not reach these tables; without an entry the pipelines of both tasks work, but log "is not supported"
MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[HagMoeConfig.model_type] = HagMoeForSequenceClassification.__name__
MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES[HagMoeConfig.model_type] = HagMoeForTokenClassification.__name__

__all__ = [
    "HagMoeConfig",
    "HagMoeForMaskedLM",
    "HagMoeForMultipleChoice",
    "HagMoeForQuestionAnswering",
    "HagMoeForSequenceClassification",
    "HagMoeForTokenClassification",
    "HagMoeModel",
    "UpcyclingReport",
    "__version__",
    "upcycle",
]
