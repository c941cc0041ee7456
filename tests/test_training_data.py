import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SHAPES, tiny_config
from datasets import Dataset

from hagmoe_hf.training.data import load_rows, refuse_too_small, text_length

GOOD = [
    {"domain": "a", "anchor": "one", "positive": "eins", "label": 1, "split": "train"},
    {"domain": "b", "anchor": "zwei", "positive": "2", "label": 0.5, "split": "train"},
    {"domain": "a", "anchor": "drei\u2028vier", "positive": "日本", "label": 0, "split": "dev"},
]
PAIR = ("anchor", "positive")


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        Dataset.from_list(rows).to_csv(path)
    return str(path)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_every_format_gives_the_same_rows(suffix, tmp_path):
    """Whoever converts a file must not train on something else."""
    rows, report = load_rows([write(tmp_path / f"x{suffix}", GOOD)], PAIR, label_column="label", domain_column="domain")
    assert list(rows) == ["a", "b"]
    assert rows["a"][:] == {"anchor": ["one", "drei\u2028vier"], "positive": ["eins", "日本"], "label": [1.0, 0.0]}
    assert rows["a"].column_names == ["anchor", "positive", "label"]
    assert (report.read, report.kept, report.skipped) == (3, 3, {})
    assert report.domains == {"a": 2, "b": 1}


def test_a_saved_dataset_is_read_through_datasets(tmp_path):
    """A folder or name goes to `datasets.load_dataset`."""
    write(tmp_path / "train.jsonl", GOOD)
    rows, _ = load_rows([str(tmp_path)], PAIR)
    assert rows["train"]["anchor"] == [row["anchor"] for row in GOOD]


def test_rows_are_filtered_and_sampled_repeatably(tmp_path):
    """The kit's pairs hold their dev rows in the same file."""
    source = write(tmp_path / "x.parquet", GOOD * 20)
    rows, report = load_rows([source], PAIR, where={"split": "train"}, max_rows=7, seed=1)
    assert (report.read, report.kept) == (40, 7)
    assert set(rows["train"]["anchor"]) <= {"one", "zwei"}
    assert rows["train"][:] == load_rows([source], PAIR, where={"split": "train"}, max_rows=7, seed=1)[0]["train"][:]
    assert rows["train"][:] != load_rows([source], PAIR, where={"split": "train"}, max_rows=7, seed=2)[0]["train"][:]


def test_rows_are_left_out_by_what_they_are(tmp_path):
    """A model's own language, where it is to learn the others."""
    source = write(tmp_path / "x.parquet", GOOD * 20)
    rows, report = load_rows([source], PAIR, where_not={"anchor": ["one", "drei"]})
    assert report.read == sum(row["anchor"] != "one" for row in GOOD * 20)
    assert "one" not in rows["train"]["anchor"]
    with pytest.raises(ValueError, match=r"where not: \{'split': \['train'\]\}\); allowed: at least one good row"):
        load_rows([source], PAIR, where={"split": "train"}, where_not={"split": ["train"]})


def test_bad_rows_are_counted_told_and_left_out(tmp_path):
    """One bad line among a million must neither stop a run nor slip into it."""
    path = tmp_path / "x.jsonl"
    bad = [
        {"anchor": "", "positive": "x", "label": 1},
        {"anchor": "  \n", "positive": "x", "label": 1},
        {"anchor": "x", "label": 1},
        {"anchor": "x", "positive": 7, "label": 1},
        {"anchor": "x", "positive": "x", "label": None},
        {"anchor": "x", "positive": "x", "label": float("nan")},
        {"anchor": "x", "positive": "x", "label": "many"},
        {"anchor": "x", "positive": "\ud800", "label": 1},
    ]
    text = "".join(json.dumps(row) + "\n" for row in [*GOOD, *bad])
    path.write_bytes(text.encode() + b'{"anchor": "caf\xe9", "positive": "x", "label": 1}\n{"anchor": \n[1, 2]\n\n')
    rows, report = load_rows([str(path)], PAIR, label_column="label")
    assert rows["train"]["anchor"] == [row["anchor"] for row in GOOD]
    assert report.skipped == {
        "anchor is empty": 2,
        "positive is empty": 1,
        "positive is not a text": 1,
        "label is not a number": 2,
        "label is NaN or infinite": 1,
        "positive is not UTF-8": 1,
        "anchor is not UTF-8": 1,
        "not a JSON object": 2,
    }
    assert report.read == report.kept + sum(report.skipped.values()) == 14
    assert "skipped 2: anchor is empty" in str(report)


def test_languages_and_licences_are_counted_where_they_are_stated(tmp_path):
    """Who publishes a model has to say what it learned from."""
    rows = [{**GOOD[0], "license": "MIT"}, {**GOOD[0], "license": ""}, {**GOOD[0], "license": "MIT"}]
    sources = [write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.parquet", GOOD)]
    stated = {"license": {"MIT": 2, "not stated": 1 + len(GOOD)}}
    data, report = load_rows(sources, PAIR)
    assert report.stated == stated
    assert "license MIT: 2" in str(report)
    assert set(data["train"].column_names) == set(PAIR)
    assert load_rows(sources[1:], PAIR)[1].stated == {}


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_bytes_that_are_not_utf8_are_skipped_in_other_formats_too(suffix, tmp_path):
    """A file may say that it is UTF-8 and not be."""
    path = tmp_path / f"x{suffix}"
    if suffix == ".csv":
        path.write_bytes(b"\xef\xbb\xbfanchor,positive\none,eins\ncaf\xe9,x\n")
    else:
        raw = pa.array([b"one", b"caf\xe9"]).cast(pa.binary())
        texts = pa.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])
        pq.write_table(pa.table({"anchor": texts, "positive": pa.array(["eins", "x"])}), path)
    rows, report = load_rows([str(path)], PAIR)
    assert rows["train"]["anchor"] == ["one"]
    assert report.skipped == {"anchor is not UTF-8": 1}


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_a_missing_column_is_named_beside_those_that_are_there(suffix, tmp_path):
    """The usual first mistake with somebody else's file."""
    source = write(tmp_path / f"x{suffix}", GOOD)
    with pytest.raises(ValueError, match=r"has no column 'query'; allowed: its columns \['domain', 'anchor'"):
        load_rows([source], ("query", "positive"))


