"""Writing that is whole or not there at all.

A file is written beside its target, fsynced and renamed over it. A folder is staged under a hidden
name in the same parent, every file fsynced, a manifest with sizes and sha256 written last, then one
rename and an fsync of the parent. What fails says which path, and how much space is needed and free.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from lorimer.errors import StorageError

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
STAGED = ".staged-"
ASIDE = f"{STAGED}old-"
# Of Linux' renameat2: paths from the current folder; swap the two.
AT_FDCWD, RENAME_EXCHANGE = -100, 2


@contextmanager
def storage_errors(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn an operating system's error into a StorageError that names the path and the space."""
    try:
        yield
    except OSError as error:
        raise explain(error, path, needed) from error


def explain(error: OSError, path: Path, needed: int | None = None) -> StorageError:
    """One message for an operating system's error while writing under `path`."""
    space = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        wanted = "" if needed is None else f"{needed:,} bytes needed, "
        space = f" ({wanted}{free_bytes(path):,} bytes free)"
    reason = error.strerror or str(error)
    return StorageError(
        f"cannot write: {reason}{space}",
        fix="Free space or permissions there, or choose another folder (`output.dir`, or --out).",
        path=error.filename if isinstance(error.filename, str) else path,
    )


def free_bytes(path: Path) -> int:
    """Bytes free on the disk that holds `path`, or would."""
    for place in (path, *path.absolute().parents):
        if place.exists():
            return shutil.disk_usage(place).free
    return 0


def check_writable(path: Path) -> None:
    """Raise StorageError if nothing could be written under `path`, which need not exist yet."""
    place = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not place.is_dir():
        raise explain(NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)), place)
    probe = place / f"{STAGED}probe-{os.getpid()}"
    with storage_errors(place):
        # Asking for the permission is not enough: a read-only or full disk shows only when writing.
        probe.write_bytes(b"?")
        probe.unlink()


def check_space(path: Path, needed: int) -> None:
    """Raise StorageError if the disk of `path` has less than `needed` bytes free."""
    if free_bytes(path) < needed:
        raise explain(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), path, needed)


def make_folder(path: Path) -> Path:
    """The folder, made if missing."""
    with storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def write_file(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    write_stream(path, lambda file: file.write(data), len(data))


def write_stream(path: Path, fill: Callable[[BinaryIO], object], needed: int | None = None) -> None:
    """Make the file `path` out of what `fill` writes; a failure leaves what was there before.

    `needed` is the bytes that an error about space names.
    """
    staged = path.with_name(f"{STAGED}{path.name}-{os.getpid()}")
    with storage_errors(path, needed):
        try:
            with staged.open("wb") as file:
                fill(file)
            _sync(staged)
            os.replace(staged, path)
            _sync(path.parent)
        finally:
            staged.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_folder(path: Path, fill: Callable[[Path], None], *, manifest: bool = True) -> None:
    """Make the folder `path` out of what `fill` writes into a staged one; an old one is replaced.

    A failure leaves what was at `path` before, and nothing else.
    """
    staged = path.with_name(f"{STAGED}{path.name}-{os.getpid()}")
    with storage_errors(path):
        try:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
            fill(staged)
            for file in _files(staged):
                _sync(file)
            if manifest:
                _write_manifest(staged)
            _sync(staged)
            _swap(staged, path)
            _sync(path.parent)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file, written without a second copy of it in memory. Raises OSError, which the
    library hides in an error of its own."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error
    # The library makes a file that only its owner can read.
    path.chmod(mode)


def _swap(staged: Path, path: Path) -> None:
    """Rename over a missing folder at once; swap with an existing one, so that one of both is there at
    every instant. Where the system cannot swap, that one is moved aside first."""
    if not path.exists():
        os.rename(staged, path)
        return
    if _exchange(staged, path):
        return
    aside = path.with_name(f"{ASIDE}{path.name}-{os.getpid()}")
    os.rename(path, aside)
    try:
        os.rename(staged, path)
    except OSError:
        os.rename(aside, path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one call; false where the system or the file system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if call is None:
        return False
    if call(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(code, os.strerror(code), str(other))


def clear_staged(folder: Path) -> None:
    """Delete what writers that died have left in this folder, and put back what one had moved aside.

    Only for a folder that nobody else writes into.
    """
    with storage_errors(folder):
        for entry in sorted(folder.glob(f"{STAGED}*")):
            name = entry.name.removeprefix(ASIDE).rpartition("-")[0]
            if entry.name.startswith(ASIDE) and not (folder / name).exists():
                os.rename(entry, folder / name)
            elif entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def remove_folder(path: Path) -> None:
    """Delete a folder so that it is never there in part under its name. What cannot be deleted stays, and
    `clear_staged` or the next attempt deletes it."""
    gone = path.with_name(f"{STAGED}gone-{path.name}-{os.getpid()}")
    with suppress(OSError):
        os.rename(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


def verify_folder(path: Path) -> str | None:
    """None if the folder is what its manifest says, else what is wrong with it."""
    try:
        listed = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        there = {file.relative_to(path).as_posix() for file in _files(path)}
        for name, wanted in listed.items():
            file = path / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                return f"its manifest lists {name!r}, which is no file of this folder"
            if file.stat().st_size != wanted["bytes"]:
                return f"{name} has {file.stat().st_size} bytes (wanted: {wanted['bytes']})"
            if sha256(file) != wanted["sha256"]:
                return f"{name} does not have the content that was written"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"the manifest cannot be read ({error})"
    # One that is hidden is the system's or an editor's, and is never read.
    others = sorted(name for name in there - {MANIFEST, *listed} if not name.startswith("."))
    return f"{others[0]} is not in the manifest" if others else None


def is_number(value: object) -> bool:
    """Whether a value of JSON can be computed with: no bool, no NaN, no integer beyond every float."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_manifest(folder: Path) -> None:
    files = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in _files(folder)
    }
    path = folder / MANIFEST
    path.write_text(json.dumps({"format": 1, "files": files}, indent=2) + "\n", encoding="utf-8")
    _sync(path)


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _sync(path: Path) -> None:
    """fsync of a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
