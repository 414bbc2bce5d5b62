"""The bases kept on a machine: names, what is found by them, and what is deleted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorimer.bases.store import folder_of, home, kept_path, list_bases, remove_base, resolve_base
from lorimer.errors import BaseError


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of kept bases, in a home of its own; the working folder is empty."""
    monkeypatch.setenv("LORIMER_HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home/bases"


def keep(folder: Path, files: dict[str, bytes], name: str | None = None) -> Path:
    folder.mkdir(parents=True)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    listed = {file: {"bytes": len(content)} for file, content in files.items()}
    manifest = {"name": name or folder.name.replace("--", "/"), "files": listed}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def test_home_is_chosen_or_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert home() == tmp_path / "home"
    monkeypatch.delenv("LORIMER_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert home() == tmp_path / "cache/lorimer"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home() == tmp_path / ".cache/lorimer"
    monkeypatch.setenv("LORIMER_HOME", "~/here")
    assert home() == tmp_path / "here"


def test_what_is_kept_is_found_by_name(root: Path) -> None:
    one = keep(root / "small", {"model.gguf": b"GGUF"})
    many = keep(root / "owner--name", {"config.json": b"{}", "model.safetensors": b"x"})
    assert resolve_base("small") == one / "model.gguf"
    assert resolve_base("owner/name") == many
    assert resolve_base("owner--name") == many
    assert [base["name"] for base in list_bases()] == ["owner/name", "small"]


def test_a_path_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "work/model"
    folder.mkdir()
    assert resolve_base("model") == folder
    assert resolve_base(folder) == folder
    monkeypatch.setenv("HOME", str(tmp_path / "work"))
    assert resolve_base("~/model") == folder


def test_nothing_is_kept_at_first() -> None:
    assert list_bases() == []
    assert kept_path("small") is None


# A name that is not there -> what the message says to do.
MISSING = [
    ("smollm2-135m", "Get it with: lorimer pull smollm2-135m"),
    ("owner/name", "Get it with: lorimer pull owner/name"),
    ("smollm-135m", r"Did you mean `smollm2-135m`\? Kept here: none. Known to pull: smollm2-135m."),
    ("bigg", r"Did you mean `big`\?|Kept here: none"),
]


@pytest.mark.parametrize(("name", "fix"), MISSING)
def test_a_base_that_is_not_here_says_how_to_get_it(name: str, fix: str) -> None:
    with pytest.raises(BaseError, match=fix) as caught:
        resolve_base(name)
    assert f"there is no base `{name}`" in str(caught.value)


ESCAPES = [
    "", ".", "..", "../x", "a/../b", "a/b/c", "/etc", "/", "/a", "~", "-rf", ".hidden", "a\\..\\b",
    "a\0b", "a b", "ä", "a\n", "a" * 129, "owner/..", "../name", "a..b", "a%2e%2e", "C:x",
]  # fmt: skip


@pytest.mark.parametrize("name", ["./model.gguf", "models/mine.gguf", "../model"])
def test_a_path_is_not_taken_for_a_hub_id(name: str) -> None:
    with pytest.raises(BaseError) as caught:
        resolve_base(name)
    assert "lorimer pull" not in str(caught.value)


@pytest.mark.trap("S6")
@pytest.mark.parametrize("name", ESCAPES)
def test_names_that_could_leave_the_store_are_refused(name: str, root: Path) -> None:
    with pytest.raises(BaseError, match="is not a name for a base"):
        folder_of(name)
    with pytest.raises(BaseError, match="is not a name for a base"):
        remove_base(name)
    assert kept_path(name) is None


@pytest.mark.parametrize("name", ["a", "7b", "Qwen2.5-0.5B_it", "a" * 128, "owner/name", "o.w-n/a.m-e_2"])
def test_plain_names_are_taken(name: str, root: Path) -> None:
    assert folder_of(name).parent == root


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.gguf").unlink(),
        lambda folder: (folder / "model.gguf").write_bytes(b"GG"),
    ],
)
def test_a_kept_file_that_is_gone_or_has_another_size_is_named(root: Path, damage: object) -> None:
    folder = keep(root / "small", {"model.gguf": b"GGUF"})
    damage(folder)  # type: ignore[operator]
    with pytest.raises(BaseError, match=r"model.gguf is missing or has another size") as caught:
        resolve_base("small")
    assert "lorimer rm small && lorimer pull small" in str(caught.value)


def test_a_folder_without_a_manifest_is_not_kept(root: Path) -> None:
    keep(root / "half", {"model.gguf": b"GGUF"})
    (root / "half/manifest.json").unlink()
    assert kept_path("half") is None
    assert list_bases() == []
    with pytest.raises(BaseError, match="no base `half` is kept here"):
        remove_base("half")


DEEP = "[" * 9999


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "\x00", DEEP])
def test_a_manifest_that_cannot_be_read_is_no_manifest(root: Path, text: str) -> None:
    keep(root / "half", {"model.gguf": b"GGUF"})
    (root / "half/manifest.json").write_text(text, encoding="utf-8")
    assert kept_path("half") is None
    assert list_bases() == []


@pytest.mark.parametrize(
    "files", [["model.gguf"], {"model.gguf": 4}, {"model.gguf": {}}, {"../../secret.gguf": {"bytes": 4}}]
)
def test_a_manifest_that_lists_nonsense_is_refused(root: Path, files: object) -> None:
    folder = keep(root / "small", {"model.gguf": b"GGUF"})
    (folder / "manifest.json").write_text(json.dumps({"name": "small", "files": files}), encoding="utf-8")
    (root.parent / "secret.gguf").write_bytes(b"GGUF")
    with pytest.raises(BaseError, match="damaged"):
        kept_path("small")


@pytest.mark.parametrize("name", ["a" * 300, "~nobody-of-this-name/x"])
def test_a_name_that_pathlib_refuses_is_refused_in_our_words(name: str) -> None:
    with pytest.raises(BaseError, match="there is no base"):
        resolve_base(name)


def test_what_an_interrupted_pull_staged_is_not_listed(root: Path) -> None:
    keep(root / ".staged-small", {"model.gguf": b"GGUF"}, name="small")
    assert list_bases() == []


@pytest.mark.trap("S6")
def test_removing_deletes_the_base_and_nothing_else(root: Path, tmp_path: Path) -> None:
    keep(root / "small", {"model.gguf": b"GGUF"})
    other = keep(root / "smaller", {"model.gguf": b"GGUF"})
    outside = keep(tmp_path / "outside", {"model.gguf": b"GGUF"})
    manifest = (root / "small/manifest.json").stat().st_size
    assert remove_base("small") == 4 + manifest
    assert not (root / "small").exists()
    (root / "link").symlink_to(outside)
    for name in ("small", "link"):
        with pytest.raises(BaseError, match=f"no base `{name}` is kept here"):
            remove_base(name)
    assert (outside / "model.gguf").exists()
    assert (other / "model.gguf").exists()


@pytest.mark.trap("S6")
def test_a_link_inside_a_kept_base_is_deleted_not_followed(root: Path, tmp_path: Path) -> None:
    outside = keep(tmp_path / "outside", {"model.gguf": b"GGUF"})
    folder = keep(root / "small", {"model.gguf": b"GGUF"})
    (folder / "away").symlink_to(outside)
    remove_base("small")
    assert (outside / "model.gguf").read_bytes() == b"GGUF"
