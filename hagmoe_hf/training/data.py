"""Rows of text from files or `datasets`, checked one by one: what cannot be trained on is counted, told and left out."""

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError

from ..texts import refuse_repeated_columns

SUFFIXES = (".parquet", ".jsonl", ".csv")
STATED = ("lang", "license")  # columns of which the report says how many rows have which value, where they are there
NOT_STATED = "not stated"
WITHOUT_DOMAINS = "train"  # the one dataset's name where there is no domain column
LABEL = "label"

Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class DataReport:
    """What was read.

    Attributes:
        read: Rows in the sources, after the filter.
        kept: Rows to train on.
        skipped: Reason -> rows left out for it.
        domains: Domain -> rows kept.
        stated: Column "lang" or "license", where the sources have it -> value -> rows kept.
    """

    read: int
    kept: int
    skipped: dict[str, int]
    domains: dict[str, int]
    stated: dict[str, dict[str, int]] = field(default_factory=dict)

    def with_dictionaries(self, words: "DataReport") -> "DataReport":
        """The same, and what the rows of dictionaries state, which are not trained on."""
        stated = {column: dict(self.stated.get(column, {})) for column in STATED if {column} & {*self.stated, *words.stated}}
        for column, counts in words.stated.items():
            stated[column] |= {f"{value} (dictionaries)": count for value, count in counts.items()}
        return replace(self, stated=stated)

    def __str__(self) -> str:
        lines = [f"Read {self.read} rows, kept {self.kept}."]
        lines += [f"  skipped {count}: {reason}" for reason, count in sorted(self.skipped.items())]
        if len(self.domains) > 1:
            lines += [f"  domain {name}: {count}" for name, count in self.domains.items()]
        lines += [f"  {column} {value}: {count}" for column, of in self.stated.items() for value, count in of.items()]
        return "\n".join(lines)


def load_rows(
    sources: Sequence[str],
    text_columns: Sequence[str],
    *,
    label_column: str | None = None,
    domain_column: str | None = None,
    where: Mapping[str, str] | None = None,
    where_not: Mapping[str, Collection[str]] | None = None,
    split: str = "train",
    max_rows: int | None = None,
    seed: int = 0,
) -> tuple[DatasetDict, DataReport]:
    """Read texts (and labels) into one dataset per domain.

    Args:
        sources: Files ending in .parquet, .jsonl or .csv, or names or folders for `datasets.load_dataset`.
        text_columns: In the order that the loss wants.
        label_column: A column of finite numbers; it becomes `label`.
        domain_column: A column of names, each of which becomes a dataset of its own.
        where: Column -> value that a row must have, compared as text.
        where_not: Column -> values that a row must not have; rows without a value pass.
        split: The split of `datasets.load_dataset`.
        max_rows: Keep a random sample of so many rows.
        seed: Of that sample.

    Returns:
        Domain -> dataset (a single one named "train" without `domain_column`), and what was read.

    Raises:
        ValueError: A column is missing, a file has an unknown ending, or no row is left.
        OSError: A source cannot be read.
    """
    if not sources:
        raise ValueError(f"train_data={list(sources)} names nothing; allowed: {_ENDINGS}, or a name for `datasets`.")
    where, where_not = dict(where or {}), dict(where_not or {})
    needed = [*dict.fromkeys([*text_columns, *filter(None, (label_column, domain_column)), *where, *where_not])]
    wanted = [*dict.fromkeys([*needed, *STATED])]
    skipped: Counter[str] = Counter()
    kept: Columns = {name: [] for name in wanted}
    stated: set[str] = set()
    read = 0
    for source in sources:
        columns, broken = read_columns(source, needed, STATED, split=split)
        skipped.update(broken)
        stated.update(name for name in STATED if name in columns)
        columns = {name: columns.get(name) or [None] * len(columns[needed[0]]) for name in wanted}
        for row in zip(*(columns[name] for name in wanted), strict=True):
            values = dict(zip(wanted, row, strict=True))
            if any(str(values[name]) != value for name, value in where.items()):
                continue
            if any(str(values[name]) in unwanted for name, unwanted in where_not.items()):
                continue
            read += 1
            reason = _clean(values, text_columns, label_column, domain_column)
            if reason:
                skipped[reason] += 1
                continue
            for name in wanted:
                kept[name].append(values[name])
        read += sum(broken.values())
    count = len(kept[wanted[0]])
    if not count:
        raise ValueError(
            f"No row is left of {read} in {', '.join(sources)} (skipped: {dict(skipped)}, where: {where}, where "
            f"not: {where_not}); allowed: at least one good row."
        )
    chosen = np.arange(count)
    if max_rows is not None and max_rows < count:
        chosen = np.sort(np.random.default_rng(seed).permutation(count)[:max_rows])
    datasets = _one_dataset_per_domain(kept, chosen, text_columns, label_column, domain_column)
    domains = {name: len(dataset) for name, dataset in datasets.items()}
    values = {name: _counts([kept[name][row] for row in chosen]) for name in STATED if name in stated}
    return DatasetDict(datasets), DataReport(read, len(chosen), dict(skipped), domains, values)


