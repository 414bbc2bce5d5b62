"""A wheel from the package index, so that a transfer that was cut off goes on where it stopped.

The index is the one that the user's pip is set up for. Whatever this cannot do (indexes that need a
login or are folders, servers without ranges that break off) it leaves to pip itself.
"""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag, urljoin, urlsplit

from lorimer.storage import sha256, storage_errors

ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
PARTIAL = ".partial"
CHUNK = 1 << 20
PAGE_BYTES = 50_000_000
TRIES = 4


def fetch_wheel(
    package: str, version: str, digest: str, folder: Path, say: Callable[[str], None]
) -> Path | None:
    """The wheel of this sha256 in `folder`, or None where pip should be asked instead.

    Raises StorageError if it cannot be written. What came before an interruption stays as
    NAME.partial and is not fetched again.
    """
    try:
        settings = _pip_settings()
        context = ssl.create_default_context(cafile=settings.get("cert"))
        url = next(_wheel_urls(package, version, settings, context), None)
    except (OSError, ValueError, HTTPException, subprocess.SubprocessError):
        return None
    if url is None:
        return None
    target = folder / Path(urlsplit(url).path).name
    partial = target.with_name(target.name + PARTIAL)
    for _ in range(TRIES):
        try:
            if _fetch(url, partial, context, say):
                break
        except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError, ssl.SSLError):
            continue
    else:
        return None
    with storage_errors(target):
        if sha256(partial) != digest:
            partial.unlink()
            return None
        partial.replace(target)
    return target


def _pip_settings() -> dict[str, str]:
    """pip's own settings by their last name, those of the environment over those of files."""
    command = [sys.executable, "-m", "pip", "config", "list", "--disable-pip-version-check"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    found: dict[str, dict[str, str]] = {"file": {}, "env": {}}
    for line in result.stdout.splitlines():
        key, _, value = line.partition("=")
        scope, _, name = key.strip().rpartition(".")
        found["env" if scope.startswith(":env:") else "file"][name] = value.strip().strip("'\"")
    return found["file"] | found["env"]


def _wheel_urls(
    package: str, version: str, settings: dict[str, str], context: ssl.SSLContext
) -> Iterator[str]:
    """Where the indexes say that this wheel is."""
    if settings.get("no-index") in ("1", "true", "yes", "on"):
        return
    indexes = [settings.get("index-url") or _default_index(), *settings.get("extra-index-url", "").split()]
    start = f"{package.replace('-', '_')}-{version}-"
    for index in indexes:
        # A login in the address is pip's business.
        if urlsplit(index).scheme in ("http", "https") and "@" not in urlsplit(index).netloc:
            for name, url in _listed(f"{index.rstrip('/')}/{package}/", context):
                if name.startswith(start) and name.endswith(".whl"):
                    yield url


def _default_index() -> str:
    """The index that pip uses when nothing else is set."""
    try:
        from pip._internal.models.index import PyPI
    except ImportError:
        return ""
    return str(PyPI.simple_url)


def _listed(page: str, context: ssl.SSLContext) -> Iterator[tuple[str, str]]:
    """Names and addresses of a package's files (PEP 503 and 691)."""
    request = urllib.request.Request(page, headers={"Accept": ACCEPT})
    with urllib.request.urlopen(request, context=context, timeout=60) as answer:
        text = answer.read(PAGE_BYTES).decode("utf-8", "replace")
        where = answer.url
        structured = "json" in answer.headers.get("Content-Type", "")
    if structured:
        files: list[dict[str, Any]] = json.loads(text)["files"]
        links = [str(file["url"]) for file in files]
    else:
        links = _links(text)
    for link in links:
        url = urldefrag(urljoin(where, link)).url
        if urlsplit(url).scheme in ("http", "https"):
            yield Path(urlsplit(url).path).name, url


def _links(text: str) -> list[str]:
    found: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.extend(value for key, value in attrs if tag == "a" and key == "href" and value)

    Reader().feed(text)
    return found


def _fetch(url: str, partial: Path, context: ssl.SSLContext, say: Callable[[str], None]) -> bool:
    """Fetch what is still missing; true when nothing is."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer: HTTPResponse = urllib.request.urlopen(request, context=context, timeout=60)
    except urllib.error.HTTPError as error:
        # Nothing is left of the range: the file is whole already, or not the one it was.
        if error.code == 416:
            return True
        raise
    with answer:
        goes_on = answer.status == 206
        total = int(answer.headers.get("Content-Length") or 0) + (have if goes_on else 0)
        if goes_on:
            say(f"going on at {have / 1e6:.0f} of {total / 1e6:.0f} MB")
        done = _copy(answer, partial, have if goes_on else 0, total, say)
    return done == total or not total


def _copy(answer: HTTPResponse, partial: Path, done: int, total: int, say: Callable[[str], None]) -> int:
    """Append the body to the file, saying each quarter; the bytes that are there then."""
    told = done
    with storage_errors(partial, total - done), partial.open("ab" if done else "wb") as file:
        while chunk := answer.read(CHUNK):
            file.write(chunk)
            done += len(chunk)
            if total and done - told >= total / 4 and done < total:
                told = done
                say(f"{done / 1e6:.0f} of {total / 1e6:.0f} MB")
        file.flush()
        os.fsync(file.fileno())
    return done
