"""Which kernels run, who says so, and what happens where there are none."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lorimer.cli import app
from lorimer.config.read import config_from
from lorimer.errors import ConfigError, UserError
from lorimer.kernels.native import library
from lorimer.kernels.native.build import HERE, LIBRARY, CannotBuild, build

needs_kernels = pytest.mark.skipif(not library.available(), reason="no compiled kernels here")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in ("LORIMER_ISA", "CXX")}
    return subprocess.run(
        [sys.executable, *arguments], env=env | environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The library is looked for anew in the test, and again after it."""
    caches = (library._open, library.available, library._from_environment, library.note)
    monkeypatch.delenv("LORIMER_ISA", raising=False)
    for cache in caches:
        cache.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


def doctor_says(capsys: pytest.CaptureFixture[str]) -> str:
    """The doctor's lines about kernels, as one."""
    app.run(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if "kernels" in line[:12])
    rest = [line for line in lines[first + 1 :] if line.startswith(" " * 12)]
    return " ".join(line.strip() for line in [lines[first], *rest])


# --- LORIMER_ISA --------------------------------------------------------------------------------


def test_an_unknown_instruction_set_is_one_message() -> None:
    done = python("-m", "lorimer", "doctor", LORIMER_ISA="avx3")
    assert (done.returncode, done.stdout) == (2, "")
    assert "LORIMER_ISA is 'avx3', which is not known\n  Here it can be: reference" in done.stderr
    assert len(done.stderr.splitlines()) == 2
    for isa in library.available():
        assert isa in done.stderr


def test_an_instruction_set_of_other_processors_is_one_message() -> None:
    missing = [isa for isa in library.NEEDS if isa not in library.available()]
    if not missing:
        pytest.skip("this processor has them all")
    done = python("-m", "lorimer", "doctor", LORIMER_ISA=missing[-1])
    assert (done.returncode, done.stdout) == (2, "")
    assert f"LORIMER_ISA is '{missing[-1]}': " in done.stderr
    assert "Traceback" not in done.stderr


