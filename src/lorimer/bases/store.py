"""The bases kept on this machine: $LORIMER_HOME/bases/NAME/, each with a manifest.json."""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from lorimer.errors import BaseError
from lorimer.storage import MANIFEST, storage_errors

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?<!\.gguf)", re.ASCII)


def home() -> Path:
    """$LORIMER_HOME, else a folder in the user's cache."""
    if chosen := os.environ.get("LORIMER_HOME"):
        return Path(chosen).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "lorimer"


def folder_of(name: str) -> Path:
    """Where a base of this name is kept; `owner/name` of a hub becomes `owner--name`.

    Raises BaseError for a name that could leave the store.
    """
    plain = name.replace("/", "--", 1)
    if not NAME.fullmatch(plain) or ".." in plain:
        raise BaseError(
            f"`{name}` is not a name for a base", fix="Use letters, digits, dots, dashes and underscores."
        )
    return home() / "bases" / plain


def manifest_of(folder: Path) -> dict[str, Any]:
    try:
        value = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def list_bases() -> list[dict[str, Any]]:
    """The manifests of all bases kept here, by name."""
    root = home() / "bases"
    if not root.is_dir():
        return []
    kept = [manifest_of(folder) for folder in sorted(root.iterdir()) if NAME.fullmatch(folder.name)]
    return [manifest for manifest in kept if manifest.get("name")]


def kept_path(name: str) -> Path | None:
    """The kept base's GGUF file or folder, or None; its sizes are checked against its manifest."""
    try:
        folder = folder_of(name)
    except BaseError:
        return None
    manifest = manifest_of(folder)
    if not manifest:
        return None
    files = manifest.get("files")
    wrong = _damage(folder, files) if isinstance(files, dict) else "its manifest lists no files"
    if wrong or not files:
        raise BaseError(
            f"the kept base `{name}` is damaged: {wrong or 'its manifest lists no files'}",
            fix=f"Run: lorimer rm {name} && lorimer pull {name}",
            path=folder,
        )
    first = next(iter(files))
    return folder / first if len(files) == 1 and first.endswith(".gguf") else folder


def _damage(folder: Path, files: dict[str, Any]) -> str | None:
    """What is wrong with the files of a kept base, by their names and sizes; None if nothing."""
    for file, facts in files.items():
        path = folder / file
        if Path(file).name != file or not isinstance(facts, dict):
            return f"its manifest lists {file!r}"
        if not path.is_file() or path.stat().st_size != facts.get("bytes"):
            return f"{file} is missing or has another size"
    return None


def resolve_base(name: str | Path) -> Path:
    """The path of a base: a folder or .gguf file as given, or a name that is kept here.

    Raises BaseError that says what was looked for and how to get it.
    """
    from lorimer.bases.pull import KNOWN

    try:
        path = Path(name).expanduser()
        if path.exists():
            return path.resolve()
    except (OSError, RuntimeError):
        pass  # a name too long for a file, or of a user that is not there
    kept = kept_path(str(name))
    if kept is not None:
        return kept
    names = [str(manifest["name"]) for manifest in list_bases()]
    if str(name) in KNOWN or HUB_ID.fullmatch(str(name)):
        fix = f"Get it with: lorimer pull {name}"
    elif address := re.match(r"https?://[^/]+/([\w.-]+/[\w.-]+)", str(name)):
        fix = f"A base has a name, not an address. Get it with: lorimer pull {address[1]}"
    elif "$" in str(name):
        fix = "Write the path out: variables of the shell are not read here."
    else:
        close = difflib.get_close_matches(str(name), [*names, *KNOWN], 1)
        fix = f"Did you mean `{close[0]}`? " if close else ""
        fix += f"Kept here: {', '.join(names) or 'none'}. Known to pull: {', '.join(KNOWN)}."
    raise BaseError(
        f"there is no base `{name}`: no such file or folder, and none kept by that name", fix=fix
    )


def remove_base(name: str) -> int:
    """Delete a kept base; returns the bytes freed. Raises BaseError if there is none."""
    folder = folder_of(name)
    if not manifest_of(folder) or folder.is_symlink():
        raise BaseError(f"no base `{name}` is kept here", fix="See `lorimer ls`.")
    freed = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    with storage_errors(folder):
        shutil.rmtree(folder)
    return freed
