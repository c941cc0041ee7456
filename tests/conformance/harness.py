"""transformers' `ModelTesterMixin` and `ConfigTester` on a tiny HAG-MoE; `prepare.py` copies this beside the suite.

The environment variable HAGMOE_SHAPE says which family's shape: "bert" or "modernbert".
"""

import os
import tempfile
import unittest

import torch
import transformers
from transformers.models.auto import modeling_auto

import hagmoe_hf

SHAPE = os.environ["HAGMOE_SHAPE"]
TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
SHAPES = {
    "bert": {},
    "modernbert": {
        "type_vocab_size": 0,
        "position_embedding_type": "rope",
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 4,
        "norm_placement": "pre",
        "gated_mlp": True,
        "attention_bias": False,
        "mlp_bias": False,
        "norm_bias": False,
        "has_pooler": False,
        "classifier_head": "transform",
    },
}
BATCH_DEPENDENT = "frequencies that follow the longest text of a batch are refused: vectors would depend on the batch"
PARTIAL = "rotation of a part of each head is refused: no family needs it"
LEARNED = "positions are learned, so there is nothing to rotate"
SKIPPED = {
    "bert": {
        "test_model_rope_scaling_from_config_0_linear": LEARNED,
        "test_model_rope_scaling_from_config_1_dynamic": LEARNED,
        "test_model_rope_scaling_from_config_2_yarn": LEARNED,
        "test_model_rope_scaling_frequencies": LEARNED,
        "test_model_rope_with_partial_rotation": LEARNED,
    },
    "modernbert": {
        "test_model_rope_scaling_from_config_1_dynamic": BATCH_DEPENDENT,
        "test_model_rope_scaling_frequencies": BATCH_DEPENDENT,
        "test_model_rope_with_partial_rotation": PARTIAL,
    },
}
# The suite learns from these tables which labels a class takes; registering with Auto classes does not reach them
TABLES = {
    "Model": modeling_auto.MODEL_MAPPING_NAMES,
    "ForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "ForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "ForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "ForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "ForMultipleChoice": modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
}
CLASSES = {suffix: getattr(hagmoe_hf, f"HagMoe{suffix}") for suffix in TABLES}
for _suffix, _cls in CLASSES.items():
    TABLES[_suffix].setdefault("hagmoe", _cls.__name__)

from tests.test_configuration_common import ConfigTester  # noqa: E402
from tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask  # noqa: E402


class HagMoeModelTester:
    """What the suite asks for: a tiny configuration and a batch for it."""

    is_training = True
    num_labels = 3
    num_choices = 4
    batch_size = 13
    seq_length = 7
    hidden_size = TINY["hidden_size"]
    num_hidden_layers = TINY["num_hidden_layers"]
    num_attention_heads = TINY["num_attention_heads"]
    vocab_size = TINY["vocab_size"]

    def get_config(self):
        """The configuration of the shape under test."""
        return hagmoe_hf.HagMoeConfig(**TINY, **SHAPES[SHAPE])

    def prepare_config_and_inputs_for_common(self):
        """A batch without padding ids at real tokens."""
        shape = [self.batch_size, self.seq_length]
        inputs = {"input_ids": ids_tensor(shape, self.vocab_size - 1) + 1, "attention_mask": random_attention_mask(shape)}
        if self.get_config().type_vocab_size:
            inputs["token_type_ids"] = ids_tensor(shape, self.get_config().type_vocab_size)
        return self.get_config(), inputs


class HagMoeModelTest(ModelTesterMixin, unittest.TestCase):
    """The suite itself, with two tests added."""

    all_model_classes = tuple(CLASSES.values())
    test_all_params_have_gradient = False  # an expert that got no token has a gradient of zero

    def setUp(self):
        """Make the two helpers that the suite's tests use."""
        self.model_tester = HagMoeModelTester()
        self.config_tester = ConfigTester(self, config_class=hagmoe_hf.HagMoeConfig, **TINY, **SHAPES[SHAPE])

    def test_config(self):
        """Everything that the suite asks of a configuration."""
        self.config_tester.run_common_tests()

    def test_auto_roundtrip(self):
        """Saved, and loaded by its Auto class: the same class and the same weights."""
        for suffix, cls in CLASSES.items():
            auto = getattr(transformers, f"AutoModel{suffix.removeprefix('Model')}")
            with self.subTest(suffix), tempfile.TemporaryDirectory() as folder:
                model = cls(self.model_tester.get_config())
                model.save_pretrained(folder)
                again, info = auto.from_pretrained(folder, output_loading_info=True)
                self.assertIs(type(again), cls)
                self.assertFalse(info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"], info)
                for name, tensor in again.state_dict().items():
                    self.assertTrue(torch.equal(tensor, model.state_dict()[name]), name)


for _name, _reason in SKIPPED[SHAPE].items():
    setattr(HagMoeModelTest, _name, unittest.skip(_reason)(lambda self: None))
