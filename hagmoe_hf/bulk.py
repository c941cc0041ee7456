"""Encode a corpus that does not fit in memory, with any number of processes, to parquet shards.

A shard is a range of rows of one input file, decided before the first text is encoded; its vectors have a temporary name
until they are whole. So a run that was killed goes on with the shards that are missing; nothing is lost, doubled, or moved:

    OUT/manifest.json             which model, which input: another of either is refused
    OUT/shards/00000000.parquet   row (int64, counted over all input files), id (if asked for), vector (float32[D])

The names sort in the order of the rows. A missing text keeps its row, with a missing vector.

Axes:  N rows of a shard   D numbers of a vector
"""

import csv
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from . import sentence
from .evaluation.models import fingerprint
from .files import new_file, write_text

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

SUFFIXES = (".parquet", ".jsonl", ".csv")
SHARD_ROWS = 10_000  # what a killed process loses at most; on one CPU core, a minute's work
_MANIFEST, _LOCK = "manifest.json", ".lock"
_READ = 1 << 20  # bytes

Row = tuple[str | None, str | None]  # text, id


@dataclass(frozen=True)
class InputFile:
    """A file of texts, read once from end to end.

    Attributes:
        path: Where it is.
        sha256: Of its bytes (hex).
        rows: Records in it.
    """

    path: Path
    sha256: str
    rows: int


@dataclass(frozen=True)
class Shard:
    """A range of rows of one input file, and the unit of work.

    Attributes:
        number: Its place among all shards, in the order of the rows.
        path: The input file.
        start: Its first row in that file.
        offset: The byte where that row begins; 0 in parquet, which is found by row.
        first: Its first row over all input files.
        rows: How many.
    """

    number: int
    path: Path
    start: int
    offset: int
    first: int
    rows: int

    def file(self, out: Path) -> Path:
        """Where its vectors are, once they are whole."""
        return out / "shards" / f"{self.number:08d}.parquet"


