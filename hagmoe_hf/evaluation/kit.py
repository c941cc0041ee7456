"""Local evaluation data: find the sets in a folder, read them, and refuse what is broken with its file and line.

Layout:  ROOT/KIND/SET/NAME.jsonl or NAME.jsonl.gz, one JSON object a line
         ROOT/manifest.json, optional: {"KIND/SET": {"domain": ..., "languages": [...], "licence": ..., ...}}
"""

import gzip
import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

SHIPPED = Path(__file__).parent / "kit"  # the sets that come with the package
UNSTATED = "unstated"  # domain or licence of a set that no manifest describes
UNDETERMINED = "und"  # ISO 639 code for "language not stated"

Row = dict[str, Any]


class KitError(ValueError):
    """Evaluation data that cannot be trusted; the message names the file and, where there is one, the line."""


class _Rule(NamedTuple):
    holds: Callable[[Any], bool]
    allowed: str


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_TEXT = _Rule(_is_text, "a text that is not empty")
_TEXTS = _Rule(_are_texts, "a list of 1 or more texts")
_NUMBER = _Rule(_is_number, "a finite number")
_LABEL = _Rule(lambda value: _is_text(value) or (_is_number(value) and value == int(value)), "a text or an integer")
_BINARY = _Rule(lambda value: _is_number(value) and value in (0, 1), "0 or 1")
_GRADE = _Rule(lambda value: _is_number(value) and value >= 0 and value == int(value), "an integer of at least 0")

_PAIR = {"sentence1": _TEXT, "sentence2": _TEXT}
_LABELLED = {"text": _TEXT, "label": _LABEL}
_DOCUMENT = {"_id": _TEXT, "text": _TEXT}

# Kind -> file -> field -> rule. Every file must be there; "*" is any number of files named LANGUAGE-LANGUAGE.
_SCHEMAS: dict[str, dict[str, dict[str, _Rule]]] = {
    "bitext": {"*": _PAIR},
    "classification": {"train": _LABELLED, "test": _LABELLED},
    "clustering": {"test": _LABELLED},
    "pair_classification": {"test": {**_PAIR, "label": _BINARY}},
    "reranking": {"test": {"query": _TEXT, "positive": _TEXTS, "negative": _TEXTS}},
    "retrieval": {
        "corpus": _DOCUMENT,
        "queries": _DOCUMENT,
        "qrels": {"query-id": _TEXT, "corpus-id": _TEXT, "score": _GRADE},
    },
    "sts": {"test": {**_PAIR, "score": _NUMBER}},
}
KINDS = tuple(_SCHEMAS)


@dataclass(frozen=True)
class KitSet:
    """One evaluation set on disk.

    Attributes:
        kind: One of `KINDS`.
        name: The folder's name.
        files: File name without suffix -> path.
        domain: What the texts are about, one word.
        languages: ISO 639 codes, like "en" or "pt_BR"; the first is the documents' where queries are in others.
        licence: As the manifest says.
        fingerprint: SHA-256 (hex) of the uncompressed files: equal data, equal fingerprint.
    """

    kind: str
    name: str
    files: Mapping[str, Path]
    domain: str
    languages: tuple[str, ...]
    licence: str
    fingerprint: str

    @property
    def key(self) -> str:
        """KIND/SET."""
        return f"{self.kind}/{self.name}"

    def read(self) -> dict[str, list[Row]]:
        """The rows of every file.

        Raises:
            KitError: A file changed since the set was found, and is broken now.
        """
        return _read_set(self.kind, self.files)


