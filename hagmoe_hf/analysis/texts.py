"""The texts to look at, and what is known about each: its domain, its language, the text it belongs to."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

LANGUAGE_COLUMNS = ("language", "lang")
PAIR_COLUMNS = ("anchor", "positive")
UNKNOWN = "unknown"  # the label of a row that has none, where others do


@dataclass(frozen=True)
class Texts:
    """Texts with their labels.

    Attributes:
        texts: N texts.
        domains: N names, or None where nothing is known.
        languages: N names, or None where nothing is known.
        pairs: (P, 2) int64 rows of `texts`, a query and its positive; empty where there are none.
        skipped: Why how many rows of the source were left out.
    """

    texts: tuple[str, ...]
    domains: tuple[str, ...] | None = None
    languages: tuple[str, ...] | None = None
    pairs: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int64))
    skipped: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        if not self.texts:
            raise ValueError(f"0 texts given (skipped: {self.skipped}); allowed: 1 or more.")
        for name, labels in (("domains", self.domains), ("languages", self.languages)):
            if labels is not None and len(labels) != len(self.texts):
                raise ValueError(f"{len(self.texts)} texts and {len(labels)} {name} given; allowed: one for each text.")

    def take(self, rows: np.ndarray) -> "Texts":
        """The same in another order: `rows` is a permutation of range(N)."""
        place = np.empty(len(rows), dtype=np.int64)
        place[rows] = np.arange(len(rows))

        def reordered(labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
            return None if labels is None else tuple(labels[row] for row in rows)

        texts = tuple(self.texts[row] for row in rows)
        return Texts(texts, reordered(self.domains), reordered(self.languages), place[self.pairs], self.skipped)


def label_ids(labels: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Names in order, and (N,) int64 which of them each label is."""
    names, ids = np.unique(np.asarray(labels, dtype=object).astype(str), return_inverse=True)
    return tuple(names.tolist()), ids


def read_texts(
    sources: Sequence[str], *, text_column: str | None = None, max_texts: int | None = None, seed: int = 0
) -> Texts:
    """Read texts from files or `datasets`.

    The columns `domain` and `language` (or `lang`) are used where they are there. Without a column `text`, the columns
    `anchor` and `positive` make two texts of each row, which are then known to belong together.

    Args:
        sources: Files ending in .parquet, .jsonl or .csv, or names or folders for `datasets.load_dataset`.
        text_column: The column of texts, where it is not called `text`.
        max_texts: Keep a random sample of about so many.
        seed: Of the sample.

    Raises:
        ValueError: No text is left, or a source has no column of texts.
        ImportError: A reader is missing; the message names what to install.
        OSError: A source cannot be read.
    """
    try:
        from ..training.data import is_utf8, read_columns
    except ModuleNotFoundError as error:
        raise ImportError(f"Reading texts needs {error.name}: pip install hagmoe_hf[sentence]") from error
    if not sources:
        raise ValueError("No file of texts is given; allowed: .parquet, .jsonl or .csv files, or names for `datasets`.")
    texts: list[str] = []
    labels: dict[str, list[str]] = {"domain": [], "language": []}
    pairs: list[tuple[int, int]] = []
    skipped: Counter[str] = Counter()
    rows, broken = _read_rows(sources, text_column, read_columns)
    skipped.update(broken)
    per_row = 2 if rows and "text" not in rows[0] else 1
    if max_texts is not None and len(rows) * per_row > max_texts:
        chosen = np.random.default_rng(seed).permutation(len(rows))[: max(max_texts // per_row, 1)]
        rows = [rows[row] for row in np.sort(chosen)]
    for row in rows:
        found = [row["text"]] if "text" in row else [row[name] for name in PAIR_COLUMNS]
        if not all(isinstance(text, str) and text.strip() and is_utf8(text) for text in found):
            skipped["no text"] += 1
            continue
        if len(found) == 2:
            pairs.append((len(texts), len(texts) + 1))
        texts += found
        for name, values in labels.items():
            values += [str(row.get(name) or UNKNOWN)] * len(found)
    domains, languages = (None if set(values) <= {UNKNOWN} else tuple(values) for values in labels.values())
    return Texts(tuple(texts), domains, languages, np.array(pairs, dtype=np.int64).reshape(-1, 2), dict(skipped))


def _read_rows(sources: Sequence[str], text_column: str | None, read_columns: Callable) -> tuple[list[dict], Counter]:
    """Rows with `text`, or with both columns of a pair, and with `domain` and `language` where they are there."""
    rows: list[dict] = []
    broken: Counter[str] = Counter()
    optional = ("domain", *LANGUAGE_COLUMNS, *(() if text_column else ("text", *PAIR_COLUMNS)))
    for source in sources:
        columns, reasons = read_columns(source, [text_column] if text_column else [], optional)
        broken.update(reasons)
        if text_column:
            columns["text"] = columns.pop(text_column)
        if "text" not in columns and not set(PAIR_COLUMNS) <= set(columns):
            read_columns(source, ["text"])  # raises, naming the columns that are there
        for name in LANGUAGE_COLUMNS[1:]:
            if name in columns:
                columns.setdefault("language", columns.pop(name))
        rows += [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return rows, broken
