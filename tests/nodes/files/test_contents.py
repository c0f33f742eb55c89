"""Files are known by their content, and read again only where they may have changed."""

import builtins
import os

import pytest
from pack.nodes.files import contents


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"old")
    return file


def test_content_counts_and_name_and_time_do_not(path, tmp_path):
    before = contents.digest(path)
    (other := tmp_path / "other").write_bytes(b"old")
    os.utime(other, (1, 1))
    assert contents.digest(other) == before
    times = path.stat()
    path.write_bytes(b"new")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert contents.digest(path) != before


def test_a_settled_file_is_read_once(path, monkeypatch):
    read = []
    monkeypatch.setattr(builtins, "open", lambda *args, original=open: read.append(args) or original(*args))
    now = path.stat().st_ctime_ns
    monkeypatch.setattr(contents.time, "time_ns", lambda: now + 3_000_000_000)
    assert contents.digest(path) == contents.digest(path) and len(read) == 1
    monkeypatch.setattr(contents.time, "time_ns", lambda: now + 1)
    assert contents.digest(path) == contents.digest(path) and len(read) == 3


def test_a_missing_file_is_no_content(tmp_path):
    with pytest.raises(FileNotFoundError):
        contents.digest(tmp_path / "none")
