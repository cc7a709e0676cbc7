"""The cache: what counts as there, what a damaged or half-removed entry does, several processes at once."""

import shutil

import pytest

from flyweight import artifact
from flyweight import cache as module
from flyweight.cache import Cache
from flyweight.errors import SettingsError


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def entry(cache, key, content=b"0123456789", engines=None):
    manifest = artifact.Manifest(
        flyweight="0", created="now", task="embedding", family="bert", inputs=("input_ids",), pad_token_id=0,
        max_length=8, origin="x", engines=engines or {},
    )  # fmt: skip
    with artifact.write_folder(cache.prefix(key), overwrite=True) as folder:
        (folder / "model.safetensors").write_bytes(content)
        artifact.write_manifest(folder, manifest)
    return cache.prefix(key)


def test_one_changed_byte_makes_an_entry_unusable(cache):
    path = entry(cache, "a")
    assert cache.found("a")
    assert cache.whole("a")
    (path / "model.safetensors").write_bytes(b"0123456780")
    assert not cache.whole("a")
    cache.drop("a")
    assert not cache.found("a")
    assert list(cache.entries()) == []


def test_an_entry_says_whether_it_has_an_engine(cache):
    engine = artifact.Engine(file="x.onnx", inputs=(), outputs=(), precision="fp32", parity=0.0)
    entry(cache, "with", engines={"onnxruntime": engine})
    entry(cache, "without")
    assert cache.has_engine("with")
    assert not cache.has_engine("without")
    assert not cache.has_engine("none")


def test_every_kind_of_thing_is_listed_counted_and_cleared(cache):
    entry(cache, "a")
    for folder in (cache.work("b"), cache.teachers, cache.tables):
        folder.mkdir(parents=True)
        (folder / "c.json").write_bytes(b"123")
    found = list(cache.entries())
    assert {(one.kind, one.key) for one in found} == {
        ("prefixes", "a"), ("work", "b"), ("teachers", "c.json"), ("tables", "c.json"),
    }  # fmt: skip
    assert {one.kind for one in found} == set(Cache.KINDS)
    assert [one.bytes for one in found if one.kind == "tables"] == [3]
    assert cache.clear() == sum(one.bytes for one in found)
    assert not any(path.is_file() for path in cache.root.rglob("*"))


def test_a_removal_that_is_cut_short_leaves_room_for_the_entry(cache, monkeypatch):
    """Killed within rmtree: what is left must not stand where a run wants to write."""
    path = entry(cache, "a")

    def cut_short(path, ignore_errors):
        (path / artifact.MANIFEST).unlink()

    monkeypatch.setattr(module.shutil, "rmtree", cut_short)
    cache.clear()
    monkeypatch.undo()
    assert not cache.found("a")
    assert entry(cache, "a") == path
    assert cache.found("a")
    cache.clear()
    assert list(cache.root.rglob("*.safetensors")) == []


def test_entries_that_vanish_meanwhile_are_no_error(cache, monkeypatch):
    entry(cache, "a")
    entry(cache, "b")
    whole = module.size_of

    def another_process_was_quicker(path):
        shutil.rmtree(cache.prefix("a"), ignore_errors=True)
        return whole(path)

    monkeypatch.setattr(module, "size_of", another_process_was_quicker)
    assert [found.key for found in cache.entries()] == ["b"]


def test_a_cap_that_is_no_number_of_bytes(monkeypatch):
    for text in ("inf", "nan", "much"):
        monkeypatch.setenv("FLYWEIGHT_CACHE_GB", text)
        with pytest.raises(SettingsError, match="a number of gigabytes"):
            Cache.cap()