def test_sources_that_cannot_be_are_refused(tmp_path):
    """With the file's name, since there may be many."""
    (tmp_path / "x.tsv").write_text("a\tb")
    empty = write(tmp_path / "x.jsonl", [{"anchor": "", "positive": "x"}])
    with pytest.raises(FileNotFoundError, match=r"gone.csv is not there"):
        load_rows([str(tmp_path / "gone.csv")], PAIR)
    with pytest.raises(ValueError, match=r"x.tsv has an unknown ending; allowed: files ending in .parquet, .jsonl, .csv"):
        load_rows([str(tmp_path / "x.tsv")], PAIR)
    with pytest.raises(ValueError, match=r"No row is left of 1 in .*x.jsonl .*'anchor is empty': 1"):
        load_rows([empty], PAIR)


def test_csv_that_would_be_misread_is_counted_or_refused(tmp_path):
    """One unclosed quote would make a text of all the rows after it, and a comma too many would cut one short."""
    path = tmp_path / "x.csv"
    path.write_text("anchor,positive\none,eins\n\nhow, exactly,like this\nalone\ntwo,zwei\n")
    rows, report = load_rows([str(path)], PAIR)
    assert rows["train"]["anchor"] == ["one", "two"]
    assert report.skipped == {"not as many values as the header": 2}
    path.write_text('anchor,positive\nq,"an unclosed quote\n' + "".join(f"q{i},answer {i}\n" for i in range(9)))
    with pytest.raises(ValueError, match=r"x.csv, line \d+: unexpected end of data; allowed: CSV whose quotes"):
        load_rows([str(path)], PAIR)
    path.write_text("anchor,positive,positive\na,b,c\n")
    with pytest.raises(ValueError, match=r"x.csv has the column 'positive' 2 times; allowed: once"):
        load_rows([str(path)], PAIR)
    path.write_text("anchor,positive\n")
    with pytest.raises(ValueError, match=r"No row is left of 0"):
        load_rows([str(path)], PAIR)
    path.write_text("")
    with pytest.raises(ValueError, match=r"has no column 'anchor'; allowed: its columns \[\]"):
        load_rows([str(path)], PAIR)


def test_a_file_that_is_none_of_its_kind_is_named(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"x\.parquet is no whole Parquet file"):
        load_rows([str(tmp_path / "x.parquet")], PAIR)
    names = ["anchor", "positive", "positive"]
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 3, names=names), tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match=r"twice\.parquet has the column 'positive' 2 times; allowed: once"):
        load_rows([str(tmp_path / "twice.parquet")], PAIR)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/x.json").write_text("{")
    with pytest.raises(ValueError, match="folder cannot be read as one data set"):
        load_rows([str(tmp_path / "folder")], PAIR)


def test_a_line_too_deep_to_parse_is_one_bad_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"anchor": "a", "positive": "b"}\n' + '{"anchor": ' + "[" * 100_000 + "\n")
    rows, report = load_rows([str(path)], PAIR)
    assert rows["train"]["anchor"] == ["a"]
    assert report.skipped == {"not a JSON object": 1}


def test_a_very_long_text_is_read_from_csv(tmp_path):
    """The csv module's own limit is 131,072 characters."""
    rows, _ = load_rows([write(tmp_path / "x.csv", [{"anchor": "word " * 60_000, "positive": "x"}])], PAIR)
    assert len(rows["train"]["anchor"][0]) == 300_000


def test_too_few_rows_are_refused_with_their_number():
    """A dropped last batch, or a row without others to compare with, trains on nothing and says nothing."""
    data = {"a": range(20), "b": range(1)}
    with pytest.raises(ValueError, match=r"Domain 'b' has 1 row.*at least 2 rows"):
        refuse_too_small(data, batch_size=8, drop_last=False, needs_two=True)
    with pytest.raises(ValueError, match=r"Domain 'b' has 1 row.*at least per_device_train_batch_size=8 rows"):
        refuse_too_small(data, batch_size=8, drop_last=True, needs_two=False)
    refuse_too_small(data, batch_size=8, drop_last=False, needs_two=False)


@pytest.mark.parametrize(("shape", "longest"), [("bert", 64), ("roberta", 62), ("modernbert", 64)])
def test_no_text_is_longer_than_the_model_has_positions_for(shape, longest):
    """RoBERTa's first positions belong to padding: 514 of them are 512 tokens."""
    config = tiny_config(**SHAPES[shape])
    assert config.max_position_embeddings == 64
    assert text_length(None, config) == longest
    assert text_length(7, config) == 7
    for wanted in (2, longest + 1):
        with pytest.raises(ValueError, match=f"max_length={wanted} is not possible; allowed: 3 to {longest}"):
            text_length(wanted, config)
