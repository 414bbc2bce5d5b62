"""What this machine is: one function for each fact. torch is imported only where a fact needs it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path("/")
# What the kernels and the choice of types look at, by the names of /proc/cpuinfo.
FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


@dataclass(frozen=True, slots=True)
class Machine:
    """The facts that `doctor` prints and run.json keeps. Sizes in bytes."""

    system: str
    python: str
    cpu: str
    instruction_sets: tuple[str, ...]
    cores: int
    native_bf16: bool
    memory_total: int
    memory_available: int
    memory_limit: int | None
    torch: str | None
    gpus: tuple[str, ...]
    compiler: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def look(root: Path = ROOT) -> Machine:
    """All facts at once; `root` stands for / in tests."""
    version, gpus = torch_facts()
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        cpu=cpu_name(root),
        instruction_sets=instruction_sets(root),
        cores=cores(root),
        native_bf16=native_bf16(root),
        memory_total=memory_total(root),
        memory_available=memory_available(root),
        memory_limit=memory_limit(root),
        torch=version,
        gpus=gpus,
        compiler=compiler(),
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _cpuinfo(root: Path, *keys: str) -> str:
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def cpu_name(root: Path = ROOT) -> str:
    return _cpuinfo(root, "model name", "Model") or platform.processor() or platform.machine()


def instruction_sets(root: Path = ROOT) -> tuple[str, ...]:
    """Those of FLAGS that this CPU has."""
    found = set(_cpuinfo(root, "flags", "Features").split())
    if not found and platform.system() == "Darwin":
        found = _mac_flags()
    return tuple(flag for flag in FLAGS if flag in found)


def _mac_flags() -> set[str]:
    names = {"asimd": "hw.optional.AdvSIMD", "bf16": "hw.optional.arm.FEAT_BF16"}
    found = set()
    for flag, name in names.items():
        result = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False)
        if result.stdout.strip() == "1":
            found.add(flag)
    return found


@cache
def native_bf16(root: Path = ROOT) -> bool:
    """Whether the CPU multiplies bf16 itself. Where it does not, bf16 is slower than fp32."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(instruction_sets(root)))


def cores(root: Path = ROOT) -> int:
    """Cores this process may use: its affinity, and the container's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read(root / "sys/fs/cgroup/cpu.max").split()
    if len(quota) != 2:
        base = root / "sys/fs/cgroup/cpu"
        quota = [_read(base / "cpu.cfs_quota_us"), _read(base / "cpu.cfs_period_us")]
    if all(part.isdigit() for part in quota) and int(quota[1]) > 0:
        return max(1, min(allowed, round(int(quota[0]) / int(quota[1]))))
    return allowed


def _meminfo(root: Path, key: str) -> int:
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return 0


def memory_limit(root: Path = ROOT) -> int | None:
    """The container's limit (cgroup version 2 or 1), or None."""
    group = root / "sys/fs/cgroup"
    for file in (group / "memory.max", group / "memory/memory.limit_in_bytes"):
        text = _read(file)
        # Version 1 says "no limit" with a number near 2^63.
        if text.isdigit() and int(text) < 1 << 60:
            return int(text)
    return None


def memory_total(root: Path = ROOT) -> int:
    """Memory this process may ever have: the machine's, or its container's."""
    total = _meminfo(root, "MemTotal")
    if not total and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = memory_limit(root)
    return total if limit is None or not total else min(total, limit)


def memory_available(root: Path = ROOT) -> int:
    """Memory that can be taken now without swapping, within the container's limit."""
    free = _meminfo(root, "MemAvailable") or memory_total(root)
    limit = memory_limit(root)
    if limit is None:
        return free
    group = root / "sys/fs/cgroup"
    used = _read(group / "memory.current") or _read(group / "memory/memory.usage_in_bytes")
    return min(free, limit - int(used)) if used.isdigit() else min(free, limit)


def compiler() -> str | None:
    """The C++ compiler found, or None."""
    return next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def torch_facts() -> tuple[str | None, tuple[str, ...]]:
    """torch's version, and the GPUs that it sees."""
    try:
        import torch
    except ImportError:
        return None, ()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.cuda.get_device_properties(number) for number in range(count)]
    return torch.__version__, tuple(f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB" for gpu in gpus)