def _counts(values: Iterable[Any]) -> dict[str, int]:
    """Value as text -> how often, the most frequent first."""
    texts = (NOT_STATED if value is None else str(value).encode("utf-8", "replace").decode() for value in values)
    return dict(Counter(text or NOT_STATED for text in texts).most_common())


def text_length(wanted: int | None, config: Any) -> int:
    """Longest text in tokens to train on: as wanted, or as long as the model has positions for.

    Args:
        wanted: The option `max_length`.
        config: The model's `HagMoeConfig`; RoBERTa's kind has fewer positions for texts than `max_position_embeddings` says.

    Raises:
        ValueError: Too few tokens for a text, or more than the model has positions for.
    """
    longest = config.max_text_length or config.max_position_embeddings
    if wanted is not None and not 3 <= wanted <= longest:
        raise ValueError(f"max_length={wanted} is not possible; allowed: 3 to {longest}.")
    return wanted or longest


def refuse_too_small(datasets: Mapping[str, Any], batch_size: int, drop_last: bool, needs_two: bool) -> None:
    """Refuse a dataset that could not make one useful batch; a smaller last batch is fine.

    Args:
        datasets: Domain -> dataset.
        batch_size: Rows per batch and process.
        drop_last: Whether incomplete batches are dropped.
        needs_two: Whether the loss compares rows of a batch with each other.

    Raises:
        ValueError: Names the domain and its rows.
    """
    for name, dataset in datasets.items():
        if drop_last and len(dataset) < batch_size:
            raise ValueError(
                f"Domain {name!r} has {len(dataset)} row(s), and incomplete batches are dropped; allowed: at least "
                f"per_device_train_batch_size={batch_size} rows, or dataloader_drop_last=False on one process."
            )
        if needs_two and len(dataset) < 2:
            raise ValueError(
                f"Domain {name!r} has {len(dataset)} row(s), and this loss compares the rows of a batch with each other; "
                "allowed: at least 2 rows."
            )


_ENDINGS = "files ending in " + ", ".join(SUFFIXES)


def read_columns(
    source: str, wanted: Sequence[str], optional: Sequence[str] = (), *, split: str = "train"
) -> tuple[Columns, Counter[str]]:
    """Read columns of one source as they are, broken values included.

    Args:
        source: A file ending in .parquet, .jsonl or .csv, or a name or folder for `datasets.load_dataset`.
        wanted: Columns that must be there.
        optional: Columns to read where they are there.
        split: The split of `datasets.load_dataset`.

    Returns:
        Column -> values, and why how many rows could not even be parsed.

    Raises:
        ValueError: A column is missing, or a file has an unknown ending.
        OSError: The source cannot be read.
    """
    path = Path(source)
    if path.suffix in SUFFIXES:
        if not path.is_file():
            raise FileNotFoundError(f"{source} is not there; allowed: an existing file.")
        if path.suffix == ".parquet":
            try:
                names = _chosen(source, wanted, optional, pq.read_schema(path).names)
                return _from_table(pq.read_table(path, columns=names)), Counter()
            except pa.ArrowInvalid as error:
                raise ValueError(f"{source} is no whole Parquet file ({error}); allowed: one.") from error
        # Bytes that are not UTF-8 become lone surrogates, which `_clean` finds in the columns that matter
        text = path.read_bytes().decode("utf-8", errors="surrogateescape").removeprefix("\ufeff")
        present, records, broken = _from_jsonl(text) if path.suffix == ".jsonl" else _from_csv(source, text)
        names = _chosen(source, wanted, optional, present)
        return {name: [record.get(name) for record in records] for name in names}, broken
    if path.is_file():
        raise ValueError(f"{source} has an unknown ending; allowed: {_ENDINGS}.")
    try:
        dataset = load_dataset(source, split=split)
    except DatasetGenerationError as error:
        raise ValueError(f"{source} cannot be read as one data set ({error.__cause__ or error}).") from error
    names = _chosen(source, wanted, optional, dataset.column_names)
    return _from_table(dataset.select_columns(names).with_format("arrow")[:]), Counter()


