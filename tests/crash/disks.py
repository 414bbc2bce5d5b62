"""Disks that fail: each kind of error at every call of a run, and the run goes on once the disk is whole.

python tests/crash/disks.py                 every call, every kind: some 40 minutes
python tests/crash/disks.py --faults 40     as many of them, spread evenly
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import runs
from faults import ERRORS, Faults

VARIANT = "shared"


def problems(place: runs.Place, kind: str, number: int, *, stays: bool) -> list[str]:
    """Run with the fault, look at what it left and said, and resume without."""
    name = "cut"
    run = place.run(name)
    shutil.rmtree(run.path, ignore_errors=True)
    code = runs.train(place, VARIANT, name, Faults(kind, number, stays=stays))
    said = (place.folder / "out.txt").read_text(encoding="utf-8", errors="replace")
    found = runs.problems_of_rest(run)
    if code not in (0, 4):
        found.append(f"exit code {code}: {said[-400:]}")
    if "Traceback" in said or "bug in lorimer" in said:
        found.append(f"it said: {said[-400:]}")
    if code == 4 and str(place.folder) not in said:
        found.append(f"the message names no path: {said[-400:]}")
    if code == 4 and kind in ("ENOSPC", "EDQUOT") and "bytes free" not in said:
        found.append(f"the message does not say what is free: {said[-400:]}")
    if code == 0:  # what failed was no part of the run's state
        if runs.outcome(run) != runs.outcome(place.run(f"whole-{VARIANT}")):
            found.append("it said that all is well, and ended otherwise")
        return found
    if run.config.exists():
        code = runs.resume(place, name)
    else:
        shutil.rmtree(run.path, ignore_errors=True)
        code = runs.train(place, VARIANT, name)
    if code:
        return [*found, f"it did not go on: {code}"]
    if runs.outcome(run) != runs.outcome(place.run(f"whole-{VARIANT}")):
        found.append("it did not end in the same losses and bytes")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Let every call of a save fail in every way.")
    parser.add_argument("--faults", type=int, help="as many, spread evenly")
    args = parser.parse_args()
    began, bad = time.perf_counter(), 0
    with tempfile.TemporaryDirectory(prefix="lorimer-disks-") as scratch:
        place = runs.prepare(Path(scratch))
        names = runs.calls(place, VARIANT)
        cases = [
            (kind, number, stays)
            for number in range(1, len(names) + 1)
            for kind in ERRORS
            for stays in (False, kind == "ENOSPC")[: 1 + (kind == "ENOSPC")]
        ]
        if args.faults is not None:
            step = len(cases) / args.faults
            cases = [cases[int(step * (number + 0.5))] for number in range(args.faults)]
        for done, (kind, number, stays) in enumerate(cases):
            if done % 100 == 0:
                print(f"{done} of {len(cases)}", file=sys.stderr, flush=True)
            wrong = problems(place, kind, number, stays=stays)
            bad += bool(wrong)
            for line in wrong:
                print(f"{kind} at call {number}, {names[number - 1]}: {line}", flush=True)
    print(f"{len(cases)} faults, {bad} went wrong, {time.perf_counter() - began:.0f} s")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
