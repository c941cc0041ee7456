"""Shim for ExportTesterMixin, written against the exporter API of transformers 5.23 (`exporter.export(...)` returns an
`ExportedModel`). Each backend test is skipped when its package is missing. Needs RUN_SLOW=1, like upstream."""

import copy

import torch
from parameterized import parameterized
from transformers import set_seed
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter
from transformers.testing_utils import (
    set_config_for_less_flaky_test,
    set_model_for_less_flaky_test,
    slow,
    torch_device,
)
from transformers.utils import import_utils as iu

BOTH = parameterized.expand([("static", False), ("dynamic", True)])


def _float_tensors(out):
    out = out.to_tuple() if hasattr(out, "to_tuple") else tuple(out.values()) if isinstance(out, dict) else out
    flat = []
    for o in out:
        if isinstance(o, torch.Tensor):
            flat.append(o)
        elif isinstance(o, (tuple, list)):
            flat.extend(x for x in o if isinstance(x, torch.Tensor))
    return [o for o in flat if o.is_floating_point()]


class ExportTesterMixin:
    test_torch_exportable = True

    def _export_parts(self, model_class):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        inputs = self._prepare_for_class(inputs, model_class)
        inputs = {k: v for k, v in inputs.items() if v is not None and k not in ("labels", "return_loss")}
        set_config_for_less_flaky_test(config)
        model = model_class(config).eval().to(torch_device)
        set_model_for_less_flaky_test(model)
        return model, inputs

    def _run_export(self, exporter, config, atol, rtol, call):
        if not self.test_torch_exportable:
            self.skipTest("not exportable")
        for model_class in self.all_model_classes:
            with self.subTest(model_class.__name__):
                model, inputs = self._export_parts(model_class)
                set_seed(1234)
                with torch.no_grad():
                    want = _float_tensors(model(**copy.deepcopy(inputs)))
                exported = exporter.export(model, copy.deepcopy(inputs), config=config)
                set_seed(1234)
                with torch.no_grad():
                    got = _float_tensors(call(exported, copy.deepcopy(inputs)))
                self.assertEqual(len(want), len(got))
                for w, g in zip(want, got):
                    torch.testing.assert_close(torch.as_tensor(g).to(w), w, atol=atol, rtol=rtol)

    @BOTH
    @slow
    def test_torch_export(self, _, dynamic):
        self._run_export(DynamoExporter(), DynamoConfig(dynamic=dynamic), 1e-4, 1e-4, lambda e, i: e(**i))

    @BOTH
    @slow
    def test_onnx_export(self, _, dynamic):
        if not (iu.is_onnxscript_available() and iu._is_package_available("onnxruntime")):
            self.skipTest("onnxscript/onnxruntime missing")
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

        self._run_export(OnnxExporter(), OnnxConfig(dynamic=dynamic), 1e-3, 1e-3, lambda e, i: e(**i))


class ExportGenerateTesterMixin(ExportTesterMixin):
    pass
