"""lorimer pull, ls, show, rm through the command line: what is printed, and how it ends."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gguf_files import write_model
from lorimer.cli.app import run
from lorimer.cli.bases import size, table
from small_base import write_small_base

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """call("ls", "--json") -> exit code, stdout, stderr; in an empty home and folder."""
    monkeypatch.setenv("LORIMER_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())

    def once(*arguments: str) -> tuple[int, str, str]:
        code = run(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return once


def keep(name: str, tmp_path: Path) -> Path:
    """A GGUF base of this name, kept in the home."""
    folder = tmp_path / "home/bases" / name
    folder.mkdir(parents=True)
    path = write_model(folder / "model.gguf")
    facts = {"name": name, "licence": "MIT", "source": "tiny 1.0", "about": "a tiny base"}
    files = {"model.gguf": {"bytes": path.stat().st_size}}
    (folder / "manifest.json").write_text(json.dumps(facts | {"files": files}), encoding="utf-8")
    return path


def test_ls_says_what_to_do_when_there_is_nothing(call: Call) -> None:
    assert call("ls") == (0, "no bases are kept here; try: lorimer pull smollm2-135m\n", "")
    assert call("ls", "--json")[:2] == (0, "[]\n")


def test_ls_is_a_table(call: Call, tmp_path: Path) -> None:
    bytes_ = keep("tiny", tmp_path).stat().st_size
    keep("a-longer-name", tmp_path)
    code, out, _ = call("ls")
    assert code == 0
    assert out.splitlines() == [
        "name           size      kind  from",
        f"a-longer-name  {size(bytes_)}  gguf  tiny 1.0",
        f"tiny           {size(bytes_)}  gguf  tiny 1.0",
    ]
    assert [base["name"] for base in json.loads(call("ls", "--json")[1])] == ["a-longer-name", "tiny"]


def test_show_a_base(call: Call, tmp_path: Path) -> None:
    path = keep("tiny", tmp_path)
    code, out, _ = call("show", "tiny")
    lines = dict(line.strip().split("  ", 1) for line in out.splitlines()[1:] if "  " in line.strip())
    assert (code, out.splitlines()[0]) == (0, "tiny")
    wanted = {"about": "a tiny base", "architecture": "llama, 1 layers of 256", "licence": "MIT"}
    wanted |= {"tokenizer": "BPE (gpt2, gpt-2), 40 tokens", "path": str(path), "longest": "512 tokens"}
    assert {key: lines[key].strip() for key in wanted} == wanted
    assert "chat template yes" in out
    assert json.loads(call("show", "tiny", "--json")[1])["fingerprint"] in out


def test_show_a_folder_a_file_and_an_adapter(call: Call, tmp_path: Path) -> None:
    write_small_base(tmp_path / "folder", template=None)
    assert "chat template no" in call("show", "folder")[1]
    write_model(tmp_path / "model.gguf", dtype="Q6_K")
    assert "8 Q6_K, 3 F32" in call("show", "model.gguf")[1]
    adapter = tmp_path / "folder"
    config: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    code, out, _ = call("show", "folder")
    assert code == 0
    assert "  targets       q_proj, v_proj\n" in out
    assert "  adapter for   not said\n" in out


@pytest.mark.parametrize("verb", ["show", "rm"])
def test_what_is_not_kept_ends_with_2(call: Call, verb: str) -> None:
    code, out, err = call(verb, "nothing")
    assert (code, out) == (2, "")
    assert "`nothing`" in err


def test_rm_asks_and_without_an_answer_deletes_nothing(call: Call, tmp_path: Path) -> None:
    path = keep("tiny", tmp_path)
    code, _, err = call("rm", "tiny")
    assert code == 2
    assert "Give --yes to delete" in err
    assert path.exists()


@pytest.mark.parametrize(("answer", "stays"), [("n", True), ("", True), ("y", False)])
def test_rm_does_as_it_is_told(
    call: Call, tmp_path: Path, answer: str, stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = keep("tiny", tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer + "\n"))
    code, out, _ = call("rm", "tiny")
    assert (code, path.exists()) == (0, stays)
    assert ("nothing was deleted" in out) == stays


def test_rm_yes_says_what_it_freed(call: Call, tmp_path: Path) -> None:
    keep("tiny", tmp_path)
    code, out, _ = call("rm", "tiny", "--yes", "--json")
    assert code == 0
    assert json.loads(out)["freed_bytes"] > 100_000
    assert call("ls")[1].startswith("no bases")


@pytest.mark.trap("S6")
@pytest.mark.parametrize("name", ["..", "../../outside", "/", ".", "a/../../b"])
def test_rm_never_leaves_the_store(call: Call, tmp_path: Path, name: str) -> None:
    for folder in (tmp_path, tmp_path / "home", tmp_path / "outside"):
        folder.mkdir(exist_ok=True)
        (folder / "manifest.json").write_text('{"name": "x", "files": {}}', encoding="utf-8")
    (tmp_path / "home/bases").mkdir()
    code, _, err = call("rm", name, "--yes")
    assert code == 2
    assert "is not a name for a base" in err
    assert (tmp_path / "outside/manifest.json").exists()
    assert (tmp_path / "home/manifest.json").exists()


def test_pull_of_what_is_kept_says_so(call: Call, tmp_path: Path) -> None:
    path = keep("tiny", tmp_path)
    assert call("pull", "tiny") == (0, f"tiny: kept already at {path}\n", "")
    wanted = {"name": "tiny", "path": str(path), "kept_before": True}
    assert json.loads(call("pull", "tiny", "--json")[1]) == wanted


def test_pull_of_what_is_not_known_ends_with_2(call: Call) -> None:
    code, _, err = call("pull", "nothing")
    assert code == 2
    assert "Known: smollm2-135m; or a hub id such as owner/name" in err


def test_listing_needs_no_torch(tmp_path: Path) -> None:
    keep("tiny", tmp_path)
    code = (
        "import sys; from lorimer.cli.app import run; assert run(['ls']) == run(['show', 'tiny']) == 0; "
        "sys.exit('torch' in sys.modules)"
    )
    own = {
        "LORIMER_HOME": str(tmp_path / "home"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | own, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


SIZES = [
    (0, "0 B"),
    (999, "999 B"),
    (1000, "1.0 kB"),
    (134_479_872, "134.5 MB"),
    (98_362_432, "98.4 MB"),
    (7_000_000_000_000, "7,000.0 GB"),
]


@pytest.mark.parametrize(("count", "text"), SIZES)
def test_sizes_as_a_person_reads_them(count: int, text: str) -> None:
    assert size(count) == text


def test_a_table_has_columns() -> None:
    assert table([("a", "size"), ("longer", "1"), ("b", "")]) == ["a       size", "longer  1", "b"]
