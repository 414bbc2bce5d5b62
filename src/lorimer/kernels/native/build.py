"""Compile the native kernels: one shared library with every kernel for every instruction set.

    python -m lorimer.kernels.native.build [--out DIR] [--sanitize]

The package's build calls `build` when it is installed. Nothing of PyTorch is needed, and nothing is
linked but the C++ runtime. Without a compiler, or where it fails, training runs on the references.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY = "_kernels.so"

# Flags for each instruction set; a later one has what the earlier ones have.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
# The kernels for AMX on a tile unit in plain C++, for tests on processors that have none.
EMULATED_TILES = {"amx": [*FLAGS["avx512_bf16"], "-DLORIMER_TILES_EMULATED"]}
# Which of them make a difference to a kernel; the others use the one before.
VARIANTS = {
    "matmul.cpp": list(FLAGS),
    "attention.cpp": ["portable", "avx2", "avx512", "avx512_bf16"],
    "head.cpp": list(FLAGS),
    "quantised.cpp": ["portable", "avx2", "avx512"],
    "norms.cpp": ["portable", "avx2", "avx512", "avx512_bf16"],
    "quantiser.cpp": ["portable", "avx2", "avx512"],
    "elementwise.cpp": ["portable", "avx2", "avx512", "avx512_bf16"],
}
COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra"]
# GCC's own headers for AVX-512 warn about themselves.
COMMON += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
# What is one operation is said in the source.
COMMON += ["-ffp-contract=off"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1"]


class CannotBuild(Exception):
    """Why there will be no native kernels: no compiler, or what it said."""


def sources_hash() -> str:
    """A hash of every source: a library made from others is not used."""
    digest = hashlib.sha256()
    for path in sorted([*HERE.glob("*.cpp"), *HERE.glob("*.hpp"), HERE / "build.py"]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def find_compiler() -> str:
    """$CXX, else the first of c++, g++ and clang++."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        found = shutil.which(name)
        if found:
            return found
    raise CannotBuild(f"no C++ compiler was found ({wanted or 'c++, g++, clang++'})")


def build(out: Path = HERE, *, sanitize: bool = False, emulate_tiles: bool = False) -> Path:
    """Compile into `out`; returns the library's path. Raises CannotBuild, and then changes nothing.

    With `emulate_tiles` there are only the kernels for AMX, and they run without it, slowly.
    """
    if platform.system() not in ("Linux", "Darwin"):
        raise CannotBuild(f"native kernels are not built on {platform.system()}")
    compiler = find_compiler()
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    flags_of = EMULATED_TILES if emulate_tiles else FLAGS
    isas = list(flags_of) if x86 else ["portable"]
    optimise = SANITIZERS if sanitize else ["-O3"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        isas = [isa for isa in isas if _accepts(compiler, flags_of[isa], folder)]
        jobs = [("library.cpp", "", [f'-DLORIMER_SOURCES="{sources_hash()}"'])]
        for source, variants in VARIANTS.items():
            jobs += [
                (source, isa, [*flags_of[isa], f"-DLORIMER_ISA={isa}"]) for isa in variants if isa in isas
            ]

        def compile_one(job: tuple[str, str, list[str]]) -> Path:
            source, isa, flags = job
            target = folder / f"{source}-{isa}.o"
            _run([compiler, *COMMON, *optimise, *flags, "-c", str(HERE / source), "-o", str(target)])
            return target

        with ThreadPoolExecutor(max_workers=_jobs()) as pool:
            objects = list(pool.map(compile_one, jobs))
        made = folder / LIBRARY
        link = SANITIZERS if sanitize else []
        _run([compiler, "-shared", "-pthread", *link, *map(str, objects), "-o", str(made)])
        out.mkdir(parents=True, exist_ok=True)
        # Beside its place first: a process that has the old library open keeps it whole.
        staged = out / f"{LIBRARY}.{os.getpid()}"
        shutil.copyfile(made, staged)
        staged.replace(out / LIBRARY)
    return out / LIBRARY


def _jobs() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _accepts(compiler: str, flags: list[str], folder: Path) -> bool:
    """Whether the compiler knows these flags: old ones do not know the newest instructions."""
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n", encoding="utf-8")
    command = [compiler, *flags, "-c", str(probe), "-o", str(folder / "probe.o")]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise CannotBuild(
            f"{Path(command[0]).name} failed: {said[0] if said else done.returncode}\n{done.stderr}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile lorimer's native kernels.")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the library")
    parser.add_argument(
        "--sanitize", action="store_true", help="with address and undefined-behaviour checks"
    )
    args = parser.parse_args()
    try:
        print(build(args.out, sanitize=args.sanitize))
    except CannotBuild as error:
        sys.exit(f"the native kernels could not be built: {error}")


if __name__ == "__main__":
    main()
