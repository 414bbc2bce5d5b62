"""Writing that is whole or not there: failures injected at every call, every byte checked."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorimer import storage
from lorimer.errors import StorageError
from lorimer.storage import (
    check_space,
    check_writable,
    clear_staged,
    explain,
    free_bytes,
    is_number,
    make_folder,
    remove_folder,
    verify_folder,
    write_file,
    write_folder,
    write_json,
    write_tensors,
)

OLD, NEW = {"a.txt": b"old a", "sub/b.bin": b"old b"}, {"a.txt": b"new a", "c.txt": b"new c" * 99}


def filler(files: dict[str, bytes]) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    return fill


def tree(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def content(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(folder).items() if name != "manifest.json"}


def test_a_folder_is_written_and_verified(tmp_path: Path) -> None:
    write_folder(tmp_path / "deep" / "x", filler(OLD))
    assert content(tmp_path / "deep" / "x") == OLD
    assert verify_folder(tmp_path / "deep" / "x") is None
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["x"]


def test_a_folder_replaces_another_whole(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", filler(OLD))
    write_folder(tmp_path / "x", filler(NEW))
    assert content(tmp_path / "x") == NEW
    assert verify_folder(tmp_path / "x") is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_without_a_manifest(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", filler(OLD), manifest=False)
    assert tree(tmp_path / "x") == OLD


class Failing:
    """The operating system's call fails at its n-th time, and only then."""

    def __init__(self, call: Callable[..., Any], at: int) -> None:
        self.call, self.at, self.times = call, at, 0

    def __call__(self, *given: Any, **named: Any) -> Any:
        self.times += 1
        if self.times == self.at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.call(*given, **named)


# Syncs of a replaced folder: its two files, the manifest, the staged folder; then the parent.
# A folder that is there is moved aside by one rename more.
POINTS = [("fsync", 1), ("fsync", 2), ("fsync", 3), ("fsync", 4), ("rename", 1)]


@pytest.mark.parametrize(
    ("name", "at", "old"),
    [(*point, old) for point in POINTS for old in (True, False)] + [("rename", 2, True), ("swap", 1, True)],
)
def test_a_failure_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, at: int, old: bool
) -> None:
    if old:
        write_folder(tmp_path / "x", filler(OLD))
    before = tree(tmp_path)
    where, called = (storage, "_exchange") if name == "swap" else (os, name)
    failing = Failing(getattr(where, called), at)
    with monkeypatch.context() as patch:
        if name == "rename":  # the way of systems that cannot swap two folders
            patch.setattr(storage, "_exchange", lambda one, other: False)
        patch.setattr(where, called, failing)
        with pytest.raises(StorageError, match="No space left on device"):
            write_folder(tmp_path / "x", filler(NEW))
    assert failing.times >= at
    assert tree(tmp_path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == (["x"] if old else [])
    assert not old or verify_folder(tmp_path / "x") is None


def test_where_folders_cannot_be_swapped_one_is_moved_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_exchange", lambda one, other: False)
    for files in (OLD, NEW):
        write_folder(tmp_path / "x", filler(files))
    assert content(tmp_path / "x") == NEW
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_what_dead_writers_left_is_cleared_and_what_they_moved_aside_put_back(tmp_path: Path) -> None:
    (tmp_path / ".staged-x-7").mkdir()
    (tmp_path / ".staged-x-7" / "half").write_text("h")
    (tmp_path / ".staged-run.json-7").write_text("{")
    for name in ("kept", "gone"):
        (tmp_path / f".staged-old-{name}-7").mkdir()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "new").write_text("n")
    clear_staged(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["gone", "kept"]
    assert (tmp_path / "kept" / "new").exists()


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "broken disk"), ValueError("mine"), KeyboardInterrupt()]
)
def test_a_failure_while_filling_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    write_folder(tmp_path / "x", filler(OLD))
    before = tree(tmp_path)

    def fill(folder: Path) -> None:
        filler(NEW)(folder)
        raise error

    with pytest.raises(StorageError if isinstance(error, OSError) else type(error)):
        write_folder(tmp_path / "x", fill)
    assert tree(tmp_path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("old", [True, False])
def test_a_process_that_dies_leaves_what_was_there(tmp_path: Path, old: bool) -> None:
    """And what it left behind does not stand in the way of the next attempt."""
    if old:
        write_folder(tmp_path / "x", filler(OLD))
    program = (
        "import os, pathlib, sys; from lorimer.storage import write_folder\n"
        "def fill(folder):\n    (folder / 'a.txt').write_text('half'); os._exit(9)\n"
        "write_folder(pathlib.Path(sys.argv[1]) / 'x', fill)\n"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], env=os.environ | {"PYTHONPATH": paths}, check=False
    )
    assert done.returncode == 9
    assert (tmp_path / "x").exists() is old
    assert not old or content(tmp_path / "x") == OLD
    write_folder(tmp_path / "x", filler(NEW))
    assert content(tmp_path / "x") == NEW


