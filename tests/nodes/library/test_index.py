"""What is remembered: each file is read and hashed once for each writing, by two processes at once as well."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import folder_paths
import pytest
from launcher.scripts import ROOT
from pack.nodes.consent.record import ConsentRecord
from pack.nodes.library import entries, index, listing


def database() -> Path:
    return Path(folder_paths.get_system_user_directory("understudy")) / "library.sqlite3"


@pytest.fixture
def read(monkeypatch):
    """The files that were read, in order."""
    opened, plain = [], entries.read
    monkeypatch.setattr(entries, "read", lambda path, kinds: opened.append(path.name) or plain(path, kinds))
    return opened


@pytest.fixture
def hashed(monkeypatch):
    opened, plain = [], index._hashed
    monkeypatch.setattr(index, "_hashed", lambda path: opened.append(Path(path).name) or plain(path))
    return opened


def test_a_file_is_read_again_only_when_it_was_written_again(saving, read):
    first, second = saving.identity("anna"), saving.action("flex")
    before = [file.entry for file in listing.all_files()]
    assert sorted(read) == ["anna_00001_.safetensors", "flex_00001_.safetensors"]
    assert [file.entry for file in listing.all_files()] == before and len(read) == 2
    content = second.read_bytes()
    os.utime(first, ns=(1, 1))
    second.write_bytes(content)
    listing.all_files()
    assert len(read) == 4


def test_a_file_that_was_just_written_is_not_remembered(saving, read, monkeypatch):
    """Another writing of the same size within the same step of the clock would not show."""
    monkeypatch.setattr(index, "_SETTLED", 2_000_000_000)
    saving.identity()
    listing.all_files(), listing.all_files()
    assert len(read) == 2


def test_a_file_is_hashed_once(saving, hashed):
    path = saving.identity()
    listing.all_files()
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert index.sha256(str(path)) == index.sha256(str(path)) == expected and len(hashed) == 1
    listing.all_files()
    path.write_bytes(path.read_bytes() + b" ")
    assert index.sha256(str(path)) == hashlib.sha256(path.read_bytes()).hexdigest() != expected
    listing.all_files()
    assert index.sha256(str(path)) == index.sha256(str(path)) and len(hashed) == 3


def test_it_holds_no_names_and_notes_and_forgets_what_was_deleted(saving):
    path = saving.identity("a", ConsentRecord("Anna Secret", ("private",), "Ben Secret", "", "", "a Secret"))
    saving.identity("b", token="tok")
    listing.all_files()
    assert database().is_file() and b"Secret" not in database().read_bytes()
    other = path.with_name("b_00001_.safetensors")
    for gone, kept in ((path, [str(other)]), (other, [])):
        gone.unlink()
        folder_paths.filename_list_cache.clear()
        listing.all_files()
        assert remembered() == kept
        assert gone.name.encode() not in database().read_bytes(), "nor in pages that are free"


def remembered() -> list[str]:
    return index._with_index(lambda d: [path for (path,) in d.execute("SELECT path FROM files")], [])


@pytest.mark.parametrize("content", [b"", b"no database", b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_damaged_index_is_made_again(saving, read, content):
    saving.identity()
    database().parent.mkdir(parents=True)
    database().write_bytes(content)
    assert [file.name for file in listing.all_files()] == ["anna"]
    listing.all_files()
    assert len(read) == 1


def test_an_index_of_another_version_and_strange_entries_are_read_anew(saving, read):
    path = saving.identity()
    listing.all_files()
    for change in ("UPDATE files SET entry = '[1]'", "UPDATE files SET entry = 'null'", "PRAGMA user_version = 99"):
        index._with_index(lambda d, change=change: d.execute(change), None)
        assert [file.name for file in listing.all_files()] == ["anna"]
    assert len(read) == 4 and str(path) in remembered()


def test_without_a_place_for_the_index_the_list_is_whole(saving, read, caplog):
    saving.identity()
    database().parent.parent.mkdir(parents=True, exist_ok=True)
    database().parent.write_text("a file where the folder should be")
    assert [file.name for file in listing.all_files()] == ["anna"]
    listing.all_files()
    assert len(read) == 2 and "files are read again each time" in caplog.text


WRITER = """
import sys
sys.path[:0] = {paths!r}
from launcher import scripts
scripts.alias_pack()
scripts.add_comfy_path({base!r})
import folder_paths
from pathlib import Path
folder_paths.set_user_directory({user!r})
from pack.nodes.library import index
from pack.nodes.library.entries import Entry
index._SETTLED = 0
for turn in range(40):
    paths = {{f"{name}{{turn}}-{{i}}": (turn, 1, 1) for i in range(20)}}
    index.os.path.exists = lambda path: True
    assert len(index.entries_of(paths, lambda path: Entry("action", "", path.name))) == 20
"""


def test_two_processes_write_it_at_once(saving, tmp_path):
    user = folder_paths.get_user_directory()
    paths = [str(ROOT / "tests"), str(ROOT / "workflows")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER.format(paths=paths, base=str(tmp_path / name), user=user, name=name)],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for name in ("first", "second")
    ]
    errors = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    assert not any("files are read again" in error for error in errors)
    assert len(remembered()) == 2 * 40 * 20
