"""A mixture as an ONNX or OpenVINO graph, in float32 and in int8, checked on real texts.

transformers' exporters trace and convert; here are the experts in a form that the graphs know, the int8 weights, and the
check against torch. `graphs` runs what is written here.

Axes:  B texts   L tokens   D hidden_size   T = B*L   E experts   K experts per token
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_outputs import BaseModelOutput

from . import sentence
from .files import new_folder
from .graphs import FLOAT_FILE, INT8_FILE, REPORT, OnnxEncoder, files_of, import_or_say, load
from .kernels_hagmoe import expert_forward, expert_weights
from .modeling_hagmoe import HagMoeExperts, HagMoeGate, HagMoeModel
from .routing_hagmoe import RealTokens

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

OPENVINO_FILE = "openvino_model.xml"
LARGEST_DIFFERENCE = 1e-4  # of a float32 graph's token states from torch's
BATCH_SIZES = (1, 7, 32)  # of the check: a query, an odd number, a full batch
BATCHES = 8  # of each size


@dataclass(frozen=True)
class Check:
    """How a graph differs from torch in float32 on real texts.

    Attributes:
        largest_difference: Of any number of any real token's state.
        smallest_cosine: Of any text's mean state.
        texts: How many were compared.
        shapes: (B, L) of every batch.
        fewest_experts: The fewest experts that a batch used in a sparse layer: all others were empty. 0 without such layers.
    """

    largest_difference: float
    smallest_cosine: float
    texts: int
    shapes: tuple[tuple[int, int], ...]
    fewest_experts: int


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        megabytes: Size of each graph with its weights, by file name.
        checks: The check of each graph, by file name.
        float_weights: In the int8 graph, the (name, shape) of every matrix that stayed float32.
        int8_share: Of the numbers in all the int8 graph's matrices but the embeddings, how many are int8.
        reduce_range: Whether int8 weights have 7 bits only.
    """

    megabytes: dict[str, float]
    checks: dict[str, Check]
    float_weights: tuple[tuple[str, tuple[int, ...]], ...] = ()
    int8_share: float | None = None
    reduce_range: bool = False

    def to_json(self) -> str:
        """As indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def unrolled_experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts for graphs: each takes the rows of its own tokens; an expert without tokens multiplies no rows.

    Every weight is a constant of its own in the graph, as int8 matrix products want them.

    Args:
        self: The experts module: stacked weights, `num_experts`, `has_gate`, `has_bias`, `act_fn`.
        hidden_states: (T, D).
        top_k_index: (T, K) int64 in [0, E]; E means "no expert".
        top_k_weights: (T, K).

    Returns:
        (T, D), the weighted sum over each token's experts.
    """
    (num_tokens, top_k), choices = top_k_index.shape, top_k_index.flatten()
    rows, outputs = [], []
    for expert, weights in expert_weights(self, range(self.num_experts)):
        row = (choices == expert).nonzero().squeeze(-1)
        states = hidden_states.index_select(0, row if top_k == 1 else row // top_k)
        rows.append(row)
        outputs.append(expert_forward(self, states, weights))
    output = hidden_states.new_zeros(num_tokens * top_k, hidden_states.shape[-1])
    output = output.index_copy(0, torch.cat(rows), torch.cat(outputs))
    if top_k > 1:
        return (top_k_weights.unsqueeze(1) @ output.view(num_tokens, top_k, -1)).squeeze(1)
    # The other rules give one expert the weight 1
    return output * top_k_weights if self.config.combine_rule == "softmax" else output


ALL_EXPERTS_FUNCTIONS.register("unrolled", unrolled_experts_forward)


def export(
    model: "str | os.PathLike | SentenceTransformer",
    out: str | os.PathLike,
    texts: Sequence[str],
    *,
    format: Literal["onnx", "openvino"] = "onnx",
    int8: bool = False,
    reduce_range: bool = False,
) -> ExportReport:
    """Write a mixture with its graphs to a new folder, and check the graphs against torch.

    `out` is what sentence-transformers publishes: the torch model, and `onnx/model.onnx` beside it, with
    `onnx/model_qint8.onnx` for `int8`, or `openvino/openvino_model.xml`. The report lies in `export_report.json`.

    Args:
        model: A mixture, or its folder or Hub id; a bare encoder is pooled by its mean, as sentence-transformers does.
        out: The new folder; it appears whole, or not at all.
        texts: Real texts, at least two, for the check.
        format: Of the graph.
        int8: Whether to write a second graph of int8 weights, whose activations are quantised while it runs.
        reduce_range: With `int8`, weights of 7 bits, for x86 CPUs without VNNI: their sums of 16 bits overflow with 8.

    Returns:
        Sizes, differences from torch, and what stayed float32.

    Raises:
        ValueError: No mixture, one that is not in float32, too few texts, int8 or an n-gram memory for OpenVINO, or a
            float32 graph that differs from torch too much.
        ImportError: An optional package is missing; the message names what to install.
        FileExistsError: `out` exists and is not empty.
    """
    if len(texts) < 2:
        raise ValueError(f"{len(texts)} texts are too few to check an export; allowed: at least 2.")
    if int8 and format != "onnx":
        raise ValueError(f"int8 with format={format!r} is not possible; allowed: int8 with format='onnx'.")
    if reduce_range and not int8:
        raise ValueError("reduce_range=True is of no use without int8; allowed: reduce_range with int8=True.")
    mixture = sentence.load(str(model), device="cpu") if isinstance(model, (str, os.PathLike)) else model
    encoder = sentence.encoder_of(mixture)
    if not isinstance(encoder, HagMoeModel):
        raise ValueError(
            f"The encoder is a {type(encoder).__name__}; allowed: a HagMoeModel, {sentence.allowed_mixture(encoder)}."
        )
    if encoder.dtype != torch.float32:
        raise ValueError(f"The mixture is in {encoder.dtype}; allowed: torch.float32, which model.float() makes of it.")
    if format == "openvino" and encoder.ngram_memory is not None:  # it computes integers in 32 bits
        raise ValueError("format='openvino' cannot look up an n-gram memory (ngram_memory_size > 0); allowed: 'onnx'.")
    batches = _batches(mixture, texts)
    with new_folder(out) as folder:
        mixture.save_pretrained(str(folder))
        graphs = folder / format
        graphs.mkdir()
        if format == "openvino":
            report = _write_openvino(encoder, batches, graphs)
        else:
            report = _write_onnx(encoder, batches, graphs, int8, reduce_range)
        for name in (FLOAT_FILE, OPENVINO_FILE):
            if name in report.checks and not report.checks[name].largest_difference <= LARGEST_DIFFERENCE:
                difference = report.checks[name].largest_difference
                raise ValueError(f"{name} differs from torch by {difference:.1e}; allowed: {LARGEST_DIFFERENCE:.0e}.")
        (folder / REPORT).write_text(report.to_json(), encoding="utf-8")
    return report


def _write_onnx(encoder: HagMoeModel, batches: list[dict], folder: Path, int8: bool, reduce_range: bool) -> ExportReport:
    exporters, optimizer = import_or_say("transformers.exporters"), import_or_say("onnxscript.optimizer")
    exporter = exporters.OnnxExporter()
    example = _example(batches)
    settings = exporters.OnnxConfig(dynamic_shapes=_any_size(example), ort_fusions="cpu")
    with _traceable(encoder), _without_padding(encoder):
        exported = exporter.export(encoder, example, settings)
    program = exported.program
    # Slices and transposes of weights become weights, however large: only constants can be int8
    everything = 2**62
    optimizer.fold_constants(program, input_size_limit=everything, output_size_limit=everything)
    optimizer.remove_unused_nodes(program)
    exporter.save_program(program, folder / FLOAT_FILE)
    checks = {FLOAT_FILE: compare(encoder, OnnxEncoder(folder / FLOAT_FILE, encoder.config), batches)}
    float_weights, int8_share = (), None
    if int8:
        program = _quantized(program, reduce_range)
        exporter.save_program(program, folder / INT8_FILE)
        checks[INT8_FILE] = compare(encoder, OnnxEncoder(folder / INT8_FILE, encoder.config), batches)
        float_weights, int8_share = _left_in_float(program, encoder)
    sizes = {name: _megabytes(folder / name) for name in checks}
    return ExportReport(sizes, checks, float_weights, int8_share, reduce_range)


def _write_openvino(encoder: HagMoeModel, batches: list[dict], folder: Path) -> ExportReport:
    exporters = import_or_say("transformers.exporters")
    exporter = exporters.OpenVINOExporter()
    example = _example(batches)
    with _traceable(encoder), _an_expert_for_padding(encoder):
        exported = exporter.export(encoder, example, exporters.OpenVINOConfig(dynamic_shapes=_any_size(example)))
    exporter.save_program(exported.program, folder / OPENVINO_FILE)
    # Where a CPU has bfloat16 units OpenVINO would compute in it, which is another question than whether the graph is right
    core, settings = import_or_say("openvino").Core(), {"INFERENCE_PRECISION_HINT": "f32"}
    graph = core.compile_model(folder / OPENVINO_FILE, "CPU", settings)

    def run(**batch: Tensor) -> BaseModelOutput:
        states = graph({name: ids.numpy() for name, ids in batch.items()})[0]
        return BaseModelOutput(last_hidden_state=torch.from_numpy(states))

    checks = {OPENVINO_FILE: compare(encoder, run, batches)}
    return ExportReport({OPENVINO_FILE: _megabytes(folder / OPENVINO_FILE)}, checks)


@contextmanager
def _traceable(encoder: HagMoeModel) -> Iterator[None]:
    """Experts that a graph can express, gates that stay float32, no dropout, and no pooler, whose output nobody asks for.

    A gate's weight comes first in its product: exporters would join `states @ weight` with other products of the same
    states, and the joined weight would become int8; rounding would then change who is chosen.
    """
    before = encoder.get_experts_implementation(), encoder.pooler, encoder.training
    gates = [module for module in encoder.modules() if isinstance(module, HagMoeGate)]
    hooks = [gate.register_forward_hook(_weight_first) for gate in gates]
    encoder.set_experts_implementation("unrolled")
    encoder.pooler = None
    encoder.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        experts, encoder.pooler, was_training = before
        encoder.set_experts_implementation(experts)
        encoder.train(was_training)


@contextmanager
def _without_padding(encoder: HagMoeModel) -> Iterator[None]:
    """Everything but attention runs on real tokens alone, as it does on CPU, though a trace cannot count them beforehand.

    So padding costs little, and has no part in the scale of int8 activations.
    """

    def leave_out(token_mask: Tensor | None, kwargs: dict) -> RealTokens:
        return RealTokens.from_mask(cast(Tensor, token_mask), is_tracing=True)

    encoder._real_tokens = leave_out  # type: ignore[method-assign]
    try:
        yield
    finally:
        del encoder._real_tokens


@contextmanager
def _an_expert_for_padding(encoder: HagMoeModel) -> Iterator[None]:
    """Padding takes the last expert, with the weight 0, instead of none: the OpenVINO exporter brings experts of its own."""

    def choose(experts: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        states, index, weights = inputs
        return states, index.clamp(max=cast(HagMoeExperts, experts).num_experts - 1), weights

    hooks = [module.register_forward_pre_hook(choose) for module in encoder.modules() if isinstance(module, HagMoeExperts)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _weight_first(gate: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> Tensor:
    """What the gate computes, (..., L, D) -> (..., L, gates), as `(weight @ states.T).T`."""
    return (cast(HagMoeGate, gate).weight.float() @ inputs[0].transpose(-1, -2)).transpose(-1, -2)


def _batches(mixture: "SentenceTransformer", texts: Sequence[str]) -> list[dict]:
    """Tokenised batches of several sizes, their texts in the order given, so that most carry padding."""
    parts = [list(texts[i * size : (i + 1) * size]) for size in BATCH_SIZES for i in range(BATCHES)]
    names = ("input_ids", "attention_mask", "token_type_ids")
    batches = [cast(Any, mixture).preprocess(part) for part in parts if part]
    return [{name: batch[name] for name in names if name in batch} for batch in batches]


def _example(batches: list[dict]) -> dict[str, Tensor]:
    """The batch to trace: neither of its sizes may be 1, which would stay fixed."""
    return dict(next(batch for batch in batches if min(batch["input_ids"].shape) > 1))


def _any_size(example: dict[str, Tensor]) -> dict[str, dict]:
    """Both axes (B, L) of every input may have any size."""
    return {name: {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for name in example}


@torch.no_grad()
def compare(encoder: HagMoeModel, run: Callable[..., Any], batches: Sequence[dict[str, Tensor]]) -> Check:
    """Run batches through torch in float32 and through a graph.

    Args:
        encoder: The torch model.
        run: The graph; takes a batch as keywords, returns something with `last_hidden_state`.
        batches: Tokenised texts, (B, L) each.
    """
    differences, cosines, experts = [], [], []
    was_training = encoder.training
    encoder.eval()
    for batch in batches:
        expected = encoder(**batch, output_expert_index=True)
        mask = batch["attention_mask"].unsqueeze(-1)
        states, expected_states = (output.last_hidden_state * mask for output in (run(**batch), expected))
        differences.append(float((states - expected_states).abs().max()))
        cosines.append(float(F.cosine_similarity(states.sum(1), expected_states.sum(1)).min()))
        real = mask.flatten().bool()
        experts += [len(index[real].unique()) for index in expected.expert_index or ()]
    encoder.train(was_training)
    return Check(
        largest_difference=max(differences),
        smallest_cosine=min(cosines),
        texts=sum(len(batch["input_ids"]) for batch in batches),
        shapes=tuple((batch["input_ids"].shape[0], batch["input_ids"].shape[1]) for batch in batches),
        fewest_experts=min(experts, default=0),
    )


def _quantized(program: Any, reduce_range: bool) -> Any:
    """The ONNX program with int8 weights, one scale for each output channel, in all products with a constant matrix."""
    exporters, runtime = import_or_say("transformers.exporters"), import_or_say("onnxruntime.quantization")
    _unshare_weights(program.graph)
    queries = [node.name for node in program.graph if node.op_type == "MatMul" and _is_vector(node.inputs[1])]
    settings = exporters.OnnxRuntimeDynamicConfig(
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        reduce_range=reduce_range,
        weight_type=runtime.QuantType.QInt8,
        nodes_to_exclude=queries,
    )
    return exporters.OnnxRuntimeQuantizer(settings).quantize(program, {}, exporters.ExportFormat.ONNX)


def _unshare_weights(graph: Any) -> None:
    """Give every product a weight of its own.

    Exporters let small equal weights be one, as those of experts that have not parted yet; ONNX Runtime's quantiser
    transposes it once for each product that it serves.
    """
    ir, seen = import_or_say("onnx_ir"), set()
    for node in graph:
        if node.op_type not in ("Gemm", "MatMul") or node.inputs[1].const_value is None:
            continue
        weight = node.inputs[1]
        if weight.name in seen:
            own = ir.Value(name=f"{weight.name}_of_{node.name}", const_value=weight.const_value)
            own.shape, own.type = weight.shape, weight.type
            graph.register_initializer(own)
            node.replace_input_with(1, own)
        seen.add(weight.name)


def _is_vector(weight: Any) -> bool:
    """Whether this is a constant that holds one column: the attention gate's query."""
    return weight.const_value is not None and weight.const_value.size == weight.const_value.shape[0]


def _left_in_float(program: Any, encoder: HagMoeModel) -> tuple[tuple, float]:
    """(name, shape) of the float32 matrices, and the int8 share of all matrices' numbers but the embeddings'."""
    sizes, matrices = {"FLOAT": 0, "INT8": 0}, []
    tables = [tuple(module.weight.shape) for module in encoder.embeddings.modules() if isinstance(module, nn.Embedding)]
    for name, value in program.graph.initializers.items():
        shape, kind = tuple(value.const_value.shape), value.const_value.dtype.name
        if len(shape) < 2 or kind not in sizes:
            continue
        if kind == "FLOAT":
            matrices.append((name, shape))
        if shape not in tables:
            sizes[kind] += value.const_value.size
    return tuple(matrices), sizes["INT8"] / sum(sizes.values())


def _megabytes(graph: Path) -> float:
    return round(sum(path.stat().st_size for path in files_of(graph)) / 1e6, 1)


__all__ = ["Check", "ExportReport", "compare", "export", "load", "unrolled_experts_forward"]
