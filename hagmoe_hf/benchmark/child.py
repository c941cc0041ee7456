"""One contestant in a process of its own: seconds to load, bytes that encoding takes. Reads and writes JSON."""

import json
import resource
import sys
import time
from pathlib import Path

import psutil
import torch

from .contestants import Contestant


def main() -> None:
    """Answer the request on standard input."""
    import sentence_transformers  # noqa: F401  (imports are not part of loading)

    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    contestant = Contestant(**request["contestant"])
    start = time.perf_counter()
    model = contestant.load()
    seconds = time.perf_counter() - start
    with contestant.running():
        model.encode(request["texts"][0])  # pages the weights in
        loaded = psutil.Process().memory_info().rss
        model.encode(request["texts"], batch_size=request["batch_size"])
    print(json.dumps({"load seconds": seconds, "bytes": max(peak_memory() - loaded, 0)}))


def peak_memory() -> int:
    """Bytes of memory that this program has held at most."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux hands getrusage's value down from the process that started this one
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


if __name__ == "__main__":
    main()
