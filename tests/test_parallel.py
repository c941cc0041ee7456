"""Tensor- and expert-parallel plans, on two processes of this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY

TESTS = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["bert", "modernbert"])
@pytest.mark.parametrize(("kind", "rows"), [("tp", TINY["hidden_size"] // 2), ("ep", 4)])
def test_two_ranks_compute_what_one_does(kind, rows, shape, tmp_path):
    """A bias that every rank adds, or a head cut in two, shows only when the ranks are put together."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    done = subprocess.run(
        [*command, str(TESTS / "parallel_check.py"), kind, shape, str(tmp_path / "model")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (result,) = (line.split() for line in done.stdout.splitlines() if line.startswith("RESULT"))
    assert float(result[1]) <= 1e-5
    assert int(result[2]) == rows, "the rank holds the whole parameter: nothing was sharded"
    assert "match nothing" not in done.stderr
