"""main(): commands found, errors turned into one message and an exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

import lorimer
from lorimer.cli import app
from lorimer.errors import (
    ConfigError,
    DataError,
    DivergenceError,
    GateError,
    Interrupted,
    LorimerError,
    StorageError,
)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Puts a function in place of the command `doctor`."""

    def put(function: Callable[[], None]) -> None:
        module = types.ModuleType("lorimer.cli.doctor")
        module.doctor = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "lorimer.cli.doctor", module)

    return put


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("wrong", path="c.yaml", line=3), 2),
        (DataError("wrong"), 2),
        (GateError("low"), 3),
        (StorageError("full"), 4),
        (DivergenceError("nan"), 1),
        (LorimerError("failed"), 1),
        (Interrupted("stopped", fix="Go on"), 130),
    ],
)
def test_an_error_is_its_message_and_its_code(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str], error: LorimerError, code: int
) -> None:
    def fail() -> None:
        raise error

    command(fail)
    assert app.run(["doctor"]) == code
    captured = capsys.readouterr()
    assert captured.err == (f"{error}\n" if code == 130 else f"error: {error}\n")
    assert captured.out == ""


def test_an_interrupt_ends_with_130(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    command(stop)
    assert app.run(["doctor"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_an_unexpected_error_is_one_line_and_a_traceback_on_request(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("by\nzero")

    command(fail)
    monkeypatch.delenv("LORIMER_DEBUG", raising=False)
    assert app.run(["doctor"]) == 1
    err = capsys.readouterr().err
    assert "this is a bug in lorimer: ZeroDivisionError: by zero\n" in err
    assert "LORIMER_DEBUG=1" in err
    assert "Traceback" not in err
    monkeypatch.setenv("LORIMER_DEBUG", "1")
    assert app.run(["doctor"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")]
)
def test_too_little_memory_is_not_called_a_bug(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fail() -> None:
        raise error

    command(fail)
    assert app.run(["doctor"]) == 1
    err = capsys.readouterr().err
    assert "not enough memory" in err
    assert "bug" not in err


def test_the_exit_code_of_a_command_is_kept(command: Callable[..., None]) -> None:
    def leave() -> None:
        raise typer.Exit(3)

    command(leave)
    assert app.run(["doctor"]) == 3
    command(lambda: None)
    assert app.run(["doctor"]) == 0


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["trian"], ["no command `trian`", "`lorimer train`"]),
        (["zzz"], ["`lorimer --help`"]),
        (["config", "explian"], ["explain", "lorimer config --help"]),
        (["config", "explain", "--jsno"], ["no such option: --jsno", "lorimer config explain --help"]),
        (["merge"], ["missing argument", "lorimer merge --help"]),
        (["eval", "x", "--rows", "many"], ["rows", "lorimer eval --help"]),
        (["train"], ["no config file is given", "lorimer quickstart"]),
        (["train", "nope.yaml"], ["nope.yaml", "no such config file"]),
        (["train", "lora.r=3"], ["no config file is given"]),
        (["config", "explain", "train.epoch"], ["Did you mean `train.epochs`"]),
        (["quickstart", "--recipe", "hom"], ["no recipe `hom`", "`home`"]),
        (["quickstart", "lora.rr=3"], ["Did you mean `lora.r`"]),
    ],
)
def test_wrong_usage_ends_with_2_and_says_what_is_near(
    arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    for part in parts:
        assert part in err


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(arguments) == 0
    out = capsys.readouterr().out
    assert out.index("lorimer quickstart") < out.index("Begin") < out.index("Train") < out.index("Bases")
    assert max(map(len, out.splitlines())) <= 72


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["--version"]) == 0
    assert capsys.readouterr().out == f"lorimer {lorimer.__version__}\n"
    pyproject = Path(lorimer.__file__).parents[2] / "pyproject.toml"
    assert f'\nversion = "{lorimer.__version__}"\n' in pyproject.read_text(encoding="utf-8")


def test_config_explain_and_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["config", "explain", "lora.r"]) == 0
    assert "a whole number from 1 to 4096" in capsys.readouterr().out
    assert app.run(["config", "explain"]) == 0
    assert "train.batch_size" in capsys.readouterr().out.splitlines()
    assert app.run(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "RunConfig"


def start(*arguments: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "lorimer", *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(lorimer.__file__).parents[1])},
    )


def test_a_reader_that_goes_away_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = start("config", "schema", stdout=writing)
    os.close(writing)
    assert process.communicate()[1] == b""
    assert process.returncode == 1


def test_the_overview_imports_nothing_heavy() -> None:
    code = (
        "import sys; from lorimer.cli.app import run; run(['--help'])\n"
        "heavy = {'torch', 'numpy', 'typer', 'rich', 'pydantic', 'yaml'} & sys.modules.keys()\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(Path(lorimer.__file__).parents[1])},
        capture_output=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr.decode()


@pytest.mark.parametrize("name", ["config", "train", "eval", "generate", "chat", "merge", "quickstart"])
def test_the_help_of_a_command_imports_no_torch(name: str) -> None:
    code = (
        f"import sys; from lorimer.cli.app import run; run([{name!r}, '--help'])\n"
        "sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(Path(lorimer.__file__).parents[1])},
        capture_output=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr.decode()
