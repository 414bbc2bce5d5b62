"""This machine: what training has to work with, and what stands in its way.

One function for each fact, then `look` for all of them and `check` for what follows. On Linux
facts come from /proc and /sys below `root`; a container's limits (cgroup v1 and v2) count before
the hardware. torch is imported by `torch_build` and `gpus` alone.
"""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

ROOT = Path("/")
GIB = 1024**3

# Instruction sets that decide how fast training is, by their names in /proc/cpuinfo: x86, then ARM.
INSTRUCTIONS = (
    "avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16",
    "neon", "asimd", "asimddp", "sve", "sve2", "i8mm", "bf16",
)  # fmt: skip
MAC_FACTS = {"asimd": "hw.optional.AdvSIMD", "bf16": "hw.optional.arm.FEAT_BF16"}
NATIVE_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}

PYTHON_WANTED = (3, 11)
TORCH_WANTED = (2, 6)
# A 135M base in bf16 trains in about 1.5 GiB with everything loaded; 4 GiB leaves room for the rest.
MEMORY_LEAST, MEMORY_WANTED = 1 * GIB, 4 * GIB
DISK_LEAST, DISK_WANTED = GIB // 2, 5 * GIB
# Trackers and data readers keep files open; 256 is the limit on some systems.
FILES_WANTED = 1024


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of main memory. `limit` is the container's, if it has one; `total` is never above it."""

    total: int
    available: int
    limit: int | None


@dataclass(frozen=True, slots=True)
class TorchBuild:
    """The installed torch: its version and the CUDA version it was built for, if any."""

    version: str
    cuda: str | None


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as torch sees it, with its memory in bytes and whether it computes bf16 natively."""

    name: str
    memory: int
    bf16: bool


@dataclass(frozen=True, slots=True)
class Machine:
    """Every fact. `torch` is None if torch is not installed or was not asked for."""

    system: str
    cpu: str
    cores: int
    instruction_sets: tuple[str, ...]
    native_bf16: bool
    memory: Memory
    disk_path: str
    disk_free: int
    open_files: int | None
    compiler: str | None
    python: str
    torch: TorchBuild | None
    gpus: tuple[Gpu, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def look(path: Path = Path(), *, root: Path = ROOT, with_torch: bool = True) -> Machine:
    """All facts; the disk is the one that holds `path`. Without torch the call takes milliseconds."""
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        cpu=cpu_name(root),
        cores=cores(root),
        instruction_sets=instruction_sets(root),
        native_bf16=native_bf16(root),
        memory=memory(root),
        disk_path=str(path.absolute()),
        disk_free=disk_free(path),
        open_files=open_files(),
        compiler=compiler(),
        python=platform.python_version(),
        torch=torch_build() if with_torch else None,
        gpus=gpus() if with_torch else (),
    )


# --- the processor ----------------------------------------------------------------------------


def cpu_name(root: Path = ROOT) -> str:
    """The processor's name as its maker writes it, else its architecture."""
    info = _cpuinfo(root)
    for key in ("model name", "Model", "Hardware"):
        if info.get(key):
            return info[key]
    return _sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine()


def instruction_sets(root: Path = ROOT) -> tuple[str, ...]:
    """Those of INSTRUCTIONS that this processor has, in that order; empty where nothing tells."""
    info = _cpuinfo(root)
    flags = set((info.get("flags") or info.get("Features") or "").split())
    flags |= {name for name, fact in MAC_FACTS.items() if not flags and _sysctl(fact) == "1"}
    return tuple(name for name in INSTRUCTIONS if name in flags)


def native_bf16(root: Path = ROOT) -> bool:
    """Whether the CPU multiplies bf16 in hardware; elsewhere bf16 is emulated and slower than fp32."""
    return not NATIVE_BF16.isdisjoint(instruction_sets(root))


def cores(root: Path = ROOT) -> int:
    """Cores that this process may use: its affinity, and the container's share of time rounded down."""
    allowed = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    shares = [share for folder in _cgroups(root, "cpu") if (share := _cpu_share(folder)) is not None]
    return max(1, math.floor(min([allowed, *shares])))


