"""Shards become files of vectors, by one process or many; what a killed run left is completed by the next."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from .. import sentence
from ..files import new_file, write_text
from ..graphs import load_model_or_graph
from .shards import SHARD_ROWS, Plan, Shard, plan, read_rows

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_MANIFEST, _LOCK = "manifest.json", ".lock"


@dataclass(frozen=True)
class Report:
    """What a run did.

    Attributes:
        rows: Of the whole input.
        encoded: Of them, in this run, by all its processes; the others were there already.
        seconds: From the first text to the last.
        processes: That shared the work.
    """

    rows: int
    encoded: int
    seconds: float
    processes: int

    def __str__(self) -> str:
        rate = f", {self.encoded / self.seconds:.1f} texts/s" if self.encoded else ""
        return (
            f"{self.rows} rows: {self.rows - self.encoded} were there, {self.encoded} encoded in {self.seconds:.1f} s by "
            f"{self.processes} process(es){rate}"
        )


def encode(
    model: "SentenceTransformer | str",
    sources: Sequence[str | Path],
    out: Path,
    *,
    column: str = "text",
    id_column: str | None = None,
    shard_rows: int = SHARD_ROWS,
    batch_size: int = 32,
    prompt: str | None = None,
    max_seq_length: int | None = None,
    show_progress_bar: bool = False,
) -> Report:
    """Encode every text of `sources`, or what an earlier run left of them.

    Under `accelerate launch` the processes share the shards. Memory holds one shard per process.

    Args:
        model: A `SentenceTransformer`, its folder or Hub id, or an exported graph ("OUT/onnx/model.onnx"), which runs on the
            CPU; with a name, each process loads it to its own device.
        sources: .parquet, .jsonl or .csv files, or folders of them, all with one ending; folders are walked by name.
        out: A new folder, or one that an earlier run with the same model and input wrote.
        column: The texts; a missing one gets a missing vector.
        id_column: A column to copy to `id`, as text.
        shard_rows: Rows of a shard.
        batch_size: Texts per forward pass.
        prompt: Put before each text.
        max_seq_length: Tokens after which a text is cut; the model's own by default.
        show_progress_bar: Of the main process.

    Raises:
        ValueError: A row cannot be read, a setting is not possible, or `out` belongs to another model or input.
        OSError: An input cannot be read.
        BlockingIOError: Another run is writing to `out`.
        ImportError: accelerate, pyarrow or sentence-transformers is missing.
    """
    try:
        from accelerate import PartialState
        from accelerate.utils import broadcast_object_list
    except ImportError as error:
        raise ImportError("This needs accelerate: pip install hagmoe_hf[sentence]") from error
    # The others wait while the main process reads the input, and at the end for the slowest
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=365))
    model = load(model, max_seq_length, device=str(state.device))
    with ExitStack() as stack:
        plans: list[Any] = [None]
        if state.is_main_process:
            plans[0] = plan(sources, column, id_column, shard_rows=shard_rows, show_progress_bar=show_progress_bar)
            stack.enter_context(prepare(plans[0], out, model, prompt=prompt))
        work: Plan = broadcast_object_list(plans)[0]
        todo = work.missing(out)
        state.wait_for_everyone()  # until all have looked, none may write
        mine = todo[state.process_index :: state.num_processes]
        start = time.monotonic()
        with tqdm(
            total=sum(shard.rows for shard in mine),
            desc="encoding" if state.num_processes == 1 else f"encoding, process 1 of {state.num_processes}",
            unit=" texts",
            smoothing=0.05,
            disable=not (show_progress_bar and state.is_main_process),
        ) as bar:
            for shard in mine:
                encode_shard(model, work, shard, out, batch_size=batch_size, prompt=prompt)
                bar.update(shard.rows)
        state.wait_for_everyone()
        seconds = time.monotonic() - start
        if state.is_main_process:
            check(work, out)
    return Report(work.rows, sum(shard.rows for shard in todo), seconds, state.num_processes)


def load(
    model: "SentenceTransformer | str", max_seq_length: int | None = None, device: str | None = None
) -> "SentenceTransformer":
    """The model as `encode` wants it.

    Args:
        model: A `SentenceTransformer`, its folder or Hub id, or an exported graph.
        max_seq_length: Tokens after which a text is cut, set on the model; its own by default.
        device: Where to load it.

    Raises:
        ValueError: `max_seq_length` is more than the model can read.
    """
    if isinstance(model, str):
        model = load_model_or_graph(model, device)
    if max_seq_length is not None:
        longest = model.max_seq_length
        if max_seq_length < 1 or (longest is not None and max_seq_length > longest):
            raise ValueError(f"max_seq_length={max_seq_length} is not possible; allowed: 1 to {longest}.")
        model.max_seq_length = max_seq_length
    return model


@contextmanager
def prepare(work: Plan, out: Path, model: "SentenceTransformer", *, prompt: str | None = None) -> Iterator[None]:
    """Make `out` ready for `encode_shard`, or refuse it, and keep a second run away while the block lasts.

    Args:
        work: What is to be encoded.
        out: A new folder, or one that an earlier run with the same model and input wrote.
        model: What encodes it.
        prompt: Put before each text.

    Raises:
        ValueError: `out` belongs to another model or input; the message names what differs.
        FileExistsError: `out` holds something else.
        BlockingIOError: Another run is writing to `out`.
    """
    manifest = {
        "format": 1,
        "model": sentence.fingerprint(model),
        "prompt": prompt,
        "column": work.column,
        "id_column": work.id_column,
        "shard_rows": work.shard_rows,
        "files": [{"name": file.path.name, "sha256": file.sha256, "rows": file.rows} for file in work.files],
    }
    path = out / _MANIFEST
    if out.exists() and not path.exists() and any(entry.name != _LOCK for entry in out.iterdir()):
        raise FileExistsError(f"{out} holds something else; allowed: a new name, an empty folder, or an earlier run's.")
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / _LOCK).acquire(timeout=0):  # the system releases it when this process ends, however it ends
            if path.exists():
                _compare(path, manifest)
            else:
                write_text(path, json.dumps(manifest, indent=1) + "\n")
            for partial in out.glob("shards/.*.partial-*"):  # of processes that were killed
                partial.unlink()
            yield
    except Timeout:
        raise BlockingIOError(f"Another run is writing to {out}; allowed: one at a time.") from None


def _compare(path: Path, manifest: dict[str, Any]) -> None:
    before = json.loads(path.read_text(encoding="utf-8"))
    for name, value in manifest.items():
        if before.get(name) != value:
            raise ValueError(
                f"{path} was written for {name}={_short(before.get(name))}, and this run has {_short(value)}; allowed: the "
                "same, or a new folder."
            )


def encode_shard(
    model: "SentenceTransformer", work: Plan, shard: Shard, out: Path, *, batch_size: int = 32, prompt: str | None = None
) -> None:
    """Encode one shard and write its file, which appears whole or not at all.

    Args:
        model: What encodes it; it sorts the texts by length, inside the shard.
        work: To which the shard belongs.
        shard: One of its shards.
        out: A folder that `prepare` has made ready.
        batch_size: Texts per forward pass.
        prompt: Put before each text.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts, ids = zip(*read_rows(work, shard), strict=True)
    here_N = np.array([text is not None for text in texts])
    dimension = cast(int, model.get_embedding_dimension())
    vectors_ND = np.zeros((len(texts), dimension), dtype=np.float32)
    if here_N.any():
        given = [text for text in texts if text is not None]
        vectors_ND[here_N] = model.encode(given, batch_size=batch_size, prompt=prompt, show_progress_bar=False)
    columns: dict[str, pa.Array] = {"row": pa.array(np.arange(shard.first, shard.first + shard.rows))}
    if work.id_column is not None:
        columns["id"] = pa.array(ids, type=pa.string())
    columns["vector"] = pa.FixedSizeListArray.from_arrays(
        pa.array(vectors_ND.reshape(-1)), dimension, mask=pa.array(~here_N)
    )
    with new_file(shard.file(out)) as partial:
        # Numbers of a vector do not repeat: dictionaries and compression would cost time and save nothing
        pq.write_table(pa.table(columns), partial, compression="none", use_dictionary=False)


def check(work: Plan, out: Path) -> None:
    """Compare the files of a finished run with its plan.

    Raises:
        OSError: A shard is missing, or does not have its rows; the message names it.
    """
    import pyarrow.parquet as pq

    for shard in work.shards:
        file = shard.file(out)
        rows = pq.read_metadata(file).num_rows if file.exists() else None
        if rows != shard.rows:
            raise OSError(f"{file} has {rows} rows; allowed: {shard.rows}. Remove it, and run again.")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
