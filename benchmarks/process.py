"""What every benchmark needs: the bases, fresh processes, and their peak memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ROWS = ROOT / "src" / "lorimer" / "recipes" / "home" / "train.jsonl"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorimer-benchmarks"
PULL = "from lorimer.bases.store import resolve_base; print(resolve_base('smollm2-135m'))"
KERNELS = "from lorimer.kernels.native.library import status; print(status())"
VERSION = "import sys, importlib.metadata as m; print(*[m.version(n) for n in sys.argv[1:]])"
# What keeps torch and its matrix libraries to one instruction set, as on a machine that has no better.
TORCH_LIMITS = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
}


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_gguf(given: Path | None) -> Path:
    """The GGUF file given, or the pulled one."""
    if given:
        return given.resolve()
    found = subprocess.run([sys.executable, "-c", PULL], capture_output=True, text=True)
    if found.returncode:
        raise SystemExit("the base is not here: run `lorimer pull smollm2-135m`, or give --gguf FILE")
    return Path(found.stdout.strip().splitlines()[-1])


def find_folder(gguf: Path, cache: Path) -> Path:
    """The peers' base, made from the GGUF file the first time (half a minute)."""
    folder = cache / f"{gguf.stem}-{gguf.stat().st_size}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        print(f"making the peers' base in {folder}", flush=True)
        make_base(str(gguf), str(folder), cache=cache)
    return folder


def make_base(*arguments: str, cache: Path) -> None:
    subprocess.run(
        module_command(sys.executable, "base", *arguments),
        check=True,
        env=environment(1, cache),
        stderr=subprocess.DEVNULL,
    )


def module_command(python: str, module: str, *arguments: str) -> list[str]:
    """Run a module of peers/. Neither this folder nor the current one is on its path: a file here may
    have the name of a package that a peer looks for (`kernels` is one)."""
    return [python, "-P", "-m", f"benchmarks.peers.{module}", *arguments]


def environment(
    threads: int, scratch: Path, *, isa: str | None = None, lorimer: bool = False
) -> dict[str, str]:
    """A contestant's environment. `isa` limits torch, and with `lorimer` lorimer's kernels too."""
    given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    paths = [str(ROOT), *map(os.path.abspath, given)]
    limits = dict(TORCH_LIMITS.get(isa or "", {}))
    if isa and lorimer:
        limits["LORIMER_ISA"] = isa
    return (
        os.environ
        | {
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(scratch / "hf"),
        }
        | limits
    )


def run_process(
    command: Sequence[str], env: Mapping[str, str], log: Path, timeout: int
) -> tuple[int, int, str]:
    """Exit code, peak resident memory in bytes as the kernel counted it, and what went to stdout.

    It runs in the log's folder, because some peers put the current one on their path. The peak is that
    of the whole process from its start, the same number as VmHWM at its end.
    """
    with log.with_suffix(".out").open("w+b") as out, log.open("wb") as err:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=err, cwd=log.parent)
        timer = threading.Timer(timeout, process.kill)
        timer.start()
        _, status, usage = os.wait4(process.pid, 0)
        timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        unit = 1 if sys.platform == "darwin" else 1024
        return process.returncode, usage.ru_maxrss * unit, out.read().decode("utf-8", "replace")


def reason(code: int, log: Path) -> str:
    """Why a process ended with this code, from the last line of what it wrote."""
    error = _last_line(log) or _last_line(log.with_suffix(".out")) or "no message"
    return f"stopped by signal {-code}: {error}" if code < 0 else f"exit {code}: {error}"


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")


def versions(python: str, packages: Sequence[str]) -> dict[str, str]:
    """The versions of packages in another environment; nothing where one is missing."""
    done = subprocess.run([python, "-c", VERSION, *packages], capture_output=True, text=True)
    return dict(zip(packages, done.stdout.split(), strict=True)) if done.returncode == 0 else {}


def kernels(env: Mapping[str, str]) -> str:
    """Which of lorimer's kernels run in a process with this environment."""
    done = subprocess.run([sys.executable, "-c", KERNELS], capture_output=True, text=True, env=dict(env))
    return done.stdout.strip() or (done.stderr.strip().splitlines() or ["unknown"])[-1]


def peak(threads: int) -> dict[str, float]:
    """What this machine can do at most, measured now; see peak.py."""
    command = [sys.executable, str(HERE / "peak.py"), "--threads", str(threads), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(threads, CACHE))
    if done.returncode:
        print(f"the peak could not be measured: {done.stderr.strip().splitlines()[-1:]}")
        return {}
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def write_json(path: Path | None, value: object) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
