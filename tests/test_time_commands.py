"""The script that follows the pages and writes down how long it took."""

import pytest
import time_commands
from doc_blocks import Block
from time_commands import Reader, merged, name_of, steps


def block(code: str, language: str = "python", heading: str = "Start") -> Block:
    return Block(heading, 1, language, code, "")


def test_a_step_is_called_by_what_a_reader_types():
    assert name_of(block("make demo   # a remark\n\nmake test\n", "bash")) == "make demo; make test"
    assert name_of(block("x = 1")) == "Python: Start"


def test_a_steps_time_joins_those_of_others_in_the_order_of_the_pages():
    """Steps are timed one by one; a step that the page no longer has must not stay."""
    first, second, *_ = (name_of(step) for step in steps("README.md"))
    times = merged({}, "README.md", second, {"seconds": 2})
    times["pages"]["README.md"]["make something old"] = {"seconds": 3}
    times = merged(times, "README.md", first, {"seconds": 1})
    assert list(times["pages"]["README.md"].items()) == [(first, {"seconds": 1}), (second, {"seconds": 2})]
    assert merged(times, "README.md", first, {"seconds": 9})["pages"]["README.md"][first] == {"seconds": 9}


def test_nothing_marked_is_timed():
    assert steps("README.md")
    assert steps("docs/quickstart.md")
    assert not any(step.needs for page in time_commands.PAGES for step in steps(page))


def test_a_pages_python_is_one_session_and_sees_what_shells_left(tmp_path, capsys):
    """Otherwise the second block of the quick start would not know the model of the first."""
    reader = Reader(tmp_path)
    reader.follow(block("x = 41\nprint('hello')"))
    reader.follow(block("echo 1 > step", "bash"))
    reader.follow(block("open('sum', 'w').write(str(x + int(open('step').read())))"))
    reader.close()
    assert (tmp_path / "sum").read_text() == "42"
    assert "hello" in capsys.readouterr().out


@pytest.mark.parametrize("failing", [block("1 / 0"), block("false", "bash")], ids=["python", "bash"])
def test_a_step_that_fails_is_no_time(failing, tmp_path):
    reader = Reader(tmp_path)
    with pytest.raises(time_commands.subprocess.CalledProcessError):
        reader.follow(failing)
    reader.close()


def test_an_unknown_step_is_refused_with_those_there_are(tmp_path, monkeypatch):
    (tmp_path / "fresh").mkdir()
    monkeypatch.setattr(
        "sys.argv", ["time_commands.py", str(tmp_path / "fresh"), str(tmp_path / "t.json"), "--only", "make tea"]
    )
    with pytest.raises(SystemExit, match=r"'make tea' is no step; allowed: .*make demo"):
        time_commands.main()
    assert not (tmp_path / "t.json").exists()
