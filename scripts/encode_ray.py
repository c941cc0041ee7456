"""Bulk encoding on a Ray cluster: the shards of `hagmoe encode`, given out by Ray Data.

    python scripts/encode_ray.py MODEL TEXTS.parquet --out vectors --actors 4

Without a cluster Ray starts one on this machine. On several machines the input and `--out` must lie on storage that all of
them mount. An actor that dies is replaced, and its shard encoded again; a killed run goes on where it stopped, with Ray or
without.
"""

import time
from pathlib import Path
from typing import Annotated, Any

import ray
import torch
import typer

import hagmoe_hf  # noqa: F401  registers the architecture
from hagmoe_hf import bulk


class Encoder:
    """An actor: loads the model once, then writes shard after shard."""

    def __init__(self, model: str, max_seq_length: int | None, plan: bulk.Plan, out: Path, options: dict[str, Any]):
        self.model = bulk.load(model, max_seq_length)
        self.plan, self.out, self.options = plan, out, options

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Encode the shards of these numbers; what Ray moves around is the numbers alone."""
        for number in batch["item"]:
            bulk.encode_shard(self.model, self.plan, self.plan.shards[number], self.out, **self.options)
        return batch


def main(
    model: str,
    sources: list[str],
    out: Annotated[Path, typer.Option()],
    column: str = "text",
    id_column: Annotated[str | None, typer.Option()] = None,
    shard_rows: int = bulk.SHARD_ROWS,
    batch_size: int = 32,
    prompt: Annotated[str | None, typer.Option()] = None,
    max_seq_length: Annotated[int | None, typer.Option()] = None,
    actors: int = 2,
) -> None:
    """Encode SOURCES with MODEL on a Ray cluster; the options are those of `hagmoe encode`."""
    out = out.absolute()  # actors have working directories of their own
    plan = bulk.plan([Path(source).absolute() for source in sources], column, id_column, shard_rows=shard_rows)
    with bulk.prepare(plan, out, bulk.load(model, max_seq_length, device="cpu"), prompt=prompt):
        todo, start = plan.missing(out), time.monotonic()
        if todo:
            ray.data.from_items([shard.number for shard in todo], override_num_blocks=len(todo)).map_batches(
                Encoder,
                batch_size=1,
                fn_constructor_args=(
                    str(Path(model).absolute()) if Path(model).is_dir() else model,
                    max_seq_length,
                    plan,
                    out,
                    {"batch_size": batch_size, "prompt": prompt},
                ),
                compute=ray.data.ActorPoolStrategy(size=actors),
                num_gpus=1 if torch.cuda.is_available() else 0,
            ).materialize()
        bulk.check(plan, out)
        print(bulk.Report(plan.rows, sum(shard.rows for shard in todo), time.monotonic() - start, actors))


if __name__ == "__main__":
    typer.run(main)
