"""What is on disk is whole, or it is not there."""

import errno
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from flyweight.artifact import MANIFEST, Manifest, read_manifest, refuse_existing, verify, write_folder, write_manifest
from flyweight.errors import ArtifactError, StorageError


def manifest() -> Manifest:
    return Manifest(
        flyweight="0",
        created="now",
        task="embedding",
        family="bert",
        inputs=("input_ids",),
        pad_token_id=0,
        max_length=8,
        origin="x",
    )


def make(out, content=b"0123456789", overwrite=False):
    with write_folder(out, overwrite) as folder:
        (folder / "onnx").mkdir()
        (folder / "onnx/model.onnx").write_bytes(content)
        write_manifest(folder, manifest())
    return out


def test_written_verified_and_read_back(tmp_path):
    out = make(tmp_path / "a")
    assert verify(out) == read_manifest(out)
    assert read_manifest(out).files["onnx/model.onnx"].bytes == 10
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("position", [0, 5, 9])
def test_one_changed_byte_is_refused(tmp_path, position):
    path = make(tmp_path / "a") / "onnx/model.onnx"
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model.onnx as it was written.*sha256"):
        verify(tmp_path / "a")


def test_a_missing_short_or_foreign_file_is_refused(tmp_path):
    out = make(tmp_path / "a")
    (out / "onnx/model.onnx").write_bytes(b"123")
    with pytest.raises(ArtifactError, match="expected 10 bytes"):
        verify(out)
    (out / "onnx/model.onnx").unlink()
    with pytest.raises(ArtifactError, match="no such file"):
        verify(out)
    (tmp_path / "secret").write_bytes(b"0123456789")
    (out / "onnx/model.onnx").symlink_to(tmp_path / "secret")
    with pytest.raises(ArtifactError, match="leaves it"):
        verify(out)


def test_manifests_that_cannot_be_read(tmp_path):
    with pytest.raises(ArtifactError, match="no flyweight.json"):
        read_manifest(tmp_path)
    path = tmp_path / MANIFEST
    path.write_text("{")
    with pytest.raises(ArtifactError, match="a readable"):
        read_manifest(tmp_path)
    path.write_text(json.dumps({"format": 99}))
    with pytest.raises(ArtifactError, match="expected format 1 .* got 99"):
        read_manifest(tmp_path)
    path.write_text(json.dumps({"format": 1, "task": 3}))
    with pytest.raises(ArtifactError, match="a valid"):
        read_manifest(tmp_path)


def test_an_existing_folder_is_kept_without_overwrite(tmp_path):
    out = make(tmp_path / "a")
    with pytest.raises(ArtifactError, match="pass --overwrite"):
        make(out, b"new")
    assert (out / "onnx/model.onnx").read_bytes() == b"0123456789"
    make(out, b"new", overwrite=True)
    assert (out / "onnx/model.onnx").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


def test_overwrite_never_takes_a_folder_that_is_not_ours(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").touch()
    with pytest.raises(ArtifactError, match="a folder that Flyweight did not write"):
        make(tmp_path / "home", overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="a file"):
        make(tmp_path / "file", overwrite=True)


def test_pickles_never_enter_an_artifact(tmp_path):
    with pytest.raises(ArtifactError, match=r"pytorch_model.bin"), write_folder(tmp_path / "a") as folder:
        (folder / "pytorch_model.bin").touch()
        write_manifest(folder, manifest())
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="file size limits are a POSIX thing")
def test_a_full_disk_leaves_the_old_artifact_and_no_rest(tmp_path):
    """A real failing write: the process may not write files over 4 kB (EFBIG), as a full disk gives ENOSPC."""
    out = make(tmp_path / "a")
    before = verify(out)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(StorageError, match="nothing was changed"):
            make(out, b"x" * 100_000, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert verify(out) == before
    assert os.listdir(tmp_path) == ["a"]


def test_errors_of_others_are_not_called_a_full_disk(tmp_path):
    with pytest.raises(FileNotFoundError), write_folder(tmp_path / "a"):
        (tmp_path / "nothing").read_bytes()


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_a_killed_writer_leaves_the_old_artifact(tmp_path):
    out = make(tmp_path / "a")
    before = verify(out)
    code = f"""
        import os, signal
        from flyweight.artifact import write_folder
        with write_folder({str(out)!r}, overwrite=True) as folder:
            (folder / "half").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False).returncode == -signal.SIGKILL
    assert verify(out) == before


def test_files_are_flushed_as_windows_wants_it(tmp_path, monkeypatch):
    """There a file that is open for reading alone cannot be flushed: EBADF."""
    fcntl = pytest.importorskip("fcntl")
    flush = os.fsync

    def on_windows(handle):
        if (
            not stat.S_ISDIR(os.fstat(handle).st_mode)
            and fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        ):
            raise OSError(errno.EBADF, "Bad file descriptor")
        flush(handle)

    monkeypatch.setattr(os, "fsync", on_windows)
    assert verify(make(tmp_path / "a"))


def test_two_that_write_the_same_at_once_leave_one_whole(tmp_path, monkeypatch):
    rename, out = Path.rename, tmp_path / "a"

    def another_was_quicker(path, target):
        if path.name.endswith(".tmp") and not out.exists():
            monkeypatch.undo()
            make(out)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", another_was_quicker)
    make(out, b"mine", overwrite=True)
    assert verify(out).files["onnx/model.onnx"].bytes == 4
    assert os.listdir(tmp_path) == ["a"]


def test_a_place_that_cannot_be_written_is_found_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="room and permission to write"):
        refuse_existing(tmp_path / "file/a", overwrite=True)
    refuse_existing(tmp_path / "new/a", overwrite=False)
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_kill_between_the_two_renames_left_aside_comes_back(tmp_path):
    out = make(tmp_path / "a")
    before = verify(out)
    aside = tmp_path / ".a.x1.old"
    aside.mkdir()
    out.rename(aside / "a")
    with pytest.raises(ArtifactError, match="pass --overwrite"):
        make(out)
    assert verify(out) == before
    assert os.listdir(tmp_path) == ["a"]


def test_files_are_as_the_umask_says(tmp_path):
    old = os.umask(0o027)
    try:
        out = make(tmp_path / "a")
    finally:
        os.umask(old)
    assert (out / MANIFEST).stat().st_mode & 0o777 == 0o640
    assert out.stat().st_mode & 0o777 == 0o750
