"""Run the programs of examples/ at their full length, one after the other, and write down what they took and printed.

    python scripts/time_examples.py docs/results/examples.json

A program's time also goes into its docstring, and time and output of all into examples/README.md. Seconds are those that
one core worked (torch gets one thread), so it does not matter what else the machine does. Programs that have not changed
since they were last run are left out: an interrupted call goes on where it stopped.
"""

import argparse
import ast
import hashlib
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from hagmoe_hf.files import write_text

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
TIME = re.compile(r"^Time: .*$", re.MULTILINE)


def code_hash(source: str) -> str:
    """Twelve hex digits of a program, but for the line that says what it took."""
    return hashlib.sha256(TIME.sub("", source).encode()).hexdigest()[:12]


def time_line(entry: dict | None) -> str:
    """What a program's docstring says about its time; None where it was not run yet."""
    return "Time: not measured yet." if entry is None else f"Time: {readable(entry['seconds'])} on one core."


def readable(seconds: float) -> str:
    """Seconds to two digits, as nobody's machine is this one; minutes where they are many."""
    return f"{seconds / 60:.1f} min" if seconds >= 100 else f"{seconds:.0f} s"


def run(program: Path) -> dict:
    """Run one program in a folder of its own.

    Raises:
        subprocess.CalledProcessError: It failed; its messages have been shown.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(program)]
        output = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(seconds, 1), "date": date.today().isoformat(), "output": printed(output)}


def printed(output: str) -> list[str]:
    """The lines that a program itself printed; the trainers' logs, which are dictionaries, are not."""
    return [line.rstrip() for line in output.splitlines() if not line.startswith("{")]


def table(result: dict) -> str:
    """What each program shows and takes, and what it printed."""
    lines = ["| program | what it shows | one core |", "|---|---|---|"]
    sections = []
    for program in sorted(EXAMPLES.glob("*.py")):
        name, entry = program.name, result["programs"].get(program.name)
        what = " ".join(ast.get_docstring(ast.parse(program.read_text("utf-8"))).split("\n\n")[0].split())
        took = readable(entry["seconds"]) if entry else "not measured yet"
        lines.append(f"| [`{name}`]({name}) | {what} | {took} |")
        if entry:
            sections.append("\n".join([f"`{name}` printed:", "", "```text", *entry["output"], "```"]))
    versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
    about = f"{result['machine']}; {versions}; `{result['command']}`"
    return "\n\n".join(["\n".join(lines), about, *sections])


def filled(text: str, result: dict) -> str:
    """The text of examples/README.md with the table of `result` between its markers."""
    pattern = re.compile(r"(<!-- table:examples -->\n).*?(<!-- /table -->)", re.DOTALL)
    return pattern.sub(lambda match: f"{match[1]}{table(result)}\n{match[2]}", text)


def main() -> None:
    """Run what has changed; write everything after each program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="the JSON file to write, or to bring up to date")
    parser.add_argument("programs", nargs="*", help="such as embed.py; all by default")
    options = parser.parse_args()
    sources = {program.name: program.read_text(encoding="utf-8") for program in sorted(EXAMPLES.glob("*.py"))}
    unknown = set(options.programs) - set(sources)
    if unknown:
        parser.error(f"programs={sorted(unknown)} are not there; allowed: {', '.join(sources)}")
    known = json.loads(options.result.read_text(encoding="utf-8"))["programs"] if options.result.exists() else {}
    known = {name: entry for name, entry in known.items() if name in sources}
    result = {
        "command": f"python scripts/time_examples.py {options.result}",
        "machine": f"{platform.machine()} CPU",
        "versions": {name: version(name) for name in ("torch", "transformers", "sentence-transformers")},
        "programs": known,
    }
    for name in tqdm(options.programs or list(sources), desc="Running"):
        if known.get(name, {}).get("code") != code_hash(sources[name]):
            known[name] = run(EXAMPLES / name) | {"code": code_hash(sources[name])}
        write(options.result, result, sources)


def write(path: Path, result: dict, sources: dict[str, str]) -> None:
    """The results, and what follows from them: the times in docstrings, the table in the README."""
    write_text(path, json.dumps(result, indent=1) + "\n")
    for name, source in sources.items():
        write_text(EXAMPLES / name, TIME.sub(time_line(result["programs"].get(name)), source, count=1))
    readme = EXAMPLES / "README.md"
    write_text(readme, filled(readme.read_text(encoding="utf-8"), result))


if __name__ == "__main__":
    main()