def find_sets(root: str | os.PathLike) -> tuple[KitSet, ...]:
    """Find, read and check every set in a folder.

    Args:
        root: A folder in the layout above.

    Returns:
        The sets, sorted by kind and name.

    Raises:
        KitError: No set, an unknown kind, a missing or empty file, a line that is no JSON object, a field that is missing
            or has a wrong value, files that contradict each other, or a broken manifest.
    """
    root = Path(root)
    if not root.is_dir():
        raise KitError(f"{root}: no such folder; allowed: a folder with sub-folders KIND/SET, KIND one of {list(KINDS)}.")
    manifest = _read_manifest(root / "manifest.json")
    sets = []
    for kind_folder in _sub_folders(root):
        if kind_folder.name not in KINDS:
            raise KitError(f"{kind_folder}: folder {kind_folder.name!r} is not possible; allowed: {list(KINDS)}.")
        for folder in _sub_folders(kind_folder):
            about = manifest.get(f"{kind_folder.name}/{folder.name}", {})
            sets.append(_find_set(kind_folder.name, folder, about))
    if not sets:
        raise KitError(f"{root}: holds no set; allowed: sub-folders KIND/SET, KIND one of {list(KINDS)}.")
    return tuple(sets)


def kit_fingerprint(sets: Sequence[KitSet]) -> str:
    """SHA-256 (hex) of the keys and fingerprints of `sets`."""
    lines = sorted(f"{kit_set.key} {kit_set.fingerprint}\n" for kit_set in sets)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sub_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "_")))


def _find_set(kind: str, folder: Path, about: Row) -> KitSet:
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.jsonl*")):
        name = path.name.removesuffix(".gz").removesuffix(".jsonl")
        if name in found:
            raise KitError(f"{folder}: holds both {found[name].name} and {path.name}; allowed: one of them.")
        found[name] = path
    if kind == "bitext":
        files = found
        for name, path in files.items():
            if not re.fullmatch(r"[A-Za-z_]+-[A-Za-z_]+", name):
                raise KitError(f"{path}: file name {name!r} is not possible; allowed: LANGUAGE-LANGUAGE, like en-de.jsonl.")
        if not files:
            raise KitError(f"{folder}: holds no LANGUAGE-LANGUAGE.jsonl file, like en-de.jsonl.")
    else:
        wanted = _SCHEMAS[kind]
        missing = [f"{name}.jsonl" for name in wanted if name not in found]
        if missing:
            names = [f"{name}.jsonl" for name in wanted]
            raise KitError(f"{folder}: {', '.join(missing)} missing; a {kind} set has {names}.")
        files = {name: found[name] for name in wanted}
    rows = _read_set(kind, files)
    languages = tuple(about.get("languages", ())) or (UNDETERMINED,)
    if kind == "retrieval" and "languages" not in about:
        languages = tuple(sorted({row["lang"] for row in rows["queries"] if "lang" in row})) or languages
    return KitSet(
        kind=kind,
        name=folder.name,
        files=files,
        domain=about.get("domain", UNSTATED),
        languages=languages,
        licence=about.get("licence", UNSTATED),
        fingerprint=_fingerprint(files),
    )


