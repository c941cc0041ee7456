"""Folders and files that appear whole or not at all; files of one text a line."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it takes that name when the block ends well, and is removed when it fails.

    A process that is killed leaves at most a folder named `.NAME.partial-*`, never a half-written `path`.

    Args:
        path: The folder to be; an empty folder of that name is replaced, a link is followed.

    Raises:
        FileExistsError: `path` exists and is not an empty folder, at the start or (another process was faster) at the end;
            or it is a mount point, which nothing can replace.
    """
    target = Path(path).resolve()
    _refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{uuid.uuid4().hex[:8]}")
    partial.mkdir()
    try:
        yield partial
        _let_read_who_may_read(partial)
        try:
            os.replace(partial, target)  # replaces an empty folder, fails on any other
        except OSError:
            _refuse_existing(target)
            raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path` to write to; renamed when the block ends well, removed when it fails.

    The content is on the disk before the name is: neither kill -9 nor a power cut leaves half a file named `path`.

    Args:
        path: The file to be; its folders are made, one of that name is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all; one of that name is replaced.

    Args:
        path: The file to be; its folders are made.
        text: What it holds, as UTF-8.
    """
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_figure(figure: Any, path: str | os.PathLike, dpi: int = 120) -> Path:
    """Draw a matplotlib figure into a file that appears whole or not at all; returns its path.

    Args:
        figure: A `matplotlib.figure.Figure`.
        path: The file to be; its suffix says the format.
        dpi: Dots per inch.
    """
    path = Path(path)
    with new_file(path) as partial:
        figure.savefig(partial, dpi=dpi, format=path.suffix[1:])
    return path


def read_lines(path: str | os.PathLike) -> list[str]:
    """The lines of a UTF-8 file that hold a text.

    Args:
        path: A text file, one text per line.

    Raises:
        ValueError: The file is not UTF-8, or holds no text.
        OSError: The file cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); allowed: a UTF-8 file.") from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise ValueError(f"{path} holds no text; allowed: one text per line.")
    return texts


def _let_read_who_may_read(folder: Path) -> None:
    """Give files the folder's permissions, which follow the umask: safetensors lets only their owner read some."""
    allowed = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode | allowed)


def _refuse_existing(target: Path) -> None:
    if os.path.ismount(target):
        raise FileExistsError(f"{target} is a mount point; allowed: a new name inside it.")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{target} exists; allowed: a new name, or an empty folder.")
