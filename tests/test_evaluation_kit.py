"""Local evaluation data are read as they are, or refused by name."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
from evaluation_helpers import small_kit
from hypothesis import given, settings
from hypothesis import strategies as st

from hagmoe_hf.evaluation.kit import KINDS, SHIPPED, KitError, find_sets, kit_fingerprint


@pytest.fixture
def root(tmp_path):
    return small_kit(tmp_path / "kit")


def change_line(path: Path, number: int, line: str) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[number - 1] = line
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def change_field(path: Path, number: int, **fields: object) -> None:
    row = json.loads(path.read_text(encoding="utf-8").splitlines()[number - 1])
    change_line(path, number, json.dumps({**row, **fields}))


@pytest.mark.parametrize(
    ("file", "line", "fields", "said"),
    [
        ("sts/words/test.jsonl", 7, {"score": "high"}, "'score'='high'"),
        ("sts/words/test.jsonl", 7, {"score": float("nan")}, "a finite number"),
        ("sts/words/test.jsonl", 3, {"sentence2": " "}, "a text that is not empty"),
        ("pair_classification/genes/test.jsonl", 2, {"label": 2}, "0 or 1"),
        ("retrieval/papers/qrels.jsonl", 4, {"corpus-id": "p999"}, "an _id of"),
        ("retrieval/papers/qrels.jsonl", 4, {"query-id": "nobody asks"}, "an _id of"),
        ("retrieval/papers/qrels.jsonl", 4, {"score": -1}, "at least 0"),
        ("reranking/leads/test.jsonl", 1, {"positive": []}, "1 or more texts"),
        ("classification/reviews/test.jsonl", 5, {"label": "so-so"}, "a label of"),
        ("clustering/topics/test.jsonl", 5, {"label": None}, "a text or an integer"),
        ("bitext/words/en-es.jsonl", 5, {"lang": "fr"}, "'es'"),
    ],
)
def test_a_wrong_field_is_named_with_its_file_and_line(root, file, line, fields, said):
    """Whoever has 10,000 lines and one of them wrong would search for it, or worse, trust the score."""
    change_field(root / file, line, **fields)
    with pytest.raises(KitError) as error:
        find_sets(root)
    assert f"{file}:{line}:" in str(error.value)
    assert said in str(error.value)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_broken_line_is_named(tmp_path_factory, data):
    """A half-copied file would otherwise be scored without its broken part."""
    root = small_kit(tmp_path_factory.mktemp("kit"))
    path = data.draw(st.sampled_from(sorted(root.glob("*/*/*.jsonl"))))
    count = len(path.read_text(encoding="utf-8").splitlines())
    line = data.draw(st.integers(1, count))
    change_line(path, line, data.draw(st.sampled_from(['{"text": "cut of', "[1, 2]", "", "null", "{}"])))
    with pytest.raises(KitError, match=f"{path.name}:{line}: "):
        find_sets(root)


def test_a_repeated_id_and_an_unanswered_query_are_named(root):
    """mteb would keep the last document of that id, and drop the query, in silence."""
    corpus = root / "retrieval/papers/corpus.jsonl"
    original = corpus.read_text(encoding="utf-8")
    change_field(corpus, 9, _id="p3")
    with pytest.raises(KitError, match=r"corpus.jsonl:9: .* already used in line 4"):
        find_sets(root)
    corpus.write_text(original, encoding="utf-8")
    with (root / "retrieval/papers/queries.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"_id": "lost", "text": "nothing is relevant"}\n')
    with pytest.raises(KitError, match=r"queries.jsonl:31: query 'lost' has no relevant document"):
        find_sets(root)


def test_an_empty_file_a_missing_file_and_a_wrong_kind_are_named(root):
    """An empty set has a mean of nothing, and a mislabelled folder would be scored as what it is not."""
    (root / "sts/words/test.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(KitError, match=r"sts/words/test.jsonl: empty"):
        find_sets(root)
    (root / "sts/words/test.jsonl").unlink()
    with pytest.raises(KitError, match=r"sts/words: test.jsonl missing"):
        find_sets(root)
    shutil.rmtree(root / "sts")
    (root / "clustering").rename(root / "clusters")
    with pytest.raises(KitError, match=r"folder 'clusters' is not possible; allowed: \['bitext'"):
        find_sets(root)
    (root / "clusters").rename(root / "sts")  # a clustering set under the name of another kind
    with pytest.raises(KitError, match=r"sts/topics/test.jsonl:1: field 'sentence1' is missing"):
        find_sets(root)


def test_an_empty_folder_a_broken_archive_and_a_broken_manifest_are_named(tmp_path, root):
    """A typing error in --kit must not end in a table of nothing."""
    with pytest.raises(KitError, match="no such folder"):
        find_sets(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(KitError, match="holds no set"):
        find_sets(tmp_path / "empty")
    (root / "manifest.json").write_text('{\n "sts/words": oops}', encoding="utf-8")
    with pytest.raises(KitError, match=r"manifest.json:2: not JSON"):
        find_sets(root)
    (root / "manifest.json").unlink()
    plain = root / "sts/words/test.jsonl"
    packed = gzip.compress(plain.read_bytes())
    plain.unlink()
    (root / "sts/words/test.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(KitError, match=r"test.jsonl.gz: not a whole gzip file"):
        find_sets(root)
    damaged = bytearray(packed)
    damaged[len(packed) // 2 : len(packed) // 2 + 8] = b"\xff" * 8
    (root / "sts/words/test.jsonl.gz").write_bytes(bytes(damaged))
    with pytest.raises(KitError, match=r"test.jsonl.gz: not a whole gzip file"):
        find_sets(root)
    (root / "sts/words/test.jsonl.gz").write_bytes(packed)
    plain.write_bytes(gzip.decompress(packed))
    with pytest.raises(KitError, match=r"holds both test.jsonl and test.jsonl.gz; allowed: one of them"):
        find_sets(root)


def test_packing_keeps_the_fingerprint_and_a_changed_word_changes_it(root):
    """Scores are kept by fingerprint: a stale one would be shown for data that it was not computed on."""
    before = find_sets(root)
    plain = root / "sts/words/test.jsonl"
    (root / "sts/words/test.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    assert kit_fingerprint(find_sets(root)) == kit_fingerprint(before)
    rows = gzip.decompress((root / "sts/words/test.jsonl.gz").read_bytes()).replace(b"tiger", b"lion", 1)
    (root / "sts/words/test.jsonl.gz").write_bytes(gzip.compress(rows))
    assert kit_fingerprint(find_sets(root)) != kit_fingerprint(before)


def test_the_shipped_kit_is_whole_small_and_says_its_licences():
    """Who installs the package redistributes these texts, and has to know on what terms."""
    sets = find_sets(SHIPPED)
    manifest = json.loads((SHIPPED / "manifest.json").read_text(encoding="utf-8"))
    assert {kit_set.key for kit_set in sets} == set(manifest)
    assert {kit_set.kind for kit_set in sets} == set(KINDS) - {"bitext"}  # no bitext with clear terms: see decision 0007
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) <= 8e6
    for kit_set in sets:
        readme = (SHIPPED / kit_set.key / "README.md").read_text(encoding="utf-8")
        assert manifest[kit_set.key]["shipped"] is True
        assert f"- Licence: {kit_set.licence}" in readme
        assert "- Credit: " in readme
        assert "GPL" not in kit_set.licence
        assert kit_set.domain != "unstated"