def test_every_flipped_byte_and_every_truncation_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    write_folder(folder, filler(OLD | {"empty": b""}))
    for name, data in OLD.items():
        file = folder / name
        for place in range(len(data)):
            file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            assert f"{name} does not have the content" in str(verify_folder(folder))
            file.write_bytes(data[:place])
            assert f"{name} has {place} bytes (wanted: {len(data)})" in str(verify_folder(folder))
        file.write_bytes(data + b"x")
        assert f"{name} has {len(data) + 1} bytes" in str(verify_folder(folder))
        file.unlink()
        assert f"{file.name} is missing" in str(verify_folder(folder))
        file.write_bytes(data)
    assert verify_folder(folder) is None


def test_a_truncated_or_missing_manifest_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    write_folder(folder, filler(OLD))
    manifest = folder / "manifest.json"
    data = manifest.read_bytes()
    for length in range(len(data) - 1):  # the last byte is a line end
        manifest.write_bytes(data[:length])
        assert "the manifest cannot be read" in str(verify_folder(folder))
    for broken in (b"[]", b"{}", b'{"files": 3}', b'{"files": {"a.txt": 3}}', b"\xff"):
        manifest.write_bytes(broken)
        assert "the manifest cannot be read" in str(verify_folder(folder))
    manifest.unlink()
    assert verify_folder(folder) == "manifest.json is missing"


@pytest.mark.parametrize("absolute", [True, False])
def test_a_manifest_that_lists_what_is_elsewhere_is_not_believed(tmp_path: Path, absolute: bool) -> None:
    """Though size and content are as listed."""
    folder, outside = tmp_path / "x", tmp_path / "outside"
    write_folder(folder, filler(OLD))
    outside.write_bytes(OLD["a.txt"])
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    name = str(outside) if absolute else "../outside"
    manifest["files"][name] = manifest["files"]["a.txt"]
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert verify_folder(folder) == f"its manifest lists {name!r}, which is no file of this folder"


def test_a_file_that_the_manifest_does_not_list_is_found(tmp_path: Path) -> None:
    """One that is hidden is an editor's or the system's."""
    folder = tmp_path / "x"
    write_folder(folder, filler(OLD))
    (folder / ".swp").touch()
    assert verify_folder(folder) is None
    for name in ("z.bin", "more"):
        (folder / name).touch()
        assert verify_folder(folder) == f"{name} is not in the manifest"


@pytest.mark.parametrize(
    ("value", "number"),
    [
        *((0, True), (-2.5, True), (sys.float_info.max, True), (10**308, True)),
        *((10**309, False), (math.inf, False), (-math.inf, False), (math.nan, False)),
        *((True, False), (None, False), ("1", False), ([1], False)),
    ],
)  # fmt: skip
def test_what_a_number_is(value: object, number: bool) -> None:
    assert is_number(value) is number


def test_every_flipped_digit_of_the_manifest_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    write_folder(folder, filler(OLD))
    manifest = folder / "manifest.json"
    data = manifest.read_bytes()
    start = data.index(b'"files"')
    for place in range(start, len(data)):
        if bytes([data[place]]).isalnum():
            manifest.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            assert verify_folder(folder) is not None, data[place - 9 : place + 9]


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_file_is_the_old_one_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    file = tmp_path / "x.txt"
    write_file(file, "old é")
    with monkeypatch.context() as patch:
        patch.setattr(os, at, Failing(getattr(os, at), 1))
        with pytest.raises(StorageError, match="bytes needed"):
            write_file(file, b"new")
    assert tree(tmp_path) == {"x.txt": "old é".encode()}
    write_file(file, b"new")
    assert tree(tmp_path) == {"x.txt": b"new"}
    write_json(file, {"é": 1})
    assert file.read_text(encoding="utf-8") == '{\n  "é": 1\n}\n'


def test_messages_name_the_path_and_the_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 1234))  # type: ignore[attr-defined]
    with pytest.raises(StorageError) as caught:
        check_space(tmp_path / "not" / "yet", 5000)
    text = str(caught.value)
    assert str(tmp_path / "not" / "yet") in text
    assert "5,000 bytes needed, 1,234 bytes free" in text
    assert caught.value.exit_code == 4
    check_space(tmp_path, 1234)


