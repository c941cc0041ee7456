"""Fill the README's tables from the committed result files, so that no figure is typed by hand.

    python scripts/fill_readme_tables.py

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`; `TABLES` says how NAME is made from which JSON.
"""

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


TABLES: dict[str, Callable[[], str]] = {"exactness": exactness}


def filled(text: str) -> str:
    """`text` with every table made anew.

    Raises:
        KeyError: A marker names a table that `TABLES` does not know.
    """
    pattern = re.compile(r"(<!-- table:(\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)
    return pattern.sub(lambda match: match[1] + TABLES[match[2]]() + "\n" + match[3], text)


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
