"""Time a mixture beside its parent and its rivals: `hagmoe benchmark` under the name that readers look for.

python scripts/benchmark.py PARENT -o docs/results/benchmark
"""

import typer

from hagmoe_hf.cli.benchmark import benchmark

if __name__ == "__main__":
    typer.run(benchmark)
