"""Plain text out of pod, reStructuredText, HTML, man pages and gettext files. Good enough for pairs, no more."""

import itertools
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import NamedTuple

from .text import squeeze

_POD_CODES = re.compile(r"[BCFISXEZ]<<*\s*([^<>]*?)\s*>+")
_POD_LINKS = re.compile(r"L<(?:([^<>|]*)\|)?([^<>]*)>")
_RST_RULE = re.compile(r"([=\-~^\"'`#*+.:_])\1+")
_ROFF_NAMES = {"(oq": "'", "(lq": '"', "(rq": '"', "(en": "-", "(em": "-", "(bu": "-", "~": " ", " ": " ", "c": ""}
_FONT_MACRO = re.compile(r"\.(B|I|BR|IR|RB|RI|BI|IB|SM|SB|Nm|Nd|Xr|Fl|Ar)\s+(.*)")
_PARAGRAPH_MACRO = re.compile(r"\.(PP|LP|P|TP|IP|HP|sp|SS|RS|RE|Pp|br)\b")


def plain_pod(text: str) -> str:
    """Perl's pod without its formatting codes, up to four levels of nesting."""
    for _ in range(4):
        text = _POD_CODES.sub(lambda code: {"gt": ">", "lt": "<"}.get(code[1], code[1]), text)
        text = _POD_LINKS.sub(lambda link: link[1] or link[2], text)
    return text


def pod_sections(text: str, levels: str) -> list[tuple[str, str]]:
    """(heading, body) of pod's sections, both raw; `levels` like "2" or "23"."""
    return re.findall(rf"^=head[{levels}] (.+?)\n\n(.*?)(?=^=head|\Z)", text, flags=re.M | re.S)


def plain_pod_body(body: str) -> str:
    """A section's text without commands and codes."""
    return squeeze(re.sub(r"^=\w+.*$", "", plain_pod(body), flags=re.M))


def plain_rst(text: str) -> str:
    """reStructuredText without directives, roles, links and emphasis."""
    text = re.sub(r"^\.\. [\w-]+::.*(?:\n[ \t]+.*)*", "", text, flags=re.M)
    text = re.sub(r"^\.\. .*(?:\n[ \t]+\S.*)*", "", text, flags=re.M)
    text = re.sub(r":[\w:.-]+:`~?!?([^`<]*?)\s*(?:<[^`>]*>)?`", r"\1", text)
    text = re.sub(r"`([^`<]*?)\s*<[^`>]*>`_+", r"\1", text)
    text = re.sub(r"``([^`]*)``", r"\1", text)
    text = re.sub(r"`([^`]*)`_*", r"\1", text)
    return re.sub(r"\*\*?([^*\n]+)\*\*?", r"\1", text)


def rst_sections(text: str) -> Iterator[tuple[str, str]]:
    """(heading, raw body) of underlined headings."""
    lines = text.split("\n")
    rules = [number for number in range(1, len(lines)) if _is_underline(lines[number].rstrip(), lines[number - 1])]
    for start, end in itertools.pairwise([*rules, len(lines) + 1]):
        yield lines[start - 1].strip(), "\n".join(lines[start + 1 : end - 1])


def _is_underline(rule: str, heading: str) -> bool:
    return (
        len(rule) >= 3
        and _RST_RULE.fullmatch(rule) is not None
        and bool(heading.strip())
        and not heading.startswith((" ", "\t"))
        and len(rule) >= len(heading.rstrip()) - 2
        and not _RST_RULE.fullmatch(heading.strip())
    )


class HtmlSection(NamedTuple):
    """A heading and what follows it."""

    heading: str
    body: str
    anchor: str | None
    tag: str


