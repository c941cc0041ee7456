"""Encode a corpus that does not fit in memory, with any number of processes, to parquet shards.

A shard is a range of rows of one input file, decided before the first text is encoded; its vectors have a temporary name
until they are whole. So a run that was killed goes on with the shards that are missing; nothing is lost, doubled, or moved:

    OUT/manifest.json             which model, which input: another of either is refused
    OUT/shards/00000000.parquet   row (int64, counted over all input files), id (if asked for), vector (float32[D])

The names sort in the order of the rows. A missing text keeps its row, with a missing vector.

Axes:  N rows of a shard   D numbers of a vector
"""

from .encoding import Report, check, encode, encode_shard, load, prepare
from .shards import SHARD_ROWS, InputFile, Plan, Shard, plan, read_rows
from .texts import SUFFIXES

__all__ = [
    "SHARD_ROWS",
    "SUFFIXES",
    "InputFile",
    "Plan",
    "Report",
    "Shard",
    "check",
    "encode",
    "encode_shard",
    "load",
    "plan",
    "prepare",
    "read_rows",
]
