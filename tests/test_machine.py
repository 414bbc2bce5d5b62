"""Facts about a machine, read from made-up /proc and /sys trees."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lorimer import machine
from lorimer.machine import GIB, Check, Gpu, Kernels, Machine, Memory, TorchBuild, check

MEMINFO = "MemTotal:       16777216 kB\nMemFree:  100 kB\nMemAvailable:    8388608 kB\n"
QUOTA, PERIOD = "cpu.cfs_quota_us", "cpu.cfs_period_us"
NO_LIMIT_V1 = "9223372036854771712"


def tree(root: Path, **files: str) -> Path:
    """Files below `root`; `__` in a name stands for `/`, and `_` stays."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def cgroup(root: Path, line: str, files: dict[str, str]) -> Path:
    tree(root, proc__meminfo=MEMINFO, proc__self__cgroup=line + "\n")
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("cpuinfo", "name", "sets", "bf16"),
    [
        (
            "processor\t: 0\nmodel name\t: Fast CPU @ 2 GHz\n"
            "flags\t\t: fpu avx2 fma avx512f avx512_bf16 amx_bf16\n"
            "\nprocessor\t: 1\nmodel name\t: Other\nflags\t: fpu\n",
            "Fast CPU @ 2 GHz",
            ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16"),
            True,
        ),
        ("model name : Old CPU\nflags : fpu avx2 avx512f\n", "Old CPU", ("avx2", "avx512f"), False),
        ("Model : A board\nFeatures : fp asimd i8mm bf16\n", "A board", ("asimd", "i8mm", "bf16"), True),
        ("Hardware : Another board\nFeatures : half neon\n", "Another board", ("neon",), False),
    ],
    ids=["x86 with AMX", "x86 without bf16", "ARM with bf16", "ARM without bf16"],
)
def test_processor(tmp_path: Path, cpuinfo: str, name: str, sets: tuple[str, ...], bf16: bool) -> None:
    root = tree(tmp_path, proc__cpuinfo=cpuinfo)
    assert machine.cpu_name(root) == name
    assert machine.instruction_sets(root) == sets
    assert machine.native_bf16(root) is bf16


def test_a_machine_without_proc_still_has_facts(tmp_path: Path) -> None:
    assert machine.cpu_name(tmp_path)
    assert machine.instruction_sets(tmp_path) == ()
    assert machine.native_bf16(tmp_path) is False
    assert machine.memory(tmp_path).total > 0
    assert machine.cores(tmp_path) >= 1


@pytest.mark.parametrize(
    ("line", "files", "total", "available", "limit"),
    [
        ("0::/", {}, 16 * GIB, 8 * GIB, None),
        ("0::/job", {"job/memory.max": "max"}, 16 * GIB, 8 * GIB, None),
        (
            "0::/job",
            {
                "job/memory.max": str(2 * GIB),
                "job/memory.current": str(1 * GIB),
                "job/memory.stat": f"anon 1\ninactive_file {GIB // 2}\n",
            },
            2 * GIB,
            3 * GIB // 2,
            2 * GIB,
        ),
        (
            "0::/outer/inner",
            {
                "outer/memory.max": str(3 * GIB),
                "outer/memory.current": str(2 * GIB),
                "outer/inner/memory.max": str(4 * GIB),
                "outer/inner/memory.current": "0",
            },
            3 * GIB,
            1 * GIB,
            3 * GIB,
        ),
        ("4:memory:/job", {"memory/job/memory.limit_in_bytes": NO_LIMIT_V1}, 16 * GIB, 8 * GIB, None),
        (
            "4:memory:/job",
            {
                "memory/job/memory.limit_in_bytes": str(4 * GIB),
                "memory/job/memory.usage_in_bytes": str(3 * GIB),
                "memory/job/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}\n",
            },
            4 * GIB,
            2 * GIB,
            4 * GIB,
        ),
        (
            "4:memory:/docker/0123",
            {"memory/memory.limit_in_bytes": str(GIB), "memory/memory.usage_in_bytes": str(2 * GIB)},
            GIB,
            0,
            GIB,
        ),
    ],
    ids=["none", "v2 max", "v2", "v2 outer", "v1 huge is none", "v1", "v1 path of the host"],
)
def test_memory_is_what_the_container_may_use(
    tmp_path: Path, line: str, files: dict[str, str], total: int, available: int, limit: int | None
) -> None:
    assert machine.memory(cgroup(tmp_path, line, files)) == Memory(total, available, limit)


