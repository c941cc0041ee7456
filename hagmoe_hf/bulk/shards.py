"""What is to be encoded: the rows of the input, divided into shards before the first text is encoded."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .texts import Row, expand, read_range, scan

SHARD_ROWS = 10_000  # what a killed process loses at most; on one CPU core, a minute's work
_READ = 1 << 20  # bytes


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
    paths = expand(sources)
    files: list[InputFile] = []
    shards: list[Shard] = []
    first = 0
    size = sum(path.stat().st_size for path in paths)
    with tqdm(total=2 * size, desc="reading", unit="B", unit_scale=True, disable=not show_progress_bar) as bar:
        for path in paths:
            rows, offsets = scan(path, column, id_column, shard_rows, bar.update)
            for start, offset in zip(range(0, rows, shard_rows), offsets, strict=True):
                shards.append(Shard(len(shards), path, start, offset, first + start, min(shard_rows, rows - start)))
            files.append(InputFile(path, _sha256(path, bar.update), rows))
            first += rows
    return Plan(column, id_column, shard_rows, tuple(files), tuple(shards))


def read_rows(work: Plan, shard: Shard) -> list[Row]:
    """Texts and ids of one shard, read from its place in its file.

    Raises:
        OSError: The file has changed since it was planned.
    """
    rows = read_range(shard.path, work.column, work.id_column, shard.start, shard.offset, shard.rows)
    if len(rows) != shard.rows:
        raise OSError(f"{shard.path} has changed while it was encoded; allowed: an input that stays as it is.")
    return rows


def _sha256(path: Path, read: Callable[[int], Any]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ):
            digest.update(block)
            read(len(block))
    return digest.hexdigest()
