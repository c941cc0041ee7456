"""The user's texts, checked: what is none, or not UTF-8, is named by its argument and place."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def text_items(argument: str, texts: Iterable[str | Sequence[str]]) -> list[list[str]]:
    """Texts, or tuples or lists of them -> a list for each item.

    Args:
        argument: What messages call `texts`.
        texts: What the user gave.

    Raises:
        ValueError: A text alone or a mapping, something that is no text, or one that is not UTF-8.
    """
    if isinstance(texts, str | Mapping) or not isinstance(texts, Iterable):
        raise ValueError(f"{argument} holds {texts!r} of type {type(texts).__name__}; allowed: a list of texts.")
    items: list[list[Any]] = [list(item) if isinstance(item, list | tuple) else [item] for item in texts]
    for place, item in enumerate(items):
        for text in item:
            if not isinstance(text, str):
                raise ValueError(
                    f"{argument} holds {text!r} of type {type(text).__name__}; allowed: a list of texts, or of tuples of "
                    "texts that belong together."
                )
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(f"{argument}[{place}] is not UTF-8 ({error.reason}); allowed: texts.") from error
    return items


def refuse_repeated_columns(source: Any, wanted: Iterable[str], present: Sequence[str]) -> None:
    """Refuse columns that a file has more than once, of which one would be taken without a word.

    Args:
        source: What messages call the file.
        wanted: Columns to look at.
        present: All that the file has.

    Raises:
        ValueError: Names the file and the column.
    """
    for name in wanted:
        if present.count(name) > 1:
            raise ValueError(f"{source} has the column {name!r} {present.count(name)} times; allowed: once.")


def single_texts(argument: str, texts: Iterable[str | Sequence[str]]) -> list[str]:
    """The texts of all items, one after the other; raises what `text_items` does."""
    return [text for item in text_items(argument, texts) for text in item]
