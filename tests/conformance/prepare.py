"""Lay out transformers' own model test-suite under build/, for the installed version.

The suite is in the sdist of transformers, not in its wheel: it is fetched from the package index once, never committed.
Three of its helpers are in neither; the shims beside this file stand in for them.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build/transformers_suite"
SHIMS = {
    "exporters_test_export.py": "exporters/test_export.py",
    "generation_test_utils.py": "generation/test_utils.py",
    "utils_test_configuration_utils.py": "utils/test_configuration_utils.py",
}


def suite_folder() -> Path:
    """A folder with the suite as package `tests`, and our harness beside it as `test_hagmoe.py`.

    Raises:
        CalledProcessError: The sdist cannot be fetched.
    """
    folder = BUILD / transformers.__version__
    if not folder.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as partial:
            _unpack_suite(Path(partial))
            shutil.copytree(partial, folder.with_suffix(".partial"), dirs_exist_ok=True)
            os.replace(folder.with_suffix(".partial"), folder)
    for source, target in SHIMS.items():
        (folder / "tests" / target).parent.mkdir(exist_ok=True)
        (folder / "tests" / target).with_name("__init__.py").touch()
        shutil.copyfile(HERE / "shims" / source, folder / "tests" / target)
    shutil.copyfile(HERE / "harness.py", folder / "test_hagmoe.py")
    return folder


def _unpack_suite(folder: Path) -> None:
    name = f"transformers-{transformers.__version__}"
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    with tempfile.TemporaryDirectory() as downloads:
        command = [*download, "--no-build-isolation", "--dest", downloads, name.replace("-", "==")]
        subprocess.run(command, check=True)
        with tarfile.open(next(Path(downloads).glob("transformers-*.tar.gz"))) as sdist:
            sdist.extraction_filter = getattr(tarfile, "data_filter", None)  # Python before 3.11.4 has none
            sdist.extractall(downloads)
        (folder / "tests").mkdir()
        (folder / "tests/__init__.py").touch()
        for path in (Path(downloads) / name / "tests").glob("test_*.py"):
            shutil.copyfile(path, folder / "tests" / path.name)
