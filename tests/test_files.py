"""What appears whole or not at all."""

import contextlib
import os

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file

from hagmoe_hf.files import new_file, new_folder, write_figure, write_text


def drawing() -> Figure:
    figure = Figure()
    figure.subplots().plot([1, 2])
    return figure


def test_a_file_that_could_not_be_written_leaves_the_old_one_and_nothing_else(tmp_path):
    write_text(tmp_path / "deep/a.txt", "old")
    with contextlib.suppress(RuntimeError), new_file(tmp_path / "deep/a.txt") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert (tmp_path / "deep/a.txt").read_text() == "old"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.txt"]


def test_a_folder_that_could_not_be_filled_leaves_nothing(tmp_path):
    with contextlib.suppress(RuntimeError), new_folder(tmp_path / "deep/model") as partial:
        (partial / "weights").write_text("half")
        raise RuntimeError
    assert list((tmp_path / "deep").iterdir()) == []


@pytest.mark.parametrize(("umask", "folder", "file"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600), (0o002, 0o775, 0o664)])
def test_others_may_read_a_model_where_the_umask_lets_them(umask, folder, file, tmp_path):
    """A server often runs as another user than whoever trained; safetensors leaves weights to their owner alone."""
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "model") as partial:
            (partial / "1_Dense").mkdir()
            save_file({"weight": torch.zeros(1)}, partial / "1_Dense/model.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "model").stat().st_mode & 0o777 == folder
    assert (tmp_path / "model/1_Dense/model.safetensors").stat().st_mode & 0o777 == file


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("keep me")
    with (
        pytest.raises(FileExistsError, match="mine exists; allowed: a new name, or an empty folder"),
        new_folder(tmp_path / "mine"),
    ):
        pass
    with new_folder(tmp_path / "empty") as partial:
        (tmp_path / "empty").mkdir()  # another process, meanwhile
        (partial / "weights").write_text("whole")
    assert (tmp_path / "empty/weights").read_text() == "whole"


def test_a_link_is_followed_and_a_mount_point_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with new_folder(tmp_path / "link") as partial:
        (partial / "weights").write_text("whole")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real/weights").read_text() == "whole"
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "volume")
    (tmp_path / "volume").mkdir()
    with pytest.raises(FileExistsError, match="volume is a mount point; allowed: a new name inside it"):
        new_folder(tmp_path / "volume").__enter__()


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_is_whole_or_not_there(suffix, tmp_path, monkeypatch):
    path = write_figure(drawing(), tmp_path / f"deep/a.{suffix}")
    assert path.read_bytes()[:4] == {"png": b"\x89PNG", "svg": b"<?xm"}[suffix]
    before = path.read_bytes()

    def dies_half_way(self, target, **options):
        target.write_bytes(b"half")
        raise RuntimeError

    monkeypatch.setattr(Figure, "savefig", dies_half_way)
    with pytest.raises(RuntimeError):
        write_figure(drawing(), path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]
