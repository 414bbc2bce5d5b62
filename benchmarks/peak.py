"""What this machine can do at most: multiply-adds from registers, and copying.

    python benchmarks/peak.py --threads 2

A few lines of assembler, compiled here and now, keep independent sums busy in registers and touch no
memory: one loop for each kind of instruction that the CPU has. Without a compiler the best of
torch.mm over several shapes stands in.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SOURCE = r"""
#include <stdint.h>
#define TWELVE(op, reg) \
  op " %%" reg "12, %%" reg "13, %%" reg "0\n\t" op " %%" reg "12, %%" reg "13, %%" reg "1\n\t" \
  op " %%" reg "12, %%" reg "13, %%" reg "2\n\t" op " %%" reg "12, %%" reg "13, %%" reg "3\n\t" \
  op " %%" reg "12, %%" reg "13, %%" reg "4\n\t" op " %%" reg "12, %%" reg "13, %%" reg "5\n\t" \
  op " %%" reg "12, %%" reg "13, %%" reg "6\n\t" op " %%" reg "12, %%" reg "13, %%" reg "7\n\t" \
  op " %%" reg "12, %%" reg "13, %%" reg "8\n\t" op " %%" reg "12, %%" reg "13, %%" reg "9\n\t" \
  op " %%" reg "12, %%" reg "13, %%" reg "10\n\t" op " %%" reg "12, %%" reg "13, %%" reg "11\n\t"
#define CLOBBERS "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", \
  "xmm10", "xmm11", "xmm12", "xmm13", "cc"
#define LOOP(name, op, reg) void name(long n) { \
  __asm__ volatile("vzeroall\n\t" "1:\n\t" TWELVE(op, reg) "dec %0\n\t" "jnz 1b\n\t" "vzeroupper" \
                   : "+r"(n) :: CLOBBERS); }
