"""Kills and disk faults, a sample of each; `make crashes` does them all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.trap(59)
@pytest.mark.trap(60)
@pytest.mark.trap(61)
@pytest.mark.trap(63)
@pytest.mark.trap(64)
@pytest.mark.parametrize(
    "sample", [["kills.py", "--kills", "24"], ["disks.py", "--faults", "36"]], ids=["kills", "disks"]
)
def test_a_run_that_is_killed_or_fails_goes_on_to_the_same_bytes(sample: list[str]) -> None:
    program, *arguments = sample
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(program)), *arguments],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert ", 0 went wrong, " in done.stdout


def test_damaged_inputs_give_one_message_each() -> None:
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("mutate.py")), "--inputs", "180"],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
