"""metrics.jsonl and row_losses.jsonl, as a run that is resumed takes them up again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorimer.train.metrics import MetricsFile

STEP = {"step": 2, "loss": 0.5, "seconds": 1, "tokens": 9}
ROWS = {"step": 2, "rows": [4, 0], "losses": [0.5, 2]}


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        (STEP, True),
        (ROWS, True),
        ({"step": 2, "valid_loss": 0.5, "best": True}, True),
        ({"step": 2, "valid_loss": float("nan"), "best": False}, True),
        (STEP | {"step": 3}, False),
        (STEP | {"step": "2"}, False),
        (STEP | {"step": True}, False),
        ({"loss": 0.5}, False),
        (STEP | {"loss": None}, False),
        (STEP | {"loss": True}, False),
        (STEP | {"loss": []}, False),
        (STEP | {"seconds": "1"}, False),
        (STEP | {"tokens": 10**400}, False),
        (STEP | {"epoch": {}}, False),
        (ROWS | {"losses": [0.5]}, False),
        (ROWS | {"losses": 0.5}, False),
        (ROWS | {"losses": [0.5, "x"]}, False),
        (ROWS | {"rows": [4, None]}, False),
        (ROWS | {"more": []}, False),
        ({"step": 2, "rows": [4]}, False),
        ([2], False),
    ],
)
def test_lines_that_no_step_wrote_are_dropped(line: object, kept: bool, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first, last = json.dumps(STEP | {"step": 1}), json.dumps(STEP)
    path.write_text(f"{first}\n{json.dumps(line)}\n{last}\n{last[:-4]}", encoding="utf-8")
    file = MetricsFile(path, keep_until=2)
    file.write({"step": 3})
    file.close()
    middle = [json.dumps(line)] if kept else []
    assert path.read_text(encoding="utf-8").splitlines() == [first, *middle, last, '{"step": 3}']


def test_a_byte_that_is_no_ascii_drops_its_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(json.dumps(STEP).encode() + b"\n" + json.dumps(STEP | {"a\x7f": 1}).encode() + b"\n")
    path.write_bytes(path.read_bytes() + json.dumps(STEP).encode().replace(b"loss", b"l\xffss") + b"\n")
    MetricsFile(path, keep_until=2).close()
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2