LOOP(avx2_fp32, "vfmadd231ps", "ymm")
LOOP(avx512_fp32, "vfmadd231ps", "zmm")
LOOP(avx512_bf16, "vdpbf16ps", "zmm")
#ifdef AMX
#include <unistd.h>
#include <sys/syscall.h>
/* ARCH_REQ_XCOMP_PERM for tile data */
int amx_allowed(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
void amx_bf16(long n) {
  struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; }
    __attribute__((aligned(64))) shape = {1};
  for (int tile = 0; tile < 8; tile++) { shape.bytes[tile] = 64; shape.rows[tile] = 16; }
  __asm__ volatile("ldtilecfg %1\n\t"
    "tilezero %%tmm0\n\t tilezero %%tmm1\n\t tilezero %%tmm2\n\t tilezero %%tmm3\n\t"
    "tilezero %%tmm4\n\t tilezero %%tmm5\n\t tilezero %%tmm6\n\t tilezero %%tmm7\n\t"
    "1:\n\t"
    "tdpbf16ps %%tmm7, %%tmm6, %%tmm0\n\t tdpbf16ps %%tmm7, %%tmm6, %%tmm1\n\t"
    "tdpbf16ps %%tmm7, %%tmm6, %%tmm2\n\t tdpbf16ps %%tmm7, %%tmm6, %%tmm3\n\t"
    "tdpbf16ps %%tmm7, %%tmm6, %%tmm4\n\t tdpbf16ps %%tmm7, %%tmm6, %%tmm5\n\t"
    "dec %0\n\t jnz 1b\n\t tilerelease" : "+r"(n) : "m"(shape) : "cc", "memory");
}
#endif
"""
# Kind -> the CPU's flag for it, its type, and the floating-point operations of one turn of its loop.
LOOPS = {
    "avx2_fp32": ("fma", "fp32", 12 * 8 * 2),
    "avx512_fp32": ("avx512f", "fp32", 12 * 16 * 2),
    "avx512_bf16": ("avx512_bf16", "bf16", 12 * 32 * 2),
    "amx_bf16": ("amx_bf16", "bf16", 6 * 16 * 16 * 32 * 2),
}
SECONDS, TRIES = 0.2, 5
COPIED = 256 << 20
MM_SHAPES = [(1024, 1024, 1024), (2048, 576, 3072), (2048, 2048, 2048), (4096, 4096, 4096)]
SLOW = 2.0  # seconds of a product after which no larger one is tried: a type that is emulated


def measure(threads: int) -> dict[str, float]:
    """GFLOP/s of each kind and of the best for each type; GB/s of copying (read and written)."""
    found = _loops(threads)
    for kind, (_, dtype, _) in LOOPS.items():
        if kind in found:
            found[dtype] = max(found.get(dtype, 0.0), found[kind])
    import torch

    torch.set_num_threads(threads)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        if name not in found:
            found[name] = found[f"torch_mm_{name}"] = _best_mm(dtype)
    source = torch.ones(COPIED // 4)
    target = torch.empty_like(source)
    found["copy"] = 2 * COPIED / 1e9 / _best(lambda: target.copy_(source))
    return found


def _loops(threads: int) -> dict[str, float]:
    flags = _flags()
    with tempfile.TemporaryDirectory(prefix="lorimer-peak-") as folder:
        library = _compile(Path(folder), amx="amx_bf16" in flags)
        if library is None:
            return {}
        kinds = [kind for kind, (flag, _, _) in LOOPS.items() if flag in flags and hasattr(library, kind)]
        if "amx_bf16" in kinds and not library.amx_allowed():
            kinds.remove("amx_bf16")
        return {kind: _loop(getattr(library, kind), LOOPS[kind][2], threads) for kind in kinds}


def _flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return set()
    lines = [line for line in text.splitlines() if line.startswith("flags")]
    return set(lines[0].split()) if lines else set()


def _compile(folder: Path, *, amx: bool) -> Any:
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang"))), None)
    if compiler is None:
        return None
    source, library = folder / "peak.c", folder / "peak.so"
    source.write_text(SOURCE, encoding="utf-8")
    for options in (["-DAMX"], []) if amx else ([],):
        command = [compiler, "-O2", "-shared", "-fPIC", "-mavx2", *options, str(source), "-o", str(library)]
        if subprocess.run(command, capture_output=True).returncode == 0:
            return ctypes.CDLL(str(library))
    return None


def _loop(function: Any, flops: int, threads: int) -> float:
    function.argtypes = [ctypes.c_long]
    turns = 100_000
    while (seconds := _seconds(function, turns, threads)) < SECONDS:
        turns *= 2
    best = min([seconds, *(_seconds(function, turns, threads) for _ in range(TRIES))])
    return threads * turns * flops / best / 1e9


def _seconds(function: Any, turns: int, threads: int) -> float:
    """All threads at once; ctypes lets go of the interpreter's lock."""
    workers = [threading.Thread(target=function, args=(turns,)) for _ in range(threads)]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - began


def _best_mm(dtype: Any) -> float:
    """The most GFLOP/s of torch's products."""
    best = 0.0
    for rows, inner, columns in MM_SHAPES:
        found = _mm((rows, inner, columns), dtype)
        best = max(best, found)
        if 2 * rows * inner * columns / 1e9 / found > SLOW:
            break
    return best


def _mm(shape: tuple[int, int, int], dtype: Any) -> float:
    import torch

    rows, inner, columns = shape
    left, right = torch.ones(rows, inner, dtype=dtype), torch.ones(inner, columns, dtype=dtype)
    out = torch.empty(rows, columns, dtype=dtype)
    return 2 * rows * inner * columns / 1e9 / _best(lambda: torch.mm(left, right, out=out))


def _best(work: Callable[[], object]) -> float:
    """The least seconds of TRIES runs after a first."""
    work()
    found = []
    for _ in range(TRIES):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


def text(found: dict[str, float]) -> str:
    if not found:
        return "peak     not measured"
    kinds = ", ".join(f"{kind} {value:.0f}" for kind, value in found.items() if "_" in kind)
    return (
        f"peak     bf16 {found['bf16']:.0f} and fp32 {found['fp32']:.0f} GFLOP/s from registers ({kinds}), "
        f"copying {found['copy']:.1f} GB/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="The peak of this machine.")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    args = parser.parse_args()
    found = measure(args.threads)
    print(json.dumps(found) if args.json else text(found))


if __name__ == "__main__":
    main()
