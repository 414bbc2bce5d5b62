"""A wheel from an index on this machine, whole and after transfers that were cut off."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lorimer.bases import transfer
from lorimer.bases.transfer import fetch_wheel

BODY = bytes(range(256)) * 4000
NAME = "tiny_base-1.0-py3-none-any.whl"
DIGEST = hashlib.sha256(BODY).hexdigest()


class Index(ThreadingHTTPServer):
    """Serves one wheel. `cut` ends the next answers after that many bytes of the body."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.cut: list[int] = []
        self.ranges: list[str | None] = []
        self.body = BODY
        self.structured = True
        self.takes_ranges = True

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/simple"


class Handler(BaseHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        if self.path == "/simple/tiny-base/":
            self._page()
        elif self.path == f"/files/{NAME}":
            self._file()
        else:
            self.send_error(404)

    def _page(self) -> None:
        link = f"/files/{NAME}#sha256={DIGEST}"
        structured = self.server.structured
        text = (
            json.dumps({"files": [{"filename": NAME, "url": link}]})
            if structured
            else f'<a href="{link}">x</a>'
        )
        self.send_response(200)
        self.send_header(
            "Content-Type", "application/vnd.pypi.simple.v1+json" if structured else "text/html"
        )
        self.end_headers()
        self.wfile.write(text.encode())

    def _file(self) -> None:
        said = self.headers.get("Range")
        self.server.ranges.append(said)
        start = int(said.removeprefix("bytes=").rstrip("-")) if said and self.server.takes_ranges else 0
        if start and start >= len(self.server.body):
            self.send_error(416)
            return
        part = self.server.body[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part[: self.server.cut.pop(0)] if self.server.cut else part)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    server = Index()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    settings = {"index-url": server.address}
    monkeypatch.setattr(transfer, "_pip_settings", lambda: dict(settings))
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(folder: Path) -> Path | None:
    return fetch_wheel("tiny-base", "1.0", DIGEST, folder, lambda text: None)


@pytest.mark.parametrize("structured", [True, False], ids=["JSON index", "HTML index"])
def test_a_wheel_is_found_and_fetched(index: Index, tmp_path: Path, structured: bool) -> None:
    index.structured = structured
    path = fetch(tmp_path)
    assert path == tmp_path / NAME
    assert path.read_bytes() == BODY
    assert [file.name for file in tmp_path.iterdir()] == [NAME]


def test_a_transfer_that_was_cut_off_goes_on_where_it_stopped(index: Index, tmp_path: Path) -> None:
    index.cut = [100_000, 50_000]
    path = fetch(tmp_path)
    assert path is not None
    assert path.read_bytes() == BODY
    assert index.ranges == [None, "bytes=100000-", "bytes=150000-"]


def test_what_an_earlier_run_left_is_not_fetched_again(index: Index, tmp_path: Path) -> None:
    (tmp_path / (NAME + transfer.PARTIAL)).write_bytes(BODY[:700_000])
    assert fetch(tmp_path) == tmp_path / NAME
    assert index.ranges == ["bytes=700000-"]
    assert (tmp_path / NAME).read_bytes() == BODY


def test_a_whole_partial_file_is_taken(index: Index, tmp_path: Path) -> None:
    (tmp_path / (NAME + transfer.PARTIAL)).write_bytes(BODY)
    assert fetch(tmp_path) == tmp_path / NAME


def test_a_server_without_ranges_begins_again(index: Index, tmp_path: Path) -> None:
    index.takes_ranges = False
    (tmp_path / (NAME + transfer.PARTIAL)).write_bytes(b"x" * 700_000)
    assert fetch(tmp_path) == tmp_path / NAME
    assert (tmp_path / NAME).read_bytes() == BODY


def test_another_content_is_not_kept(index: Index, tmp_path: Path) -> None:
    index.body = BODY[:-1] + b"!"
    assert fetch(tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_what_it_cannot_do_is_left_to_pip(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fetch_wheel("other", "1.0", DIGEST, tmp_path, lambda text: None) is None
    for settings in (
        {"index-url": "http://name:secret@127.0.0.1:1/simple"},
        {"index-url": "file:///somewhere"},
        {"index-url": index.address, "no-index": "1"},
    ):
        monkeypatch.setattr(transfer, "_pip_settings", lambda settings=settings: settings)
        assert fetch(tmp_path) is None
    assert not index.ranges