def test_a_full_disk_is_an_oserror_in_a_file_of_tensors_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from safetensors import SafetensorError

    path, tensors = tmp_path / "t.safetensors", {"a": torch.zeros(9)}
    with pytest.raises(OSError, match="No such file"):
        write_tensors(tmp_path / "nowhere" / "t.safetensors", tensors)

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(StorageError, match=r"No space left on device \([\d,]+ bytes free\)"):
            write_folder(tmp_path / "out", lambda folder: write_tensors(folder / "t.safetensors", tensors))
    write_tensors(path, tensors)
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("file", encoding="utf-8")
    with pytest.raises(StorageError, match="Not a directory"):
        check_writable(tmp_path / "x" / "y")
    with pytest.raises(StorageError):
        write_folder(tmp_path / "x" / "y", filler(NEW))
    with pytest.raises(StorageError):
        storage.make_folder(tmp_path / "x")
    assert tree(tmp_path) == {"x": b"file"}


def test_a_disk_that_cannot_be_written_shows_by_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(Path, "write_bytes", read_only)
    with pytest.raises(StorageError, match="Read-only file system") as caught:
        check_writable(tmp_path / "a" / "b")
    assert caught.value.path == str(tmp_path)


@pytest.mark.parametrize(
    ("error", "says", "about"),
    [
        (OSError(errno.EACCES, "no entry"), "cannot write: no entry", "given"),
        (OSError("words alone"), "cannot write: words alone", "given"),
        (OSError(errno.EACCES, "no entry", "theirs"), "cannot write: no entry", "theirs"),
        (OSError(errno.EACCES, "no entry", 3), "cannot write: no entry", "given"),
        (
            OSError(errno.EDQUOT, "over quota"),
            "cannot write: over quota (9 bytes needed, 8 bytes free)",
            "given",
        ),
    ],
)
def test_an_error_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, error: OSError, says: str, about: str
) -> None:
    monkeypatch.setattr(storage, "free_bytes", lambda path: 8)
    told = explain(error, Path("given"), 9)
    assert (told.problem, told.path) == (says, about)


def test_a_place_that_is_nowhere_has_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drive that is not there has no folder that is."""
    assert free_bytes(tmp_path / "not" / "yet") > 0
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert free_bytes(tmp_path) == 0


def test_a_folder_is_made_with_those_above_it_and_may_be_there(tmp_path: Path) -> None:
    assert make_folder(tmp_path / "a" / "b") == make_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").is_dir()


def test_everything_is_on_the_disk_before_its_name_is_and_the_name_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is synced, in order, and when the rename is: power may fail at any moment."""
    done: list[str] = []
    real = {"_sync": storage._sync, "_swap": storage._swap, "replace": os.replace}

    def heard(name: str) -> Callable[..., None]:
        def call(path: Path, *more: Any) -> None:
            done.append(f"{name} {path.name}")
            real[name](path, *more)

        return call

    for name in ("_sync", "_swap"):
        monkeypatch.setattr(storage, name, heard(name))
    monkeypatch.setattr(os, "replace", heard("replace"))
    (tmp_path / "runs").mkdir()
    write_folder(tmp_path / "runs" / "x", filler(OLD))
    staged = f".staged-x-{os.getpid()}"
    wanted = ["a.txt", "b.bin", "manifest.json", staged]
    assert done == [*(f"_sync {name}" for name in wanted), f"_swap {staged}", "_sync runs"]
    done.clear()
    write_file(tmp_path / "runs" / "f", "text")
    assert done == [f"_sync .staged-f-{os.getpid()}", f"replace .staged-f-{os.getpid()}", "_sync runs"]


def test_what_an_earlier_process_of_the_same_number_left_is_not_taken_in(tmp_path: Path) -> None:
    staged = tmp_path / f".staged-x-{os.getpid()}"
    staged.mkdir()
    (staged / "junk").write_text("j", encoding="utf-8")
    write_folder(tmp_path / "x", filler(NEW))
    assert content(tmp_path / "x") == NEW


