import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer

from hagmoe_hf import bulk

ROOT = Path(__file__).parents[1]
BOUND = 1e-5


@pytest.fixture(scope="module")
def model(tiny_parent) -> SentenceTransformer:
    return SentenceTransformer(str(tiny_parent), device="cpu")


def write(path: Path, texts: list[str | None]) -> Path:
    """Texts with numbered ids, in the format of the ending; CSV has a byte order mark, as spreadsheets write it."""
    rows = [{"id": f"{path.stem}-{row}", "text": text} for row, text in enumerate(texts)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, ["id", "text"])
            writer.writeheader()
            writer.writerows(rows)
    return path


def read(out: Path) -> tuple[list[int], list[str], np.ndarray]:
    """Rows, ids and vectors, files in the order of their names."""
    table = pa.concat_tables(pq.read_table(file) for file in sorted(out.glob("shards/*.parquet")))
    return table["row"].to_pylist(), table["id"].to_pylist(), np.stack(table["vector"].to_numpy(zero_copy_only=False))


@pytest.mark.parametrize("ending", bulk.SUFFIXES)
def test_every_row_comes_back_in_order_with_the_vector_of_plain_encode(ending, model, corpus, tmp_path):
    """A row that moved by one puts a wrong vector on every document after it, and no one would see it."""
    texts = [*corpus[:40], 'two\nlines, and a "quote"', *corpus[40:60]]
    folder = tmp_path / "texts"
    folder.mkdir()
    write(folder / f"b{ending}", texts[33:])
    write(folder / f"a{ending}", texts[:33])
    report = bulk.encode(model, [folder], tmp_path / "out", id_column="id", shard_rows=10)
    rows, ids, vectors = read(tmp_path / "out")
    assert rows == list(range(len(texts)))
    assert ids == [f"a-{row}" for row in range(33)] + [f"b-{row}" for row in range(len(texts) - 33)]
    assert np.abs(vectors - model.encode(texts)).max() <= BOUND
    assert (report.rows, report.encoded, report.processes) == (len(texts), len(texts), 1)


@given(
    texts=st.lists(st.none() | st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1), max_size=30),
    shard_rows=st.integers(1, 12),
    ending=st.sampled_from(bulk.SUFFIXES),
)
def test_shards_divide_any_input_without_loss(texts, shard_rows, ending, tmp_path_factory):
    """Texts hold line separators, quotes and commas; each shard is read from the middle of a file."""
    texts = [text or "" for text in texts] if ending == ".csv" else texts  # CSV knows no missing value
    path = write(tmp_path_factory.mktemp("any") / f"x{ending}", texts)
    if not texts and ending == ".parquet":
        return  # a file without rows has no type of text
    if ending == ".parquet" and all(text is None for text in texts):
        return
    plan = bulk.plan([path], "text", "id", shard_rows=shard_rows)
    assert [shard.first for shard in plan.shards] == list(range(0, len(texts), shard_rows))
    read_back = [row for shard in plan.shards for row in bulk.read_rows(plan, shard)]
    assert read_back == [(text, f"x-{row}") for row, text in enumerate(texts)]


def test_a_missing_text_keeps_its_row_and_has_no_vector(model, tmp_path):
    """Leaving it out would shift all that follows; a vector of an empty text would be found by searches."""
    texts = ["one", None, "three", None]
    path = write(tmp_path / "x.jsonl", texts)
    bulk.encode(model, [path], tmp_path / "out", shard_rows=3)
    vectors = [pq.read_table(file)["vector"].to_pylist() for file in sorted((tmp_path / "out/shards").iterdir())]
    assert [vector is None for shard in vectors for vector in shard] == [False, True, False, True]


def test_a_second_run_encodes_only_what_is_missing(model, corpus, tmp_path):
    path = write(tmp_path / "x.parquet", corpus[:50])
    first = bulk.encode(model, [path], tmp_path / "out", shard_rows=10, id_column="id")
    before = read(tmp_path / "out")[2]
    (tmp_path / "out/shards/00000003.parquet").unlink()
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out/shards").iterdir()}
    again = bulk.encode(model, [path], tmp_path / "out", shard_rows=10, id_column="id")
    assert (first.encoded, again.encoded) == (50, 10)
    assert all(file.stat().st_mtime_ns == when for file, when in times.items())
    assert np.array_equal(read(tmp_path / "out")[2], before)
    assert bulk.encode(model, [path], tmp_path / "out", shard_rows=10, id_column="id").encoded == 0


