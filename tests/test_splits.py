"""Training, validation and evaluation never mix."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from flyweight.errors import DataError
from flyweight.settings import DataSettings
from flyweight.splits import label_names, read_splits, read_unlabelled
from flyweight.tasks import task_named
from flyweight.tokenization import Encoder

TASK = task_named("text-classification")


@pytest.fixture
def encoder():
    words = {"[UNK]": 0, **{f"w{i}": i + 1 for i in range(500)}}
    tokenizer = Tokenizer(models.WordLevel(words, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return Encoder(tokenizer, 0, 8)


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture
def files(tmp_path):
    train = write(tmp_path / "train.jsonl", [{"text": f"w{i}", "label": i % 2} for i in range(300)])
    held = write(tmp_path / "eval.jsonl", [{"text": f"w{i}", "label": i % 2} for i in range(290, 310)])
    return DataSettings(train=train, eval=held)


def test_validation_is_a_tenth_of_train_and_disjoint(files, encoder):
    splits = read_splits(files, TASK, encoder, ("0", "1"))
    train, validation = set(splits.train.ids.tolist()), set(splits.validation.ids.tolist())
    assert not train & validation
    assert len(train) + len(validation) == 300
    assert 15 <= len(validation) <= 50
    assert splits.shared == 10
    assert len(splits.eval) == 20


def test_a_validation_file_leaves_train_whole(files, encoder):
    splits = read_splits(files.model_copy(update={"validation": files.eval}), TASK, encoder, ("0", "1"))
    assert (len(splits.train), len(splits.validation)) == (300, 20)


def test_labels(files, tmp_path, encoder):
    assert label_names(files, TASK) == ("0", "1")
    assert TASK.label_names(["b", "a", "b"]) == ("a", "b")
    assert TASK.label_names([10, 9.0, 1]) == ("1", "9", "10")
    with pytest.raises(DataError, match="at least two classes"):
        TASK.label_names([1, 1])
    other = write(tmp_path / "other.jsonl", [{"text": "w1", "label": "0"}, {"text": "w2", "label": "neutral"}])
    with pytest.raises(DataError, match=r"one of the model's labels \('0', '1'\) at .*other.jsonl:2, got 'neutral'"):
        read_splits(files.model_copy(update={"eval": other}), TASK, encoder, ("0", "1"))


def test_a_long_text_is_refused_or_cut(files, tmp_path, encoder):
    path = write(tmp_path / "long.jsonl", [{"text": "w1", "label": 0}, {"text": "w1 " * 9, "label": 1}])
    data = files.model_copy(update={"eval": path})
    with pytest.raises(DataError, match=r"at most 8 tokens at .*long.jsonl:2, got 9; .*--truncate"):
        read_splits(data, TASK, encoder, ("0", "1"))
    assert read_splits(data, TASK, encoder._replace(truncate=True), ("0", "1")).eval.lengths.tolist() == [1, 8]


def test_unlabelled_files_need_no_label(tmp_path, encoder):
    path = write(tmp_path / "texts.jsonl", [{"text": "w1"}, {"text": "w2 w3"}])
    examples = read_unlabelled(path, DataSettings(), TASK, encoder)
    assert examples.labels is None
    assert examples.ids.tolist() == [2, 3, 4]


def test_too_few_rows_to_split(tmp_path, encoder):
    path = write(tmp_path / "few.jsonl", [{"text": "w4", "label": 0}, {"text": "w5", "label": 1}])
    with pytest.raises(DataError, match=r"no validation example; give more rows or --validation"):
        read_splits(DataSettings(train=path), TASK, encoder, ("0", "1"))


class TestCalibration:
    """Texts to calibrate on, and what is left of their file for a task without labels."""

    def test_the_same_texts_whatever_their_order_each_once(self, tmp_path, encoder):
        texts = [{"text": f"w{n}"} for n in range(60)]
        found = []
        for order in (texts, texts[::-1] + texts[:20]):
            data = DataSettings(calibrate=write(tmp_path / "texts.jsonl", order))
            splits = read_splits(data, task_named("embedding"), encoder, None, samples=20)
            parts = (splits.calibration, splits.validation, splits.eval)
            assert [len(part) for part in parts] == [20, 13, 27]
            found.append([part.content_hash() for part in parts])
        assert found[0] == found[1]
        assert len(set(found[0])) == 3

    def test_a_task_with_labels_is_not_judged_on_them(self, tmp_path, encoder, files):
        path = write(tmp_path / "texts.jsonl", [{"text": f"w{n}"} for n in range(60)])
        splits = read_splits(DataSettings(calibrate=path), TASK, encoder, ("0", "1"), samples=20)
        assert splits.validation is splits.eval is None

    def test_training_texts_without_their_labels_where_no_file_is_named(self, files, encoder):
        splits = read_splits(files, TASK, encoder, ("0", "1"), samples=5)
        assert len(splits.calibration) == 5
        assert splits.calibration.labels is None
        assert set(splits.calibration.ids) <= set(splits.train.ids)

    def test_too_few_is_refused_with_the_number_there_is(self, tmp_path, encoder):
        path = write(tmp_path / "texts.jsonl", [{"text": "w1"}, {"text": "w2"}, {"text": "w2"}])
        with pytest.raises(DataError, match=r"at least 256 different texts.*got 2.*--samples to at most 2"):
            read_splits(DataSettings(calibrate=path), task_named("embedding"), encoder, None, samples=256)