def _fingerprint(files: Mapping[str, Path]) -> str:
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        data = _read_bytes(path)
        digest.update(f"{name} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def _read_bytes(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        return gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise KitError(f"{path}: not a whole gzip file ({error}).") from error


def _read_manifest(path: Path) -> dict[str, Row]:
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise KitError(f"{path}:{error.lineno}: not JSON ({error.msg}).") from error
    if not isinstance(manifest, dict) or not all(isinstance(about, dict) for about in manifest.values()):
        raise KitError(f"{path}: allowed: an object that maps KIND/SET to an object.")
    return manifest


def _read_set(kind: str, files: Mapping[str, Path]) -> dict[str, list[Row]]:
    schema = _SCHEMAS[kind]
    rows = {name: _read_rows(path, schema["*" if kind == "bitext" else name]) for name, path in files.items()}
    _CROSS_CHECKS[kind](files, rows)
    return rows


def _read_rows(path: Path, rules: Mapping[str, _Rule]) -> list[Row]:
    try:
        lines = _read_bytes(path).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise KitError(f"{path}:{line}: not UTF-8 text.") from error
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise KitError(f"{path}: empty; allowed: 1 or more lines, each a JSON object with {list(rules)}.")
    return [_read_row(f"{path}:{number}", line, rules) for number, line in enumerate(lines, start=1)]


def _read_row(where: str, line: str, rules: Mapping[str, _Rule]) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise KitError(f"{where}: not JSON ({error.msg}, column {error.colno}).") from error
    if not isinstance(row, dict):
        raise KitError(f"{where}: a {type(row).__name__}; allowed: an object with {list(rules)}.")
    for field, rule in rules.items():
        if field not in row:
            raise KitError(f"{where}: field {field!r} is missing; allowed: {rule.allowed}. The line has {list(row)}.")
        if not rule.holds(row[field]):
            raise KitError(f"{where}: field {field!r}={row[field]!r} is not possible; allowed: {rule.allowed}.")
    return row


def _check_retrieval(files: Mapping[str, Path], rows: Mapping[str, list[Row]]) -> None:
    lines = {}
    for name in ("corpus", "queries"):
        lines[name] = {row["_id"]: number for number, row in reversed(list(enumerate(rows[name], start=1)))}
        for number, row in enumerate(rows[name], start=1):
            if lines[name][row["_id"]] != number:
                first = lines[name][row["_id"]]
                raise KitError(f"{files[name]}:{number}: field '_id'={row['_id']!r} is already used in line {first}.")
    for number, row in enumerate(rows["qrels"], start=1):
        for field, name in (("query-id", "queries"), ("corpus-id", "corpus")):
            if row[field] not in lines[name]:
                raise KitError(
                    f"{files['qrels']}:{number}: field {field!r}={row[field]!r} is not possible; "
                    f"allowed: an _id of {files[name]}."
                )
    judged = {row["query-id"] for row in rows["qrels"] if row["score"] > 0}
    for number, row in enumerate(rows["queries"], start=1):
        if row["_id"] not in judged:
            raise KitError(
                f"{files['queries']}:{number}: query {row['_id']!r} has no relevant document; allowed: at least one line in "
                f"{files['qrels']} with its id and a score above 0."
            )


def _check_classification(files: Mapping[str, Path], rows: Mapping[str, list[Row]]) -> None:
    known = {row["label"] for row in rows["train"]}
    if len(known) < 2:
        raise KitError(f"{files['train']}: only the label {known}; allowed: 2 or more different labels.")
    for number, row in enumerate(rows["test"], start=1):
        if row["label"] not in known:
            raise KitError(
                f"{files['test']}:{number}: field 'label'={row['label']!r} is not possible; "
                f"allowed: a label of {files['train']}."
            )


def _check_test_values(field: str) -> Callable[[Mapping[str, Path], Mapping[str, list[Row]]], None]:
    def check(files: Mapping[str, Path], rows: Mapping[str, list[Row]]) -> None:
        values = {row[field] for row in rows["test"]}
        if len(values) < 2:
            raise KitError(f"{files['test']}: field {field!r} is {values.pop()!r} in every line; allowed: 2 or more values.")

    return check


def _check_bitext(files: Mapping[str, Path], rows: Mapping[str, list[Row]]) -> None:
    for name, path in files.items():
        language = name.split("-")[1]
        for number, row in enumerate(rows[name], start=1):
            if row.get("lang", language) != language:
                raise KitError(
                    f"{path}:{number}: field 'lang'={row['lang']!r} is not possible; "
                    f"allowed: {language!r}, as in the file's name."
                )


def _no_check(files: Mapping[str, Path], rows: Mapping[str, list[Row]]) -> None:
    """Nothing that the fields' rules do not say already."""


_CROSS_CHECKS = {
    "bitext": _check_bitext,
    "classification": _check_classification,
    "clustering": _check_test_values("label"),
    "pair_classification": _check_test_values("label"),
    "reranking": _no_check,
    "retrieval": _check_retrieval,
    "sts": _check_test_values("score"),
}
