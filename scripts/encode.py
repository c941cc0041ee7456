"""Bulk encoding: `hagmoe encode` as a script, for `accelerate launch`.

accelerate launch --num_processes 8 scripts/encode.py MODEL TEXTS.parquet --out vectors
"""

import typer

from hagmoe_hf.cli.encode import encode

if __name__ == "__main__":
    typer.run(encode)
