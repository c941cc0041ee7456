"""The code blocks of the documentation, for the test that runs them and the script that times them."""

import re
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

NEEDS = ("gpu", "hub", "time")
FENCE = re.compile(r"^(?:[ ]*<!-- needs: (\w+) -->\n)?^([ ]*)```([^\n`]*)\n(.*?)^\2```[ ]*$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page.

    Attributes:
        heading: The heading that it stands under.
        line: Of its fence in the page, from 1.
        language: What stands after the fence, "" for none.
        code: Its lines.
        needs: What the mark before it says: "gpu", "hub" (a network) or "time" (minutes, or a whole corpus); "" without.
    """

    heading: str
    line: int
    language: str
    code: str
    needs: str


def read_blocks(page: Path) -> list[Block]:
    """The blocks of a Markdown page, in order, but for the site's directives.

    Raises:
        ValueError: A mark that is none of `NEEDS`.
    """
    text = page.read_text(encoding="utf-8")
    blocks = []
    for match in FENCE.finditer(text):
        needs, _, language, code = match.groups()
        if language.startswith("{"):
            continue
        if needs not in (None, *NEEDS):
            raise ValueError(f"{page.name}: needs: {needs!r} is no mark; allowed: {', '.join(NEEDS)}.")
        before = text[: match.start(2)]
        # A comment in a shell block is no heading
        headings = re.findall(r"^#+ (.*)$", FENCE.sub("", before), re.MULTILINE)
        heading = headings[-1] if headings else page.name
        blocks.append(Block(heading, before.count("\n") + 1, language.strip(), dedent(code), needs or ""))
    return blocks