def _chosen(source: str, wanted: Sequence[str], optional: Sequence[str], present: Iterable[str]) -> list[str]:
    present = list(present)
    missing = [name for name in wanted if name not in present]
    if missing:
        raise ValueError(f"{source} has no column {missing[0]!r}; allowed: its columns {present}.")
    chosen = [*wanted, *(name for name in optional if name in present and name not in wanted)]
    refuse_repeated_columns(source, chosen, present)
    return chosen


def _from_table(table: pa.Table) -> Columns:
    return {name: _texts_or_values(table.column(name)) for name in table.column_names}


def _texts_or_values(column: pa.ChunkedArray) -> list[Any]:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        raw = column.cast(pa.large_binary()).to_pylist()  # a file may claim to hold UTF-8 and not do so
        return [None if value is None else value.decode("utf-8", errors="surrogateescape") for value in raw]
    return column.to_pylist()


def _from_jsonl(text: str) -> tuple[Iterable[str], list[dict[str, Any]], Counter[str]]:
    """Columns, rows, and why how many lines are none."""
    records, broken = [], Counter[str]()
    for line in text.split("\n"):  # not splitlines: a JSON string may hold other line separators
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            broken["not a JSON object"] += 1
    return {name: None for record in records for name in record}, records, broken


def _from_csv(source: str, text: str) -> tuple[Iterable[str], list[dict[str, Any]], Counter[str]]:
    """Columns, rows, and how many rows do not fit the header.

    Raises:
        ValueError: A quote that nothing closes, which would swallow the rows after it, or a column that is there twice.
    """
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a text may be longer than the module's 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header, *rows = [row for row in reader if row] or [[]]  # an empty line is no row
    except csv.Error as error:
        raise ValueError(f"{source}, line {reader.line_num}: {error}; allowed: CSV whose quotes are all closed.") from error
    refuse_repeated_columns(source, header, header)
    records = [dict(zip(header, row, strict=True)) for row in rows if len(row) == len(header)]
    return header, records, +Counter({"not as many values as the header": len(rows) - len(records)})


def _clean(
    values: dict[str, Any], text_columns: Sequence[str], label_column: str | None, domain_column: str | None
) -> str | None:
    """Why a row cannot be used, None where it can; its label becomes a float, in place."""
    for name in (*text_columns, *filter(None, (domain_column,))):
        text = values[name]
        if text is None or (isinstance(text, str) and not text.strip()):
            return f"{name} is empty"
        if not isinstance(text, str):
            return f"{name} is not a text"
        if not is_utf8(text):
            return f"{name} is not UTF-8"
    if label_column is not None:
        try:
            label = float(values[label_column])
        except (TypeError, ValueError):
            return f"{label_column} is not a number"
        if not math.isfinite(label):
            return f"{label_column} is NaN or infinite"
        values[label_column] = label
    return None


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8: bytes that were none have become lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _one_dataset_per_domain(
    columns: Columns,
    chosen: np.ndarray,
    text_columns: Sequence[str],
    label_column: str | None,
    domain_column: str | None,
) -> dict[str, Dataset]:
    rows: dict[str, list[int]] = {}
    for row in chosen:
        rows.setdefault(columns[domain_column][row] if domain_column else WITHOUT_DOMAINS, []).append(int(row))
    names = {name: name for name in text_columns} | ({label_column: LABEL} if label_column else {})
    return {
        domain: Dataset.from_dict({new: [columns[old][row] for row in rows[domain]] for old, new in names.items()})
        for domain in sorted(rows)
    }
