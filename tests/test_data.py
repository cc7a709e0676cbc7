"""Rows from every format; each bad file gets one line that names the place."""

import csv
import json

import numpy as np
import pytest

from flyweight.data import Columns, hash_share, pack, rows
from flyweight.errors import DataError

GOOD = [{"text": "a fine film", "label": "pos"}, {"text": "dull, dull", "label": "neg"}]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def as_pairs(path, columns=None):
    return [(row.text, row.label) for row in rows(path, columns or Columns())]


@pytest.fixture(params=["jsonl", "csv", "parquet", "folder"])
def file(request, tmp_path):
    path = tmp_path / f"data.{request.param}"
    if request.param == "jsonl":
        write_jsonl(path, GOOD)
    elif request.param == "csv":
        with path.open("w", newline="") as out:
            writer = csv.DictWriter(out, ["text", "label"])
            writer.writeheader()
            writer.writerows(GOOD)
    elif request.param == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(GOOD), path)
    else:
        import datasets

        datasets.Dataset.from_list(GOOD).save_to_disk(str(path))
    return path


def test_every_format_gives_the_same_rows(file):
    assert as_pairs(file) == [("a fine film", "pos"), ("dull, dull", "neg")]


def test_a_missing_column_lists_the_columns_in_every_format(file):
    with pytest.raises(
        DataError, match=r"expected a column 'txt' .*'text', 'label' \(did you mean 'text'\?\); name it with --text"
    ):
        as_pairs(file, Columns(text="txt"))


def test_bad_rows_name_file_and_line(tmp_path):
    cases = {
        '{"text": "a", "label": 1}\n{"text": "b"': ":2",
        "[1, 2]\n": ":1",
        '{"text": "a", "label": 1}\n\n{"text": 5, "label": 1}\n': ":3",
        '{"text": "  ", "label": 1}\n': ":1",
        '{"text": "a", "label": null}\n': ":1",
    }
    for number, (content, place) in enumerate(cases.items()):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(content)
        with pytest.raises(DataError, match=f"{number}.jsonl{place}"):
            as_pairs(path)


def test_csv_rows_with_the_wrong_number_of_fields_and_bad_bytes(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,1\nb,2,3\n")
    with pytest.raises(DataError, match=r"2 fields at .*a.csv:3"):
        as_pairs(path)
    path.write_bytes(b"text,label\ncaf\xe9,1\n")
    with pytest.raises(DataError, match="UTF-8"):
        as_pairs(path)


def test_empty_missing_and_unknown_files(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(DataError, match="empty file"):
        as_pairs(empty)
    with pytest.raises(DataError, match="no such file"):
        as_pairs(tmp_path / "none.csv")
    other = tmp_path / "data.xlsx"
    other.touch()
    with pytest.raises(DataError, match=r"\.jsonl, .*'data.xlsx'"):
        as_pairs(other)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="a parquet file"):
        as_pairs(broken)


def test_rows_are_streamed(tmp_path):
    """The first row comes before a damaged later line is read."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": 1}\nnot json\n')
    assert next(rows(path, Columns())).text == "a"


def test_batches_are_padded_on_the_right():
    examples = pack([([5, 6, 7], None), ([8], None)], [1, 0])
    batch = examples.batch([1, 0], pad=9)
    assert batch["input_ids"].tolist() == [[8, 9, 9], [5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert examples.take([1]).labels.tolist() == [0]
    assert examples.take([1]).ids.tolist() == [8]


def test_pairs_keep_their_segment_ids():
    examples = pack([([5, 6], [0, 1]), ([7], [0])], None)
    assert examples.batch([0, 1], pad=0)["token_type_ids"].tolist() == [[0, 1], [0, 0]]
    assert examples.take([0]).types.tolist() == [0, 1]


def test_content_hash_sees_ids_labels_and_boundaries():
    base = pack([([5, 6], None), ([7], None)], [1, 0])
    others = [pack([([5], None), ([6, 7], None)], [1, 0]), pack([([5, 6], None), ([7], None)], [0, 0]), base.take([0])]
    assert base.content_hash() == pack([([5, 6], None), ([7], None)], [1, 0]).content_hash()
    assert len({base.content_hash(), *(other.content_hash() for other in others)}) == 4


def test_hash_share_is_uniform_and_depends_on_the_text_alone():
    shares = np.array([hash_share(f"text {i}") for i in range(4000)])
    assert hash_share("text 1") == shares[1]
    assert abs((shares < 0.1).mean() - 0.1) < 0.02
    assert abs(shares.mean() - 0.5) < 0.02
