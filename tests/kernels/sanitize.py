"""The kernel tests with the kernels compiled for the address and undefined-behaviour sanitizers.

    python tests/kernels/sanitize.py [what pytest takes]

The library is built in a scratch folder; the exit code is not zero on any finding.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from lorimer.kernels.native.build import CannotBuild, build, find_compiler

HERE = Path(__file__).resolve().parent


def runtime(name: str) -> str:
    """Where the compiler keeps this library."""
    command = [find_compiler(), f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        raise CannotBuild(f"the compiler has no {name}")
    return path


def environment(library: Path) -> dict[str, str]:
    # The C++ runtime too: the sanitizer looks for what throws exceptions before Python has loaded it.
    preload = [runtime("libasan.so"), runtime("libstdc++.so")]
    return os.environ | {
        "LD_PRELOAD": " ".join(preload),
        "LORIMER_KERNELS": str(library),
        # Python and PyTorch keep memory to the end on purpose.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:exitcode=99",
        # Each object from malloc, so that writing past its end is seen.
        "PYTHONMALLOC": "malloc",
    }


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        try:
            library = build(Path(scratch), sanitize=True)
            env = environment(library)
        except CannotBuild as error:
            print(f"the sanitizers cannot run: {error}", file=sys.stderr)
            return 1
        wanted = sys.argv[1:] or [str(HERE)]
        # -s: pytest would swallow what the sanitizers say when they end the process.
        command = [sys.executable, "-m", "pytest", "-x", "-s", "-p", "no:cacheprovider", *wanted]
        return subprocess.run(command, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
