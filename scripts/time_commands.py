"""Follow README.md and the quick start literally, each in a fresh clone, and write down how long each block takes.

    python scripts/time_commands.py build/fresh docs/results/command-times.json                     # all, in order
    python scripts/time_commands.py build/fresh docs/results/command-times.json --only "make test"  # one of them
    python scripts/time_commands.py build/fresh docs/results/command-times.json --page docs/quickstart.md

FOLDER gets a clone of this repository for each page where it has none, at the commit that is checked out here. Each block
is a step, the Python of a page is one session, and a step's time is in the file as soon as it has ended; those of other
steps stay. Blocks that need a GPU, the Hub or much time are marked so in the page, and left out. For PARENT in a page, a
clone has a link of that name to the packaged all-MiniLM-L6-v2.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import time
from pathlib import Path

from doc_blocks import Block, read_blocks
from tqdm.auto import tqdm

from hagmoe_hf.demo import parent_folder
from hagmoe_hf.files import write_text

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/quickstart.md")
END = "--- the block has ended ---"
SESSION = f"""
import json, sys
names = {{"__name__": "__main__"}}
for line in sys.stdin:
    exec(compile(json.loads(line), "page", "exec"), names)
    print({END!r}, flush=True)
"""


def name_of(block: Block) -> str:
    """What the table calls a step: a shell block by its commands, a Python block by its heading."""
    if block.language == "python":
        return f"Python: {block.heading}"
    return "; ".join(line.split(" #")[0].strip() for line in block.code.splitlines() if line.strip())


def steps(page: str) -> list[Block]:
    """The blocks of a page that can be run here."""
    return [block for block in read_blocks(ROOT / page) if block.language in ("bash", "python") and not block.needs]


def merged(times: dict, page: str, name: str, entry: dict) -> dict:
    """`times` with one more entry, in the order of the pages; steps that the pages no longer have are dropped."""
    known = times.get("pages", {})
    known.setdefault(page, {})[name] = entry
    order = {page: [name_of(block) for block in steps(page)] for page in PAGES}
    kept = {
        page: {name: known[page][name] for name in names if name in known.get(page, {})} for page, names in order.items()
    }
    return {"command": "python scripts/time_commands.py build/fresh docs/results/command-times.json", "pages": kept}


class Reader:
    """Somebody who follows a page in a folder: shell blocks in shells, Python blocks in one session."""

    def __init__(self, folder: Path):
        self.folder = folder
        # What `source .venv/bin/activate` does, for every shell alike
        self.environment = {**os.environ, "PATH": f"{folder.resolve() / '.venv/bin'}:{os.environ['PATH']}"}
        self.environment.pop("PYTHONPATH", None)
        self.session: subprocess.Popen | None = None

    def follow(self, block: Block) -> None:
        """Run a block.

        Raises:
            subprocess.CalledProcessError: It failed.
        """
        if block.language == "bash":
            command = ["bash", "-euo", "pipefail", "-c", block.code]
            subprocess.run(command, cwd=self.folder, env=self.environment, check=True)
            return
        if self.session is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self.session = subprocess.Popen(["python", "-c", SESSION], cwd=self.folder, env=self.environment, **pipes)
        self.session.stdin.write(json.dumps(block.code) + "\n")
        self.session.stdin.flush()
        for line in self.session.stdout:
            if line.strip() == END:
                return
            print(line, end="")
        raise subprocess.CalledProcessError(self.session.wait(), name_of(block))

    def close(self) -> None:
        """End the session."""
        if self.session is not None:
            self.session.communicate()


def clone_for(page: str, folder: Path) -> Path:
    """The clone that a page is followed in, made where it is missing: another page's would be half installed already."""
    clone = folder / Path(page).stem
    if not clone.exists():
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        (clone / "PARENT").symlink_to(parent_folder())
    return clone


def git(*words: str) -> str:
    """What git says about this repository."""
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Clone, follow the pages, write the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the fresh clones; one that exists is used as it is")
    parser.add_argument("out", type=Path, help="JSON file that receives the times")
    parser.add_argument("--only", help="steps with this in their name; a page's Python goes together: Python")
    parser.add_argument("--page", choices=PAGES, help="follow this one alone")
    args = parser.parse_args()
    pages = [args.page] if args.page else PAGES
    todo = [(page, block) for page in pages for block in steps(page) if (args.only or "") in name_of(block)]
    if not todo:
        raise SystemExit(
            f"--only {args.only!r} is no step; allowed: a part of {[name_of(b) for p in pages for b in steps(p)]}"
        )
    where = {"commit": git("rev-parse", "--short", "HEAD"), "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    readers = {page: Reader(clone_for(page, args.folder)) for page in dict.fromkeys(page for page, _ in todo)}
    for page, block in tqdm(todo):
        tqdm.write(f"{page}: {name_of(block)}")
        begun = time.monotonic()
        readers[page].follow(block)
        entry = {"seconds": round(time.monotonic() - begun, 1), "date": datetime.date.today().isoformat(), **where}
        times = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
        write_text(args.out, json.dumps(merged(times, page, name_of(block), entry), indent=1) + "\n")
    for reader in readers.values():
        reader.close()


if __name__ == "__main__":
    main()