def test_tensors_keep_their_metadata_and_an_error_without_a_number_is_one_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from safetensors import SafetensorError, safe_open

    path, tensors = tmp_path / "t.safetensors", {"a": torch.ones(3)}
    write_tensors(path, tensors, {"format": "pt"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("a").tolist() == [1, 1, 1]

    def broken(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing")

    monkeypatch.setattr("safetensors.torch.save_file", broken)
    with pytest.raises(OSError, match="Input/output error") as caught:
        write_tensors(path, tensors)
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(path))


def test_a_folder_is_removed_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First it loses its name; what cannot be deleted then lies under a staged one, to be cleared."""
    for name in ("x", "y", "z"):
        write_folder(tmp_path / name, filler(OLD))
    remove_folder(tmp_path / "x")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["y", "z"]

    def stuck(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EBUSY, "busy")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", stuck)
        remove_folder(tmp_path / "y")
    assert content(tmp_path / "y") == OLD
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", stuck)
        remove_folder(tmp_path / "z")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [f".staged-gone-z-{os.getpid()}", "y"]
    clear_staged(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["y"]
    remove_folder(tmp_path / "never")


class Library:
    """The C library: `renameat2` answers with this error, or is not there, or does its work."""

    def __init__(self, code: int | None) -> None:
        if code is not None:
            self.renameat2 = lambda *given: -1 if code else 0


@pytest.mark.parametrize(
    ("code", "system", "swapped"),
    [
        (0, "posix", True),
        (0, "nt", False),
        (None, "posix", False),
        (errno.ENOSYS, "posix", False),
        (errno.EINVAL, "posix", False),
        (errno.EACCES, "posix", None),
    ],
)
def test_what_a_system_says_to_a_swap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None, system: str, swapped: bool | None
) -> None:
    made: list[Any] = []

    def library(name: None, *, use_errno: bool = False) -> Library:
        made.append((name, use_errno))
        return Library(code)

    one, other = tmp_path / "one", tmp_path / "other"
    with monkeypatch.context() as patch:
        patch.setattr(storage.ctypes, "CDLL", library)
        patch.setattr(storage.ctypes, "get_errno", lambda: code)
        patch.setattr(os, "name", system)
        if swapped is None:
            with pytest.raises(PermissionError, match="Permission denied") as caught:
                storage._exchange(one, other)
            assert (caught.value.errno, caught.value.filename) == (errno.EACCES, str(other))
        else:
            assert storage._exchange(one, other) is swapped
    assert made == ([(None, True)] if system == "posix" else [])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has renameat2")
def test_two_folders_are_swapped_in_one_call(tmp_path: Path) -> None:
    """And an error of that call is one of the disk, with its number."""
    for name, files in (("one", OLD), ("other", NEW)):
        write_folder(tmp_path / name, filler(files), manifest=False)
    assert storage._exchange(tmp_path / "one", tmp_path / "other") is True
    assert (tree(tmp_path / "one"), tree(tmp_path / "other")) == (NEW, OLD)
    with pytest.raises(FileNotFoundError) as caught:
        storage._exchange(tmp_path / "one", tmp_path / "none")
    assert caught.value.filename == str(tmp_path / "none")


def test_what_was_moved_aside_and_cannot_be_deleted_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stuck(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EBUSY, "busy")

    write_folder(tmp_path / "x", filler(OLD))
    with monkeypatch.context() as patch:
        patch.setattr(storage, "_exchange", lambda one, other: False)
        patch.setattr(os, "rmdir", stuck)
        write_folder(tmp_path / "x", filler(NEW))
    assert content(tmp_path / "x") == NEW
    clear_staged(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_clearing_says_where_it_failed_and_keeps_names_with_a_dash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".staged-old-step-000007-99").mkdir()
    clear_staged(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-000007"]

    def stuck(path: Path) -> None:
        raise OSError(errno.EBUSY, "busy")

    (tmp_path / ".staged-f-9").touch()
    monkeypatch.setattr(Path, "unlink", stuck)
    with pytest.raises(StorageError, match="busy") as caught:
        clear_staged(tmp_path)
    assert caught.value.path == str(tmp_path)


def test_making_a_folder_says_where_it_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(path: Path, **_: Any) -> None:
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr(Path, "mkdir", stuck)
    with pytest.raises(StorageError, match="read-only") as caught:
        make_folder(tmp_path / "a")
    assert caught.value.path == str(tmp_path / "a")


def test_a_manifest_has_a_format_and_syncing_keeps_no_file_open(tmp_path: Path) -> None:
    def opened() -> int:
        return len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0

    write_folder(tmp_path / "w", filler(OLD))
    before = opened()
    write_folder(tmp_path / "x", filler(OLD))
    assert opened() == before
    manifest = json.loads((tmp_path / "x" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["format"] == 1
    assert set(manifest["files"]) == set(OLD)
