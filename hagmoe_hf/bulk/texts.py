"""Files of texts, as parquet, JSONL or CSV: every row checked once, then any range of rows read from its place."""

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ..texts import refuse_repeated_columns

SUFFIXES = (".parquet", ".jsonl", ".csv")

Row = tuple[str | None, str | None]  # text, id


def expand(sources: Sequence[str | Path]) -> list[Path]:
    """The files, folders walked in the order of names; all with one of `SUFFIXES`.

    Raises:
        ValueError: There is none, or they end differently.
        FileNotFoundError: One is not there.
    """
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


def scan(path: Path, column: str, id_column: str | None, every: int, read: Callable[[int], Any]) -> tuple[int, list[int]]:
    """Check every row of a file.

    Args:
        path: The file.
        column: The texts.
        id_column: Their ids; None for none.
        every: Rows from one offset to the next.
        read: Is told the bytes that were read, for a progress bar.

    Returns:
        The number of rows, and the byte where rows 0, `every`, 2 * `every`, ... begin; 0 in parquet, which is read by row.

    Raises:
        ValueError: A row cannot be read.
    """
    return (_scan_parquet if path.suffix == ".parquet" else _scan_lines)(path, column, id_column, every, read)


def read_range(path: Path, column: str, id_column: str | None, start: int, offset: int, rows: int) -> list[Row]:
    """Rows `start` to `start + rows` of a file, fewer where it ends before.

    Args:
        path: The file.
        column: The texts.
        id_column: Their ids; None for none.
        start: The first row.
        offset: The byte where it begins, as `scan` found it.
        rows: How many.
    """
    if path.suffix == ".parquet":
        return _read_parquet(path, column, id_column, start, rows)
    with path.open("rb") as file:
        header = _header(file, path)
        file.seek(offset)
        records = _records(file, header)
        return [_row(record, column, id_column) for record, _ in zip(records, range(rows), strict=False)]


def _scan_parquet(
    path: Path, column: str, id_column: str | None, every: int, read: Callable[[int], Any]
) -> tuple[int, list[int]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no whole Parquet file ({error}); allowed: one.") from error
    names = file.schema_arrow.names
    for name in _given(column, id_column):
        if name not in names:
            raise ValueError(f"{path} has no column {name!r}; allowed: its columns {names}.")
    refuse_repeated_columns(path, _given(column, id_column), names)
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
    return rows, [0] * len(range(0, rows, every))


def _read_parquet(path: Path, column: str, id_column: str | None, start: int, rows: int) -> list[Row]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    groups: list[int] = []
    position = 0  # the first row of the first group that is read, then of each batch
    before = 0
    for index in range(file.num_row_groups):
        after = before + file.metadata.row_group(index).num_rows
        if before < start + rows and after > start:
            position = position if groups else before
            groups.append(index)
        before = after
    columns = _given(column, id_column)
    found: list[Row] = []
    for batch in file.iter_batches(row_groups=groups, columns=list(dict.fromkeys(columns))):
        low = max(start - position, 0)
        if low < batch.num_rows:
            wanted = batch.slice(low, min(batch.num_rows, start + rows - position) - low)
            found += [_row(record, column, id_column) for record in wanted.to_pylist()]
        position += batch.num_rows
        if position >= start + rows:
            break
    return found


def _scan_lines(
    path: Path, column: str, id_column: str | None, every: int, read: Callable[[int], Any]
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
            if rows % every == 0:
                offsets.append(offset)
                read(offset - told)
                told = offset
            rows += 1
        read(file.tell() - told)
    return rows, offsets


def _header(file: BinaryIO, path: Path) -> list[str] | None:
    """The names in a CSV file's first record, which is read past; None in JSONL, whose records name their fields."""
    if file.read(3) != b"\xef\xbb\xbf":  # a byte order mark
        file.seek(0)
    if path.suffix == ".jsonl":
        return None
    header = next(_csv(file), [])
    refuse_repeated_columns(path, header, header)
    return header


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


def _given(*columns: str | None) -> list[str]:
    return [name for name in columns if name is not None]


def _row(record: dict[str, Any], column: str, id_column: str | None) -> Row:
    for name in _given(column, id_column):
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
