"""Fill the README's tables from the committed result files, so that no figure is typed by hand.

    python scripts/fill_readme_tables.py

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`; `TABLES` says how NAME is made from which JSON.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

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
    command = "`python scripts/gpu_checks.py docs/results/gpu-checks.json`"
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


TABLES: dict[str, Callable[[], str]] = {"exactness": exactness, "gpu": gpu}


def filled(text: str) -> str:
    """`text` with every table made anew.

    Raises:
        KeyError: A marker names a table that `TABLES` does not know.
    """
    pattern = re.compile(r"(<!-- table:(\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)
    return pattern.sub(lambda match: match[1] + TABLES[match[2]]() + "\n" + match[3], text)


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