@pytest.mark.parametrize(
    ("line", "files", "cores"),
    [
        ("0::/", {}, 8),
        ("0::/job", {"job/cpu.max": "max 100000"}, 8),
        ("0::/job", {"job/cpu.max": "250000 100000"}, 2),
        ("0::/job", {"job/cpu.max": "50000 100000"}, 1),
        ("0::/job", {"cpu.max": "300000 100000", "job/cpu.max": "max 100000"}, 3),
        ("2:cpu,cpuacct:/j", {f"cpu,cpuacct/j/{QUOTA}": "400000", f"cpu,cpuacct/j/{PERIOD}": "100000"}, 4),
        ("2:cpu:/j", {f"cpu/j/{QUOTA}": "-1", f"cpu/j/{PERIOD}": "100000"}, 8),
        ("0::/job", {"job/cpu.max": "9900000 100000"}, 8),
    ],
)  # fmt: skip
def test_cores_are_what_affinity_and_container_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert machine.cores(cgroup(tmp_path, line, files)) == cores


def test_disk_and_permission_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert machine.disk_free(tmp_path / "a/b/c") > 0
    assert machine.writable(tmp_path / "a/b/c")
    assert not machine.writable(tmp_path / "file/below")
    assert not machine.writable(Path("/proc/1/below"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file"]


def test_compiler_is_found_by_cxx_then_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert machine.compiler() is None
    for name in ("g++", "special"):
        (tmp_path / name).write_text("", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    assert machine.compiler() == str(tmp_path / "g++")
    monkeypatch.setenv("CXX", "special -O2")
    assert machine.compiler() == str(tmp_path / "special")


def test_facts_without_torch_do_not_import_it() -> None:
    code = (
        "import sys; from lorimer.machine import look, native_bf16, torch_version;"
        "native_bf16(); found = look(with_torch=False); assert found.torch is None;"
        "assert torch_version(); assert 'torch' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_torch_build_is_that_of_the_installed_torch() -> None:
    import torch

    assert machine.torch_build() == TorchBuild(torch.__version__, torch.version.cuda)
    assert len(machine.gpus()) == torch.cuda.device_count()


FINE = Machine(
    system="Linux x86_64",
    cpu="Fast CPU",
    cores=2,
    instruction_sets=("avx2", "amx_bf16"),
    native_bf16=True,
    memory=Memory(16 * GIB, 12 * GIB, None),
    disk_path=".",
    disk_free=50 * GIB,
    open_files=4096,
    compiler="/usr/bin/c++",
    python="3.12.1",
    torch=TorchBuild("2.13.0+cpu", None),
    gpus=(),
)


def checks_of(found: Machine, tmp_path: Path) -> dict[str, Check]:
    return {
        item.name: item
        for item in check(found, home=tmp_path / "home", work=tmp_path, kernels=Kernels(True, "native"))
    }


def test_a_good_machine_has_nothing_to_fix(tmp_path: Path) -> None:
    assert {item.level for item in checks_of(FINE, tmp_path).values()} == {"ok"}


@pytest.mark.parametrize(
    ("change", "name", "level", "words"),
    [
        ({"python": "3.10.9"}, "Python", "block", "3.11"),
        ({"torch": None}, "torch", "block", "pip install torch"),
        ({"torch": TorchBuild("2.5.1", None)}, "torch", "block", "torch>=2.6"),
        ({"torch": TorchBuild("2.13.0+cu126", "12.6")}, "GPU", "fix", "nvidia-smi"),
        ({"native_bf16": False}, "bf16", "fix", "fp32"),
        ({"cores": 1}, "cores", "fix", "one core"),
        ({"memory": Memory(8 * GIB, 3 * GIB, None)}, "memory", "fix", "smaller base"),
        ({"memory": Memory(2 * GIB, GIB // 2, 2 * GIB)}, "memory", "block", "container"),
        ({"disk_free": 2 * GIB}, "disk", "fix", "output.dir"),
        ({"disk_free": GIB // 4}, "disk", "block", "output.dir"),
        ({"open_files": 256}, "open files", "fix", "ulimit -n 1024"),
        ({"compiler": None}, "compiler", "fix", "without one"),
    ],
)
def test_each_shortcoming_is_named_alone(
    tmp_path: Path, change: dict[str, object], name: str, level: str, words: str
) -> None:
    checks = checks_of(replace(FINE, **change), tmp_path)  # type: ignore[arg-type]
    assert (checks[name].level, words in f"{checks[name].found} {checks[name].fix}") == (level, True)
    assert {item.name for item in checks.values() if item.level != "ok"} == {name}


def test_a_gpu_with_bf16_makes_up_for_the_cpu(tmp_path: Path) -> None:
    build = TorchBuild("2.13.0+cu126", "12.6")
    found = replace(FINE, native_bf16=False, cores=1, torch=build, gpus=(Gpu("Card", 24 * GIB, True),))
    checks = checks_of(found, tmp_path)
    assert {item.level for item in checks.values()} == {"ok"}
    assert checks["GPU"].found == "Card, 24.0 GiB"


def test_folders_that_cannot_be_written_block(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    checks = {
        item.name: item
        for item in check(
            FINE, home=tmp_path / "file/x", work=tmp_path / "file/y", kernels=Kernels(False, "none")
        )
    }
    assert checks["bases"].level == checks["runs"].level == "block"
    assert "LORIMER_HOME" in (checks["bases"].fix or "")
