"""Exported ONNX graphs, run by sentence-transformers on a CPU: what `export` writes, `load` reads.

Axes:  B texts   L tokens   D hidden_size
"""

import copy
import hashlib
import importlib
import json
import os
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from . import sentence

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

FOLDER, SUFFIX = "onnx", ".onnx"  # of graphs in a model's folder; of their files
FLOAT_FILE, INT8_FILE = "model.onnx", "model_qint8.onnx"
REPORT = "export_report.json"
SHORT_TEXT, LEAST_EQUAL = 32, 0.75  # tokens that run together in any case; a part's shortest text against its longest


def split_name(name: str) -> tuple[str, str | None]:
    """What a command's MODEL names: a model and a graph's file of "OUT/onnx/model.onnx", and otherwise a model and None.

    Raises:
        FileNotFoundError: It ends as a graph's file does, and there is none.
    """
    path = Path(name)
    if path.suffix != SUFFIX:
        return name, None
    if not path.is_file() or path.absolute().parent.name != FOLDER:
        raise FileNotFoundError(f"{name} is no graph; allowed: FOLDER/{FOLDER}/{FLOAT_FILE}, as `hagmoe export` writes it.")
    return str(path.absolute().parents[1]), path.name


def load_model_or_graph(name: str, device: str | None = None) -> "SentenceTransformer":
    """The `SentenceTransformer` that a command's MODEL names, around a graph where it is one.

    Args:
        name: As `split_name` takes it.
        device: Where to load the model; a graph runs on the CPU.

    Raises:
        FileNotFoundError: There is no such graph.
        ValueError: It is a model of sentence-transformers, but no `SentenceTransformer`.
        ImportError: An optional package is missing; the message names what to install.
    """
    folder, file_name = split_name(name)
    return load(folder, file_name) if file_name else sentence.load(name, device=device)


def load(
    folder: str | os.PathLike,
    file_name: str = FLOAT_FILE,
    *,
    threads: int | None = None,
    device: str | None = None,
    **kwargs: Any,
) -> "SentenceTransformer":
    """A `SentenceTransformer` whose encoder is an exported ONNX graph, on CPU.

    The stock `backend="onnx"` needs optimum-onnx, which does not work with transformers 5 yet; this does the same to the
    same folder.

    Args:
        folder: What `export` wrote.
        file_name: Of the graph in `onnx/`.
        threads: How many threads ONNX Runtime computes with; as many as torch by default.
        device: "cpu", or not given.
        kwargs: As `SentenceTransformer` takes them.

    Raises:
        FileNotFoundError: There is no such graph.
        ValueError: Another device, or a number of threads that is none.
        ImportError: An optional package is missing; the message names what to install.
    """
    if device not in (None, "cpu"):
        raise ValueError(f"device={device!r} is not possible with a graph; allowed: 'cpu'.")
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise ValueError(f"threads={threads!r} is not possible; allowed: an integer of at least 1, or None.")
    path = Path(folder) / FOLDER / file_name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; allowed: a graph that `hagmoe export` wrote.")
    if (
        file_name == INT8_FILE
        and _lacks_vnni()
        and not json.loads((Path(folder) / REPORT).read_text("utf-8")).get("reduce_range")
    ):
        message = "This CPU has no VNNI, so sums of int8 products may overflow: export with reduce_range=True."
        warnings.warn(message, stacklevel=2)
    model = sentence.load(str(folder), device="cpu", **kwargs)
    cast(Any, model[0]).model = OnnxEncoder(path, sentence.encoder_of(model).config, threads)
    return model


