"""YAML files in which numbers are numbers."""

import os
import re
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes `2e-5` for a text; here it is a number, as in YAML 1.2."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789"))


def read_yaml(path: str | os.PathLike) -> Any:
    """What a YAML file holds.

    Raises:
        yaml.YAMLError: It is not YAML.
        UnicodeDecodeError: It is not UTF-8.
        OSError: It cannot be read.
    """
    loader = _Loader(Path(path).read_text(encoding="utf-8"))
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()
