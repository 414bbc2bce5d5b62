"""SIGKILL everywhere, and resume: the same losses and the same bytes.

python tests/crash/kills.py                 every call of a save, moments spread over the run, and kills
                                            of the resumption: some 500 kills, half an hour
python tests/crash/kills.py --kills 20      as many of them, spread evenly
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import runs
from faults import Faults

Case = tuple[str, Callable[[], list[str]]]


def cases(place: runs.Place, moments: int) -> list[Case]:
    """Each a name, and what does it and returns what is wrong."""
    random.seed(0)
    found: list[Case] = []
    for variant in runs.VARIANTS:
        names = runs.calls(place, variant)
        for number, name in enumerate(names, 1):
            kill = partial(_at_call, place, variant, number)
            again = None
            if number % 5 == 0:  # and the resumption, at a call of its own
                again = partial(_resume_at_call, place, random.randint(1, len(names)))
            found.append(
                (
                    f"{variant}, call {number} of {len(names)}: {name}" + (", twice" if again else ""),
                    partial(runs.killed_and_resumed, place, variant, kill, again),
                )
            )
        began = time.perf_counter()
        runs.train(place, variant, "timed")
        seconds = time.perf_counter() - began
        for moment in range(moments):
            after = seconds * (moment + random.random()) / moments
            kill = partial(_after, place, variant, after)
            found.append(
                (f"{variant}, after {after:.2f} s", partial(runs.killed_and_resumed, place, variant, kill))
            )
    return found


def _at_call(place: runs.Place, variant: str, number: int, name: str) -> int:
    return runs.train(place, variant, name, Faults("kill", number))


def _resume_at_call(place: runs.Place, number: int, name: str) -> int:
    return runs.resume(place, name, Faults("kill", number))


def _after(place: runs.Place, variant: str, seconds: float, name: str) -> int:
    return runs.train(place, variant, name, after=seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill runs everywhere and resume them.")
    parser.add_argument("--kills", type=int, help="as many, spread evenly")
    parser.add_argument("--moments", type=int, default=60, help="kills spread over each run's time")
    args = parser.parse_args()
    began, bad = time.perf_counter(), 0
    with tempfile.TemporaryDirectory(prefix="lorimer-kills-") as scratch:
        place = runs.prepare(Path(scratch))
        found = cases(place, args.moments)
        if args.kills is not None:
            step = len(found) / args.kills
            found = [found[int(step * (number + 0.5))] for number in range(args.kills)]
        for name, case in found:
            wrong = case()
            bad += bool(wrong)
            for line in wrong:
                print(f"{name}: {line}", flush=True)
    print(f"{len(found)} kills, {bad} went wrong, {time.perf_counter() - began:.0f} s")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