class OnnxEncoder(nn.Module):
    """An ONNX graph in the place of a transformers encoder, for inference on CPU.

    Args:
        path: The graph.
        config: The encoder's; the copy here also carries the graph's SHA-256, by which evaluations know it.
        threads: How many threads ONNX Runtime computes with; as many as torch where None.
    """

    def __init__(self, path: Path, config: Any, threads: int | None = None):
        super().__init__()
        self.path, self.threads = path.absolute(), threads
        self.session = self._open()
        self.input_names = [given.name for given in self.session.get_inputs()]
        digest = hashlib.sha256()
        for file in files_of(path):
            digest.update(file.read_bytes())
        self.config = copy.deepcopy(config)
        self.config.exported_sha256 = digest.hexdigest()

    def _open(self) -> Any:
        runtime = import_or_say("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = self.threads or torch.get_num_threads()
        return runtime.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])

    def __getstate__(self) -> dict:
        """Copies and other processes open the graph's file again; what runs it cannot be copied."""
        return {name: value for name, value in self.__dict__.items() if name != "session"}

    def __setstate__(self, state: dict) -> None:
        """Open the graph's file again."""
        super().__setstate__(state)
        self.session = self._open()

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Refused: the graph lies in its folder already.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"A graph is not saved again; allowed: a copy of the folder {self.path.parents[1]}.")

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **features: Any) -> BaseModelOutput:
        """(B, L) int64 ids and mask -> token states (B, L, D) float32; features that the graph lacks are ignored.

        Texts run together with those of about their length, since attention in the graph computes padding. States at
        padding are 0.
        """
        given = {"token_type_ids": torch.zeros_like(input_ids), **features}
        given |= {"input_ids": input_ids, "attention_mask": attention_mask}
        feed = {name: given[name].numpy(force=True) for name in self.input_names}
        whole: np.ndarray | None = None
        for rows, columns in parts_of_similar_length(feed["attention_mask"]):
            part = {name: array[rows, columns] for name, array in feed.items()}
            (states,) = self.session.run(["last_hidden_state"], part)
            if whole is None:
                whole = np.zeros((*input_ids.shape, states.shape[-1]), dtype=states.dtype)
            whole[rows, columns] = states
        return BaseModelOutput(last_hidden_state=torch.from_numpy(cast(np.ndarray, whole)))


def parts_of_similar_length(mask: np.ndarray) -> Iterator[tuple[slice | np.ndarray, slice]]:
    """Texts of similar length as (rows, columns) of a batch: the columns are the widest text's.

    A part's shortest text has at least `LEAST_EQUAL` of its longest one's length; short texts stay together.

    Args:
        mask: (B, L), non-zero at real tokens, on whichever side the padding is.
    """
    is_real = mask != 0
    first, width = is_real.argmax(axis=1), mask.shape[1]
    end = width - is_real[:, ::-1].argmax(axis=1)
    length = np.where(is_real.any(axis=1), end - first, 0)
    rows = np.argsort(-length, kind="stable")
    cuts, longest = [0], length[rows[0]]
    for at, tokens in enumerate(length[rows]):
        if longest > SHORT_TEXT and tokens < LEAST_EQUAL * longest:
            cuts.append(at)
            longest = tokens
    if len(cuts) == 1:
        yield slice(None), slice(None)
        return
    for part in np.split(rows, cuts[1:]):
        real = part[length[part] > 0]
        if len(real):  # nobody asks for the states of a text without tokens
            yield part, slice(int(first[real].min()), int(end[real].max()))


def _lacks_vnni() -> bool:
    """Whether this is an x86 CPU without instructions for 8-bit products; unknown counts as no."""
    cpu_info = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64") or not cpu_info.is_file():
        return False
    return "vnni" not in cpu_info.read_text(encoding="utf-8")


def files_of(graph: Path) -> list[Path]:
    """A graph's file, and that of its weights where they lie apart."""
    beside = (graph.with_name(f"{graph.name}.data"), graph.with_suffix(".bin"))
    return [graph, *(path for path in beside if path.is_file())]


def import_or_say(name: str) -> Any:
    """An optional module.

    Raises:
        ImportError: It is missing; the message names what to install.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"Exported graphs need {name}: pip install hagmoe_hf[export]") from error