class _SectionParser(HTMLParser):
    HEADINGS = ("h1", "h2", "h3", "h4", "h5", "dt")
    SKIPPED = ("script", "style", "pre", "table")
    BREAKS = ("p", "li", "dd", "br", "div")

    def __init__(self) -> None:
        super().__init__()
        self.sections: list[list[str | None]] = []  # heading, body, anchor, tag
        self.skip_depth = 0
        self.open_heading: list[str | None] | None = None  # tag, text, anchor

    def handle_starttag(self, tag, attrs):
        names = dict(attrs)
        anchor = names.get("id") or names.get("name")
        if tag in self.SKIPPED:
            self.skip_depth += 1
        if tag in self.HEADINGS and not self.skip_depth:
            self.open_heading = [tag, "", names.get("id")]
        if anchor and self.open_heading is not None and self.open_heading[2] is None:
            self.open_heading[2] = anchor
        if tag in self.BREAKS:
            self._add("\n")

    def handle_endtag(self, tag):
        if tag in self.SKIPPED:
            self.skip_depth = max(0, self.skip_depth - 1)
        if self.open_heading is not None and tag == self.open_heading[0]:
            self.sections.append([squeeze(self.open_heading[1] or ""), "", self.open_heading[2], tag])
            self.open_heading = None

    def handle_data(self, data):
        if self.skip_depth:
            return
        if self.open_heading is not None:
            self.open_heading[1] = (self.open_heading[1] or "") + data
        else:
            self._add(data)

    def _add(self, text: str) -> None:
        if self.sections:
            self.sections[-1][1] = (self.sections[-1][1] or "") + text


def html_sections(page: str) -> list[HtmlSection]:
    """The sections of a page, without its tables, scripts and preformatted text."""
    parser = _SectionParser()
    parser.feed(page)
    return [
        HtmlSection(heading or "", re.sub(r"[ \t\r\f\v]+", " ", body or "").strip(), anchor, tag or "")
        for heading, body, anchor, tag in parser.sections
    ]


def plain_roff(text: str) -> str:
    """Text of a man page without fonts and escapes."""
    text = re.sub(r"\\f[BIRPC]|\\f\(..|\\f\[[^\]]*\]", "", text)
    text = text.replace("\\-", "-").replace("\\&", "").replace("\\e", "\\")
    for escape in ("\\|", "\\:", "\\/", "\\,"):
        text = text.replace(escape, "")
    text = re.sub(r"\\\((aq|cq)", "'", text)
    for name, character in _ROFF_NAMES.items():
        text = text.replace("\\" + name, character)
    text = re.sub(r"\\\[u([0-9A-F]{4,5})\]", lambda code: chr(int(code[1], 16)), text)
    return re.sub(r"\\\*\(..|\\\*\[[^\]]*\]|\\\[[^\]]*\]|\\s[+-]?\d+|\\m\[[^\]]*\]|\\\(..", "", text)


def man_sections(page: str) -> dict[str, list[str]]:
    """Section title in capitals -> paragraphs; what is set without filling (examples, synopses) is left out."""
    sections: dict[str, list[str]] = {}
    paragraph: list[str] = []
    title: str | None = None
    unfilled = False

    def flush() -> None:
        if title is not None and paragraph:
            sections.setdefault(title, []).append(squeeze(plain_roff(" ".join(paragraph))))
        paragraph.clear()

    for line in page.split("\n"):
        if heading := re.match(r"\.S[Hh]\s+(.*)", line):
            flush()
            title = squeeze(plain_roff(heading[1].strip('"'))).upper()
            unfilled = False
        elif line.startswith((".nf", ".EX")):
            unfilled = True
        elif line.startswith((".fi", ".EE")):
            unfilled = False
        elif unfilled or line.startswith(('.\\"', "'\\\"")):
            continue
        elif macro := _PARAGRAPH_MACRO.match(line):
            if macro[1] != "br":
                flush()
        elif macro := _FONT_MACRO.match(line):
            words = [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|(\S+)', macro[2])]
            joint = "" if len(macro[1]) == 2 and macro[1][0] != "S" else " "
            paragraph.append(joint.join(words))
        elif not line.startswith("."):
            paragraph.append(line)
    flush()
    return sections


class Message(NamedTuple):
    """An entry of a gettext file."""

    source: str
    translation: str
    default: str | None  # Plone keeps the English text in a comment


def gettext_messages(text: str) -> Iterator[Message]:
    """The finished entries of a .po file: no fuzzy, plural or obsolete ones."""
    for entry in re.split(r"\n\s*\n", text):
        if "#, fuzzy" in entry or "msgid_plural" in entry or "\n#~" in "\n" + entry:
            continue
        default = re.search(r'#\. Default: "((?:[^"\\]|\\.)*)"', entry)
        yield Message(
            _gettext_field(entry, "msgid"),
            _gettext_field(entry, "msgstr"),
            default[1].replace('\\"', '"') if default else None,
        )


def _gettext_field(entry: str, name: str) -> str:
    field = re.search(name + r' ((?:"(?:[^"\\]|\\.)*"\s*)+)', entry)
    if not field:
        return ""
    text = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', field[1]))
    return text.replace('\\"', '"').replace("\\n", " ").replace("\\t", " ")