def test_kill_9_loses_and_doubles_nothing(tiny_parent, model, corpus, tmp_path):
    """It is what a preempted machine does, in the middle of a file."""
    path, out = write(tmp_path / "x.jsonl", corpus * 4), tmp_path / "out"
    program = (
        "import sys\nfrom pathlib import Path\nfrom hagmoe_hf import bulk\n"
        f"bulk.encode({str(tiny_parent)!r}, [{str(path)!r}], Path({str(out)!r}), id_column='id', shard_rows=8)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)})
    while len(list(out.glob("shards/0*"))) < 5 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was to be killed before it was done"
    whole = len(list(out.glob("shards/0*")))
    (out / "shards/.00000099.parquet.partial-1").write_bytes(b"half")
    report = bulk.encode(model, [path], out, id_column="id", shard_rows=8)
    assert report.encoded == report.rows - 8 * whole
    rows, ids, vectors = read(out)
    assert rows == list(range(4 * len(corpus)))
    assert ids == [f"x-{row}" for row in rows]
    assert np.abs(vectors - model.encode(corpus * 4)).max() <= BOUND
    assert not list(out.glob("shards/.*")), "what the killed run was writing is gone"


def test_another_model_or_input_or_setting_is_refused(model, corpus, tmp_path):
    """Shards of two models in one folder look whole, and no search over them is right."""
    path, out = write(tmp_path / "x.csv", corpus[:20]), tmp_path / "out"
    bulk.encode(model, [path], out, shard_rows=10)
    with pytest.raises(
        ValueError, match=r"was written for prompt=null, and this run has .*allowed: the same, or a new folder"
    ):
        bulk.encode(model, [path], out, shard_rows=10, prompt="query: ")
    with pytest.raises(ValueError, match="shard_rows=10"):
        bulk.encode(model, [path], out, shard_rows=5)
    longest = model.max_seq_length
    try:
        with pytest.raises(ValueError, match="was written for model="):
            bulk.encode(model, [path], out, shard_rows=10, max_seq_length=8)
    finally:
        model.max_seq_length = longest
    write(path, [*corpus[:19], "another"])
    with pytest.raises(ValueError, match="was written for files="):
        bulk.encode(model, [path], out, shard_rows=10)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": 7}\n', r"record 2 \(after byte 14\): has text=7; allowed: a text, or null"),
        ("x.jsonl", b'{"text": "a"}\nnot json\n', "record 2"),
        ("x.jsonl", b'["a"]\n', "record 1 .*is no JSON object"),
        ("x.jsonl", b'{"body": "a"}\n', "has no column 'text'; allowed: its columns"),
        ("x.jsonl", b'{"text": "\xff"}\n', "record 1"),
        ("x.jsonl", b'{"text": "\\ud800"}\n', "record 1 .*surrogates not allowed"),
        ("x.csv", b"id,text\n1,a\n2,b,c\n", "record 2 .*has 3 fields; allowed: 2"),
        ("x.csv", b'id,text\n1,"a\n', "record 1"),
        ("x.csv", b"text,text\na,b\n", r"x\.csv has the column 'text' 2 times; allowed: once"),
        ("x.parquet", b"", r"x\.parquet is no whole Parquet file"),
        ("x.txt", b"a\n", "allowed: one of .parquet, .jsonl, .csv"),
    ],
)
def test_a_broken_row_is_found_before_anything_is_encoded(name, content, message, tmp_path):
    """Found on the third day, it could not be mended: the input would be another one."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        bulk.plan([tmp_path / name])


def test_a_parquet_column_must_hold_texts(tmp_path):
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="has text: int64; allowed: strings"):
        bulk.plan([tmp_path / "x.parquet"])
    with pytest.raises(ValueError, match=r"has no column 'body'; allowed: its columns \['text'\]"):
        bulk.plan([tmp_path / "x.parquet"], "body")
    with pytest.raises(ValueError, match=r"has no column ''; allowed: its columns \['text'\]"):
        bulk.plan([tmp_path / "x.parquet"], "")
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match=r"twice\.parquet has the column 'text' 2 times; allowed: once"):
        bulk.plan([tmp_path / "twice.parquet"])
    with pytest.raises(FileNotFoundError, match="is not there"):
        bulk.plan([tmp_path / "none.parquet"])


def test_two_runs_cannot_write_the_same_folder(model, tmp_path):
    """A killed launcher can leave its workers behind."""
    path = write(tmp_path / "x.jsonl", ["a"])
    plan = bulk.plan([path])
    with (
        bulk.prepare(plan, tmp_path / "out", model),
        pytest.raises(BlockingIOError, match="Another run is writing"),
        bulk.prepare(plan, tmp_path / "out", model),
    ):
        pass
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="holds something else"), bulk.prepare(plan, tmp_path / "mine", model):
        pass


def test_an_input_that_shrinks_meanwhile_is_noticed(model, tmp_path):
    path = write(tmp_path / "x.jsonl", ["a", "b", "c"])
    plan = bulk.plan([path], shard_rows=2)
    write(path, ["a"])
    with pytest.raises(OSError, match="has changed while it was encoded"):
        bulk.read_rows(plan, plan.shards[1])


@pytest.mark.slow
def test_two_processes_share_the_shards(tiny_parent, model, corpus, tmp_path):
    """`accelerate launch scripts/encode.py` on two CPU processes."""
    path, out = write(tmp_path / "x.parquet", corpus[:90]), tmp_path / "out"
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"]
    command = [
        sys.executable,
        "-m",
        *launcher,
        "--dynamo_backend=no",
        "--main_process_port=0",
        str(ROOT / "scripts/encode.py"),
    ]
    command += [str(tiny_parent), str(path), "--out", str(out), "--id-column", "id", "--shard-rows", "20"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("90 rows: 0 were there, 90 encoded") == 1, "one process reports"
    assert "by 2 process(es)" in run.stdout
    rows, ids, vectors = read(out)
    assert rows == list(range(90))
    assert ids == [f"x-{row}" for row in rows]
    assert np.abs(vectors - model.encode(corpus[:90])).max() <= BOUND


@pytest.mark.slow
def test_ray_writes_the_same_shards(tiny_parent, model, corpus, tmp_path):
    """`scripts/encode_ray.py` on a local cluster of two actors."""
    pytest.importorskip("ray.data", reason="needs Ray: pip install hagmoe_hf[ray]")
    path, out = write(tmp_path / "x.jsonl", corpus[:90]), tmp_path / "out"
    command = [sys.executable, str(ROOT / "scripts/encode_ray.py"), str(tiny_parent), str(path), "--out", str(out)]
    command += ["--id-column", "id", "--shard-rows", "20", "--actors", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "90 rows: 0 were there, 90 encoded" in run.stdout
    rows, ids, vectors = read(out)
    assert rows == list(range(90))
    assert ids == [f"x-{row}" for row in rows]
    assert np.abs(vectors - model.encode(corpus[:90])).max() <= BOUND
    assert bulk.encode(model, [path], out, id_column="id", shard_rows=20).encoded == 0
