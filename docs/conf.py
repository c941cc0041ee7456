"""The documentation site: `make docs` builds it into build/docs."""

import re
import sys
from pathlib import Path
from textwrap import indent

sys.path.insert(0, str(Path(__file__).parents[1]))

from hagmoe_hf import __version__

project = "HAG-MoE"
author = "the HAG-MoE authors"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"HAG-MoE {release}"
html_show_copyright = False
myst_heading_anchors = 3
highlight_language = "none"

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say shapes and dtypes, which annotations cannot
autodoc_default_options = {"members": True}
napoleon_use_ivar = True
napoleon_use_rtype = False

# References inside the project must resolve; other libraries' pages are not at hand while building
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!hagmoe_hf).*")]


def from_markdown(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are Markdown; a module's begins with its duty, and goes on with notes for those who read the source."""
    text = "\n".join(lines)
    if what == "module":
        text = text.split("\n\n")[0]
    fence = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
    text = fence.sub(lambda m: f"{m[1]}.. code-block:: {m[2]}\n\n" + indent(m[3], "    "), text)
    text = re.sub(r"\[(`[^`]+`)\](?!\()", r"\1", text)  # [`Name`], transformers' way to write a link
    # A letter right after a literal would not end it in reStructuredText
    text = re.sub(r"(?<!`)`([^`]+)`(?!`)(?=(\w?))", lambda m: f"``{m[1]}``" + "\\ " * bool(m[2]), text)
    lines[:] = text.split("\n")


def is_foreign(app, what, name, obj, skip, options) -> bool | None:
    """An alias of another library's class is not documented here."""
    is_class = isinstance(obj, type) and not obj.__module__.startswith("hagmoe_hf")
    return True if is_class else None


def setup(app) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", from_markdown, priority=100)  # before napoleon, which takes sections apart
    app.connect("autodoc-skip-member", is_foreign)