@needs_kernels
def test_kernels_can_be_switched_off(fresh: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fresh.setenv("LORIMER_ISA", "reference")
    assert library.active() == "reference"
    assert not library.usable(torch.zeros(1))
    assert "switched off by LORIMER_ISA=reference" in doctor_says(capsys)


@needs_kernels
def test_the_best_is_used(fresh: pytest.MonkeyPatch) -> None:
    assert library.active() == library.available()[-1]
    assert library.status() == f"native, {library.available()[-1]}"


@needs_kernels
def test_a_weaker_one_can_be_named_and_others_used_for_a_while(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("LORIMER_ISA", "portable")
    assert library.active() == "portable"
    assert library.status() == "native, portable"
    with library.using(library.available()[-1]):
        assert library.active() == library.available()[-1]
        with library.using("reference"):
            assert library.active() == "reference"
    assert library.active() == "portable"


def test_using_what_is_not_here_is_refused() -> None:
    with pytest.raises(UserError, match="'avx3' is not here"), library.using("avx3"):
        pass


# --- what the kernels take ----------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize(
    ("tensor", "taken"),
    [
        (torch.zeros(2), True),
        (torch.zeros(2, dtype=torch.bfloat16), True),
        (None, True),
        (torch.zeros(2, dtype=torch.float16), False),
        (torch.zeros(2, dtype=torch.float64), False),
        (torch.zeros(2, dtype=torch.int64), False),
        (torch.zeros(2, device="meta"), False),
    ],
)
def test_bf16_and_fp32_on_the_cpu_are_taken(tensor: torch.Tensor | None, taken: bool) -> None:
    with library.using(library.available()[-1]):
        assert library.usable(torch.zeros(1), tensor) == taken


def test_a_fallback_is_noted_once_for_those_who_debug(
    fresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="lorimer"):
        for _ in range(3):
            library.note("attention", "heads of 320 features")
        library.note("attention", "softcap")
    said = [(record.levelno, record.getMessage()) for record in caplog.records]
    assert said == [
        (logging.DEBUG, "attention runs on its reference: heads of 320 features"),
        (logging.DEBUG, "attention runs on its reference: softcap"),
    ]


# --- the file -----------------------------------------------------------------------------------


def none_here(why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert library.available() == ()
    assert library.active() == "reference"
    assert not library.usable(torch.zeros(1))
    assert why in library.status()
    said = doctor_says(capsys)
    assert why in said
    assert "python -m lorimer.kernels.native.build" in said


def test_a_file_that_is_no_library_is_not_used(
    fresh: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "kernels.so"
    path.write_text("no library\n", encoding="utf-8")
    fresh.setenv("LORIMER_KERNELS", str(path))
    none_here("kernels.so cannot be loaded", capsys)


def test_no_file_is_no_error(
    fresh: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh.delenv("LORIMER_KERNELS", raising=False)
    fresh.setattr(library, "HERE", tmp_path)
    none_here("not compiled", capsys)


@needs_kernels
def test_a_library_of_other_sources_is_not_used(
    fresh: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copyfile(os.environ.get("LORIMER_KERNELS", HERE / LIBRARY), tmp_path / LIBRARY)
    kernels, _ = library._open()
    assert kernels is not None
    made_from = kernels.lorimer_sources().decode()
    fresh.delenv("LORIMER_KERNELS", raising=False)
    fresh.setattr(library, "HERE", tmp_path)
    for sources, used in ((made_from, True), ("0" * 16, False)):
        for cache in (library._open, library.available, library._from_environment):
            cache.cache_clear()
        fresh.setattr(library, "sources_hash", lambda sources=sources: sources)
        assert bool(library.available()) == used
    none_here("compiled from other sources", capsys)


# --- the build ----------------------------------------------------------------------------------


def test_without_a_compiler_the_build_says_one_line(tmp_path: Path) -> None:
    done = python("-m", "lorimer.kernels.native.build", "--out", str(tmp_path / "out"), PATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "the native kernels could not be built: no C++ compiler was found (c++, g++, clang++)\n"
    )
    assert not (tmp_path / "out").exists()


def test_a_compiler_that_fails_leaves_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    false = shutil.which("false")
    if false is None:
        pytest.skip("no program here that only fails")
    monkeypatch.setenv("CXX", false)
    (tmp_path / LIBRARY).write_text("an older one", encoding="utf-8")
    with pytest.raises(CannotBuild, match="false failed"):
        build(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LIBRARY]
    assert (tmp_path / LIBRARY).read_text(encoding="utf-8") == "an older one"


# --- threads ------------------------------------------------------------------------------------


def test_no_threads_is_no_setting() -> None:
    with pytest.raises(ConfigError, match=r"train\.threads"):
        config_from({"base": "b", "data": {"train": "t.jsonl"}, "train": {"threads": 0}}, need_files=False)


OWN_TEAM = """
import torch
from lorimer.kernels.native import library
from lorimer.kernels.native.matmul import head_loss, matmul

kernels, _ = library._open()
generator = torch.Generator().manual_seed(0)
states, weight = torch.randn((70, 300), generator=generator), torch.randn((1000, 300), generator=generator)
labels = torch.randint(1000, (70,), generator=generator)

def results(threads):
    torch.set_num_threads(threads)
    losses, grad = head_loss(states, weight, labels, weight=1.0)
    return matmul(states, weight, b_turned=True), losses, grad

shared = {threads: results(threads) for threads in (1, 2, 3)}
kernels.lorimer_use_openmp(None, None, None)
for _ in range(20):
    for threads in (2, 3, 1):
        for mine, other in zip(results(threads), shared[threads]):
            assert torch.equal(mine, other), threads
print("same")
"""


@needs_kernels
def test_a_team_of_its_own_gives_the_same_bits() -> None:
    """As where PyTorch brings no OpenMP runtime of GNU's: the kernels' own threads do the work."""
    done = subprocess.run([sys.executable, "-c", OWN_TEAM], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("same\n", 0), done.stderr


@pytest.mark.parametrize(
    ("device", "dtype", "wanted"),
    [
        ("cpu", torch.float32, True),
        ("cpu", torch.bfloat16, True),
        ("cpu", torch.float16, False),
        ("cuda", torch.float32, False),
    ],
)
def test_where_and_in_what_the_kernels_compute(device: str, dtype: torch.dtype, wanted: bool) -> None:
    assert library.computes(torch.device(device), dtype) is (wanted and bool(library.available()))
