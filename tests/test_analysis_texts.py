import json

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from datasets import Dataset

from hagmoe_hf.analysis.texts import Texts, label_ids, read_texts

ROWS = [{"text": f"text {row}", "domain": "ab"[row % 2], "lang": "en"} for row in range(6)]


def write(folder, rows, kind):
    path = folder / f"texts.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif kind == "csv":
        pyarrow.csv.write_csv(pa.Table.from_pylist(rows), path)
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_each_kind_of_file_gives_the_same_texts(kind, tmp_path):
    texts = read_texts([write(tmp_path, ROWS, kind)])
    assert texts.texts == tuple(row["text"] for row in ROWS)
    assert texts.domains == tuple("ababab")
    assert texts.languages == ("en",) * 6
    assert len(texts.pairs) == 0


def test_a_folder_of_datasets_is_read(tmp_path):
    Dataset.from_list(ROWS).to_parquet(tmp_path / "data/train.parquet")
    assert read_texts([str(tmp_path / "data")]).texts[2] == "text 2"


def test_rows_of_two_texts_are_known_to_belong_together(tmp_path):
    rows = [{"anchor": f"a{row}", "positive": f"p{row}", "domain": "d"} for row in range(3)]
    texts = read_texts([write(tmp_path, rows, "jsonl")])
    shuffled = texts.take(np.array([5, 3, 1, 0, 2, 4]))
    for given in (texts, shuffled):
        assert [(given.texts[a][1:], given.texts[p]) for a, p in given.pairs] == [(str(i), f"p{i}") for i in range(3)]
    assert len(texts.domains) == 6


def test_bad_rows_are_left_out_and_counted(tmp_path):
    rows = [{"text": "good", "domain": "a"}, {"text": "  "}, {"text": 3}, {"text": "bad \udcff"}, {"text": "no domain"}]
    texts = read_texts([write(tmp_path, rows, "jsonl")])
    assert texts.texts == ("good", "no domain")
    assert texts.domains == ("a", "unknown")
    assert texts.skipped == {"no text": 3}


def test_a_sample_keeps_whole_pairs(tmp_path):
    rows = [{"anchor": f"a{row}", "positive": f"p{row}"} for row in range(30)]
    texts = read_texts([write(tmp_path, rows, "jsonl")], max_texts=10)
    assert len(texts.texts) == 10
    assert all(texts.texts[a][1:] == texts.texts[p][1:] for a, p in texts.pairs)


def test_mistakes_are_named(tmp_path):
    path = write(tmp_path, [{"body": "x", "domain": "a"}], "jsonl")
    with pytest.raises(ValueError, match=r"no column 'text'; allowed: its columns \['body', 'domain'\]"):
        read_texts([path])
    assert read_texts([path], text_column="body").texts == ("x",)
    with pytest.raises(ValueError, match="no column 'words'"):
        read_texts([path], text_column="words")
    with pytest.raises(ValueError, match="No file of texts"):
        read_texts([])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"0 texts given \(skipped: {'no text': 1}\)"):
        read_texts([write(tmp_path / "empty", [{"text": ""}], "jsonl")])
    with pytest.raises(ValueError, match="2 texts and 1 domains"):
        Texts(("a", "b"), domains=("x",))


def test_label_ids_are_in_the_order_of_names():
    names, ids = label_ids(("b", "a", "b"))
    assert names == ("a", "b")
    assert ids.tolist() == [1, 0, 1]
