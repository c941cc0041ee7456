"""Cleaning, cutting, and the hash that decides what is held out."""

import gzip
import hashlib
import re
from pathlib import Path


def unit_hash(key: str) -> float:
    """A stable number in [0, 1) for a key: it decides every hold-out, so kit and pairs can be rebuilt separately."""
    return int(hashlib.sha1(key.encode()).hexdigest()[:12], 16) / 16**12


def squeeze(text: str) -> str:
    """`text` with every run of white space as one space."""
    return re.sub(r"\s+", " ", text).strip()


def normalise(text: str) -> str:
    """Lower-case words joined by one space: the form in which texts are compared."""
    return re.sub(r"\W+", " ", text.lower()).strip()


def cut(text: str, length: int) -> str:
    """At most `length` characters of the squeezed text, cut at a sentence's end in the second half, else at a space."""
    text = squeeze(text)
    if len(text) <= length:
        return text
    head = text[:length]
    end = max(head.rfind(". "), head.rfind("。"))
    if end > length * 0.5:
        return head[: end + 1]
    return head[: head.rfind(" ")] if " " in head else head


def read_text(path: Path) -> str:
    """A text file, gzip (or dictzip) or plain; bytes that are no UTF-8 become U+FFFD."""
    data = gzip.decompress(path.read_bytes()) if path.suffix in (".gz", ".dz") else path.read_bytes()
    return data.decode("utf-8", "replace")
