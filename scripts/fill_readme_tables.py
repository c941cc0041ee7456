"""Fill the README's tables from the committed result files, so that no figure is typed by hand.

    python scripts/fill_readme_tables.py

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`; `TABLES` says how NAME is made from which JSON.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

from hagmoe_hf.benchmark.report import markdown

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "docs/results"


def exactness() -> str:
    """Largest difference from the parent, by way of routing."""
    result = json.loads((RESULTS / "exactness.json").read_text(encoding="utf-8"))
    rows = ["| routing | largest difference | parameters, total | active, against the parent |", "|---|---|---|---|"]
    for mode, row in result["modes"].items():
        total = f"{row['total_parameters'] / 1e6:.1f} M"
        rows.append(f"| {mode} | {row['largest_difference']:.1e} | {total} | {row['active_over_parent']:.3f}x |")
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    rows.append(f"\n{result['texts']} real texts; {versions}; {result['date']}; `{result['command']}`")
    return "\n".join(rows)


def model_code_hash() -> str:
    """Twelve hex digits of the code that computes vectors: the files that travel to the Hub."""
    files = sorted((ROOT / "hagmoe_hf").glob("*_hagmoe.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def gpu() -> str:
    """What was checked on a GPU, or that nothing was, or that the model's code is newer."""
    path = RESULTS / "gpu-checks.json"
    command = "`python scripts/gpu_bench.py docs/results`"
    if not path.exists():
        return f"Not checked on a GPU yet: {command} does it in one call."
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = ["| attention | dtype | padded against sdpa | packed against padded |", "|---|---|---|---|"]
    for dtype in ("float32", "bfloat16"):
        for attention, row in result[f"attention {dtype}"].items():
            values = [
                row.get("did not run") or f"{row[key]:.1e}" for key in ("padded against sdpa", "packed against padded")
            ]
            rows.append(f"| {attention} | {dtype} | {' | '.join(values)} |")
    stale = (
        ""
        if result["code"] == model_code_hash()
        else f" **Stale**: the model's code has changed since; run {command} again."
    )
    rows.append(
        f"\n{result['machine']}; upcycled against parent {result['exactness float32']:.1e}; {result['date']}.{stale}"
    )
    return "\n".join(rows)


def gpu_speed() -> str:
    """Speed against the parent on a GPU, or that it was not measured, or that the model's code is newer."""
    path, command = RESULTS / "gpu-bench.json", "`python scripts/gpu_bench.py docs/results`"
    if not path.exists():
        return f"Not measured on a GPU yet: {command} does it in one call."
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = ["| on a GPU | contestant | times as fast as the parent |", "|---|---|---|"]
    for workload, measured in result["measured"].items():
        for name, ratio in measured.get("speed", {}).items():
            cell = f"{ratio['median']:.2f} [{ratio['lower quartile']:.2f}, {ratio['upper quartile']:.2f}]"
            rows.append(f"| {workload} | {name} | {cell} |")
    stale = "" if result["code"] == model_code_hash() else f" **Stale**: the model's code has changed since; run {command}."
    rows.append(f"\n{result['machine']}; {result['date']}.{stale}")
    return "\n".join(rows)


def speed() -> str:
    """Speed against the parent by workload, from the benchmark's JSON."""
    path = RESULTS / "benchmark.json"
    if not path.exists():
        return "Not measured yet: `make benchmark` does it."
    report = json.loads(path.read_text(encoding="utf-8"))
    text = markdown(report)
    head, tables = text.split("\n\n", 1)
    return tables.split("\n\n")[0] + "\n\n" + head


TABLES: dict[str, Callable[[], str]] = {"exactness": exactness, "gpu": gpu, "gpu_speed": gpu_speed, "speed": speed}


def filled(text: str) -> str:
    """`text` with every table made anew.

    Raises:
        KeyError: A marker names a table that `TABLES` does not know.
    """
    pattern = re.compile(r"(<!-- table:(\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)
    return pattern.sub(lambda match: match[1] + TABLES[match[2]]() + "\n" + match[3], text)


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