def _cpu_share(folder: Path) -> float | None:
    """Cores' worth of time that one cgroup may use; None for no limit."""
    words = _read(folder / "cpu.max").split()
    if not words:
        words = [_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")]
    quota, period = (_number(word) for word in (*words, "", "")[:2])
    return quota / period if quota and period and quota > 0 else None


def _cpuinfo(root: Path) -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo."""
    lines = _read(root / "proc/cpuinfo").split("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _sysctl(name: str) -> str:
    """A fact of macOS; empty elsewhere."""
    if platform.system() != "Darwin":
        return ""
    try:
        command = ["sysctl", "-n", name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


# --- memory, disk, files ----------------------------------------------------------------------


def memory(root: Path = ROOT) -> Memory:
    """Main memory that this process may use. Pages of files that can be dropped count as available."""
    total, available = _system_memory(root)
    limits = []
    for folder in _cgroups(root, "memory"):
        limit = _number(_read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes"))
        if limit is None or limit >= total:  # v1 writes "no limit" as a huge number
            continue
        limits.append(limit)
        available = min(available, max(0, limit - _cgroup_used(folder)))
    return Memory(min([total, *limits]), available, min(limits, default=None))


def _system_memory(root: Path) -> tuple[int, int]:
    """Total and available bytes of the whole system."""
    kib = _table(re.findall(r"^(\w+):\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE))
    if "MemTotal" in kib:
        return kib["MemTotal"] * 1024, kib.get("MemAvailable", kib["MemTotal"]) * 1024
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total, total


def _cgroup_used(folder: Path) -> int:
    """Bytes that a cgroup holds and cannot give back by dropping file pages."""
    used = _number(_read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")) or 0
    stat = _table(re.findall(r"^(\w+) (\d+)$", _read(folder / "memory.stat"), re.MULTILINE))
    return used - stat.get("total_inactive_file", stat.get("inactive_file", 0))


def _table(pairs: list[tuple[str, str]]) -> dict[str, int]:
    return {name: int(number) for name, number in pairs}


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's cgroups for one controller, each with all those it lies in.

    A limit of any of them holds. In a container the path is often the host's and the folder is
    mounted at the top: what does not exist is left out, the top never is.
    """
    mount = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, names, path = (*line.split(":", 2), "", "")[:3]
        if names and controller not in names.split(","):
            continue
        inner = Path(path.lstrip("/"))
        tops = [mount / names, mount / controller] if names else [mount, mount / "unified"]
        for top in tops:
            folders = (top / part for part in (inner, *inner.parents))
            yield from (folder for folder in folders if ".." not in folder.parts and folder.is_dir())


def disk_free(path: Path) -> int:
    """Bytes free on the disk that holds `path`, or would hold it."""
    return shutil.disk_usage(_existing(path)).free


def writable(path: Path) -> bool:
    """Whether files can be made in the folder `path`, or it can be made. Nothing is written."""
    place = _existing(path)
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def _existing(path: Path) -> Path:
    """The path, or the nearest of the places it lies in that exists."""
    whole = path.absolute()
    return next(place for place in (whole, *whole.parents) if os.path.lexists(place))


def open_files() -> int | None:
    """How many files this process may hold open at once; None where there is no such limit."""
    try:
        import resource
    except ImportError:
        return None
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if soft == resource.RLIM_INFINITY else soft


# --- software ---------------------------------------------------------------------------------


def compiler() -> str | None:
    """The C++ compiler on the PATH, or the one that CXX names."""
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl"):
        if name and (found := shutil.which(name.split()[0])):
            return found
    return None


def torch_version() -> str | None:
    """The version of the installed torch, without importing it."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


def torch_build() -> TorchBuild | None:
    """The torch that can be imported, or None."""
    try:
        import torch
    except (ImportError, OSError):
        return None
    return TorchBuild(torch.__version__, torch.version.cuda)


def gpus() -> tuple[Gpu, ...]:
    """GPUs that torch can use."""
    try:
        import torch
    except (ImportError, OSError):
        return ()
    if not torch.cuda.is_available():
        return ()
    found = []
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        found.append(Gpu(facts.name, facts.total_memory, (facts.major, facts.minor) >= (8, 0)))
    return tuple(found)


# --- what follows -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor: `ok`, `fix` (training works, less well) or `block` (it does not)."""

    name: str
    level: Literal["ok", "fix", "block"]
    found: str
    fix: str | None = None


@dataclass(frozen=True, slots=True)
class Kernels:
    """The native kernels: those in use, or in words why the references run in their place."""

    native: bool
    found: str


def check(machine: Machine, *, home: Path, work: Path, kernels: Kernels) -> list[Check]:
    """What is fine and what to fix. `home` is where bases are kept, `work` where runs are written."""
    return [
        _check_python(machine),
        *_check_torch(machine),
        Check(
            "CPU", "ok", f"{machine.cpu} ({', '.join(machine.instruction_sets) or 'instructions unknown'})"
        ),
        _check_bf16(machine),
        _check_cores(machine),
        _check_memory(machine.memory),
        _check_disk(machine),
        _check_files(machine.open_files),
        _check_compiler(machine),
        _check_kernels(kernels),
        _check_folder("bases", home, "Set LORIMER_HOME to a folder that can be written."),
        _check_folder("runs", work, "Work in a folder that can be written, or set `output.dir`."),
    ]


def _check_python(machine: Machine) -> Check:
    if _version(machine.python) >= PYTHON_WANTED:
        return Check("Python", "ok", machine.python)
    return Check("Python", "block", machine.python, f"Install Python {_dotted(PYTHON_WANTED)} or newer.")


def _check_torch(machine: Machine) -> list[Check]:
    build = machine.torch
    if build is None:
        return [Check("torch", "block", "cannot be imported", "Install it: pip install torch")]
    if _version(build.version) < TORCH_WANTED:
        wanted = _dotted(TORCH_WANTED)
        return [Check("torch", "block", build.version, f"Update it: pip install 'torch>={wanted}'")]
    checks = [Check("torch", "ok", build.version)]
    for gpu in machine.gpus:
        bf16 = "" if gpu.bf16 else ", no bf16"
        checks.append(Check("GPU", "ok", f"{gpu.name}, {gib(gpu.memory)}{bf16}"))
    if build.cuda and not machine.gpus:
        fix = "Check the driver with nvidia-smi; without a GPU the CPU build of torch is much smaller."
        checks.append(Check("GPU", "fix", f"none, though torch is built for CUDA {build.cuda}", fix))
    elif not machine.gpus:
        checks.append(Check("GPU", "ok", "none; training runs on the CPU"))
    return checks


def _check_bf16(machine: Machine) -> Check:
    if machine.native_bf16:
        return Check("bf16", "ok", "native on the CPU")
    if any(gpu.bf16 for gpu in machine.gpus):
        return Check("bf16", "ok", "native on the GPU")
    return Check(
        "bf16", "fix", "not native; fp32 is used", "Nothing is wrong; a base needs twice the room."
    )


def _check_cores(machine: Machine) -> Check:
    if machine.cores > 1 or machine.gpus:
        return Check("cores", "ok", str(machine.cores))
    fix = "Training is slow on one core; give the container more, or widen the affinity."
    return Check("cores", "fix", str(machine.cores), fix)


def _check_memory(found: Memory) -> Check:
    text = f"{gib(found.available)} free of {gib(found.total)}"
    text += " (the container's limit)" if found.limit is not None else ""
    if found.available >= MEMORY_WANTED:
        return Check("memory", "ok", text)
    level: Literal["fix", "block"] = "block" if found.available < MEMORY_LEAST else "fix"
    where = "raise the container's limit" if found.limit is not None else "take a smaller base"
    return Check("memory", level, text, f"Close other programs or {where}.")


def _check_disk(machine: Machine) -> Check:
    text = f"{gib(machine.disk_free)} free for {machine.disk_path}"
    if machine.disk_free >= DISK_WANTED:
        return Check("disk", "ok", text)
    level: Literal["fix", "block"] = "block" if machine.disk_free < DISK_LEAST else "fix"
    return Check("disk", level, text, "Free space, or write runs to another disk with `output.dir`.")


def _check_files(limit: int | None) -> Check:
    if limit is None or limit >= FILES_WANTED:
        return Check("open files", "ok", "no limit" if limit is None else f"{limit:,}")
    return Check("open files", "fix", f"{limit:,}", f"Raise the limit: ulimit -n {FILES_WANTED}")


def _check_compiler(machine: Machine) -> Check:
    if machine.compiler:
        return Check("compiler", "ok", machine.compiler)
    return Check("compiler", "fix", "no C++ compiler", "All works without one; native kernels need it.")


def _check_kernels(kernels: Kernels) -> Check:
    if kernels.native:
        return Check("kernels", "ok", kernels.found)
    fix = "Training works on PyTorch alone, several times slower on a CPU. Install a C++ compiler, then "
    return Check("kernels", "fix", kernels.found, fix + "run `python -m lorimer.kernels.native.build`.")


def _check_folder(name: str, path: Path, fix: str) -> Check:
    if writable(path):
        return Check(name, "ok", str(path))
    return Check(name, "block", f"{path} cannot be written", fix)


def gib(size: int) -> str:
    """Bytes as GiB, with one decimal."""
    return f"{size / GIB:.1f} GiB"


def _version(text: str) -> tuple[int, ...]:
    """The first two numbers of a version: 2.13.0+cpu is (2, 13)."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _read(path: Path) -> str:
    """A small file's text without the space around it; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(text: str) -> int | None:
    """A whole number, or None for `max`, nothing and anything else."""
    try:
        return int(text)
    except ValueError:
        return None