@dataclass(frozen=True)
class Plan:
    """What is to be encoded, decided from the input alone.

    Attributes:
        column: The texts.
        id_column: What is copied to `id`; None for nothing.
        shard_rows: Rows of a shard; the last one of a file has fewer.
        files: In the order of the rows.
        shards: In the order of the rows.
    """

    column: str
    id_column: str | None
    shard_rows: int
    files: tuple[InputFile, ...]
    shards: tuple[Shard, ...]

    @property
    def rows(self) -> int:
        """Rows of all input files."""
        return sum(file.rows for file in self.files)

    def missing(self, out: Path) -> list[Shard]:
        """The shards that `out` does not hold yet."""
        return [shard for shard in self.shards if not shard.file(out).exists()]


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
        model: A `SentenceTransformer`, or its folder or Hub id; with a name, each process loads it to its own device.
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
        model: A `SentenceTransformer`, or its folder or Hub id.
        max_seq_length: Tokens after which a text is cut, set on the model; its own by default.
        device: Where to load it.

    Raises:
        ValueError: `max_seq_length` is more than the model can read.
    """
    if isinstance(model, str):
        model = sentence.load(model, device=device)
    if max_seq_length is not None:
        longest = model.max_seq_length
        if max_seq_length < 1 or (longest is not None and max_seq_length > longest):
            raise ValueError(f"max_seq_length={max_seq_length} is not possible; allowed: 1 to {longest}.")
        model.max_seq_length = max_seq_length
    return model


def plan(
    sources: Sequence[str | Path],
    column: str = "text",
    id_column: str | None = None,
    *,
    shard_rows: int = SHARD_ROWS,
    show_progress_bar: bool = False,
) -> Plan:
    """Read the input once, check every row, and divide it.

    A broken row is found here, before anything was encoded.

    Args:
        sources: As for `encode`.
        column: As for `encode`.
        id_column: As for `encode`.
        shard_rows: As for `encode`.
        show_progress_bar: Of the bytes read.

    Raises:
        ValueError: A row cannot be read, or a setting is not possible.
        OSError: An input cannot be read.
    """
    if shard_rows < 1:
        raise ValueError(f"shard_rows={shard_rows} is not possible; allowed: 1 or more.")
    paths = _expand(sources)
    files: list[InputFile] = []
    shards: list[Shard] = []
    first = 0
    size = sum(path.stat().st_size for path in paths)
    with tqdm(total=2 * size, desc="reading", unit="B", unit_scale=True, disable=not show_progress_bar) as bar:
        for path in paths:
            scan = _scan_parquet if path.suffix == ".parquet" else _scan_lines
            rows, offsets = scan(path, column, id_column, shard_rows, bar.update)
            for start, offset in zip(range(0, rows, shard_rows), offsets, strict=True):
                shards.append(Shard(len(shards), path, start, offset, first + start, min(shard_rows, rows - start)))
            files.append(InputFile(path, _sha256(path, bar.update), rows))
            first += rows
    return Plan(column, id_column, shard_rows, tuple(files), tuple(shards))


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
        "model": fingerprint(model),
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


def read_rows(work: Plan, shard: Shard) -> list[Row]:
    """Texts and ids of one shard, read from its place in its file.

    Raises:
        OSError: The file has changed since it was planned.
    """
    if shard.path.suffix == ".parquet":
        rows = _read_parquet(work, shard)
    else:
        with shard.path.open("rb") as file:
            header = _header(file, shard.path)
            file.seek(shard.offset)
            records = _records(file, header)
            rows = [_row(record, work.column, work.id_column) for record, _ in zip(records, range(shard.rows), strict=False)]
    if len(rows) != shard.rows:
        raise OSError(f"{shard.path} has changed while it was encoded; allowed: an input that stays as it is.")
    return rows


def _expand(sources: Sequence[str | Path]) -> list[Path]:
    """The files, folders walked in the order of names; all with one of `SUFFIXES`."""
    paths: list[Path] = []
    for source in map(Path, sources):
        if source.is_dir():
            inside = sorted(path for path in source.rglob("*") if path.suffix in SUFFIXES and path.is_file())
            if not inside:
                raise ValueError(f"{source} holds no text; allowed: files ending in {', '.join(SUFFIXES)}.")
            paths += inside
        elif not source.is_file():
            raise FileNotFoundError(f"{source} is not there; allowed: an existing file or folder.")
        else:
            paths.append(source)
    endings = sorted({path.suffix for path in paths})
    if len(endings) != 1 or endings[0] not in SUFFIXES:
        raise ValueError(f"The input ends in {endings}; allowed: one of {', '.join(SUFFIXES)} for all files.")
    return paths


def _scan_parquet(
    path: Path, column: str, id_column: str | None, shard_rows: int, read: Callable[[int], Any]
) -> tuple[int, list[int]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    names = file.schema_arrow.names
    for name in filter(None, (column, id_column)):
        if name not in names:
            raise ValueError(f"{path} has no column {name!r}; allowed: its columns {names}.")
    kind = file.schema_arrow.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise ValueError(f"{path} has {column}: {kind}; allowed: strings.")
    for number, batch in enumerate(file.iter_batches(columns=[column])):
        try:
            batch.column(0).validate(full=True)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path}, batch {number}: {error}; allowed: UTF-8.") from error
    read(path.stat().st_size)
    rows = file.metadata.num_rows
    return rows, [0] * len(range(0, rows, shard_rows))


def _read_parquet(work: Plan, shard: Shard) -> list[Row]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(shard.path)
    groups: list[int] = []
    start = 0  # the first row of the first group that is read
    before = 0
    for index in range(file.num_row_groups):
        after = before + file.metadata.row_group(index).num_rows
        if before < shard.start + shard.rows and after > shard.start:
            start = start if groups else before
            groups.append(index)
        before = after
    columns = [name for name in (work.column, work.id_column) if name is not None]
    rows: list[Row] = []
    for batch in file.iter_batches(row_groups=groups, columns=list(dict.fromkeys(columns))):
        low = max(shard.start - start, 0)
        if low < batch.num_rows:
            wanted = batch.slice(low, min(batch.num_rows, shard.start + shard.rows - start) - low)
            rows += [_row(record, work.column, work.id_column) for record in wanted.to_pylist()]
        start += batch.num_rows
        if start >= shard.start + shard.rows:
            break
    return rows


def _scan_lines(
    path: Path, column: str, id_column: str | None, shard_rows: int, read: Callable[[int], Any]
) -> tuple[int, list[int]]:
    offsets: list[int] = []
    rows = told = 0
    with path.open("rb") as file:
        records = _records(file, _header(file, path))
        while True:
            offset = file.tell()
            try:
                record = next(records, None)
                if record is None:
                    break
                _row(record, column, id_column)
            except ValueError as error:  # also what is not UTF-8 and what is not JSON
                raise ValueError(f"{path}, record {rows + 1} (after byte {offset}): {error}") from error
            if rows % shard_rows == 0:
                offsets.append(offset)
                read(offset - told)
                told = offset
            rows += 1
        read(file.tell() - told)
    return rows, offsets


def _sha256(path: Path, read: Callable[[int], Any]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ):
            digest.update(block)
            read(len(block))
    return digest.hexdigest()


def _header(file: BinaryIO, path: Path) -> list[str] | None:
    """The names in a CSV file's first record, which is read past; None in JSONL, whose records name their fields."""
    if file.read(3) != b"\xef\xbb\xbf":  # a byte order mark
        file.seek(0)
    if path.suffix == ".jsonl":
        return None
    return next(_csv(file), [])


def _csv(file: Iterable[bytes]) -> Iterator[list[str]]:
    csv.field_size_limit(sys.maxsize)  # a text may be longer than the module's 128 KiB
    return csv.reader((line.decode("utf-8") for line in file), strict=True)


def _records(file: Iterable[bytes], header: list[str] | None) -> Iterator[dict[str, Any]]:
    """The records of a JSONL (no header) or CSV file from where it stands; after each, the file stands at the next."""
    if header is None:
        for line in file:
            if line.strip():
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("is no JSON object; allowed: one object with named fields a line.")
                yield record
        return
    try:
        for values in _csv(file):
            if not values:
                continue
            if len(values) != len(header):
                raise ValueError(f"has {len(values)} fields; allowed: {len(header)}, as the first line.")
            yield dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise ValueError(f"{error}; allowed: CSV with double quotes.") from error


def _row(record: dict[str, Any], column: str, id_column: str | None) -> Row:
    for name in filter(None, (column, id_column)):
        if name not in record:
            raise ValueError(f"has no column {name!r}; allowed: its columns {list(record)}.")
    text = record[column]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"has {column}={text!r}; allowed: a text, or null.")
    given = None if id_column is None else record[id_column]
    row = (text, None if given is None else str(given))
    for value in row:
        if value is not None:
            value.encode("utf-8")  # JSON can name half a character, which no tokenizer takes
    return row


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
