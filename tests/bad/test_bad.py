"""Each bad input of the collection: one message with the place and the fix, and nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bad.case import HERE, Case
from bad.surfaces import SURFACES

CASES = [(surface, case) for surface, cases in SURFACES.items() for case in cases]


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, str], dict[str, Any]]:
    """What each came to; all run in one process, which pays the imports once."""
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("run.py")), "--json"],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {(one["surface"], one["what"]): one for one in found}


@pytest.mark.parametrize(("surface", "case"), CASES, ids=[f"{s}: {c.what[:40]}" for s, c in CASES])
def test_a_bad_input_is_answered(
    outcomes: dict[tuple[str, str], dict[str, Any]], surface: str, case: Case
) -> None:
    outcome = outcomes[surface, case.what]
    assert outcome["faults"] == []
    assert outcome["code"] == case.code, outcome["said"]
    assert [words for words in case.says if words not in outcome["said"]] == [], outcome["said"]


def test_every_message_says_what_to_do(outcomes: dict[tuple[str, str], dict[str, Any]]) -> None:
    """A second line, set in, follows the first."""
    bare = [one for one in outcomes.values() if "error: " in one["said"] and "\n  " not in one["said"]]
    assert [f"{one['surface']}: {one['what']}: {one['said']}" for one in bare] == []


def test_there_are_more_than_200_and_no_two_are_one() -> None:
    attacks = [
        case for case in SURFACES["templates"] if case.says == ("the chat template", "data.chat_template")
    ]
    assert len(CASES) - len(attacks) >= 200
    assert len(attacks) >= 40
    assert all(len(cases) >= 25 for cases in SURFACES.values())
    assert len({(surface, case.what) for surface, case in CASES}) == len(CASES)
    for folder in ("rows", "configs", "templates"):
        texts = [file.read_bytes() for file in sorted((HERE / folder).iterdir())]
        assert len(set(texts)) == len(texts)


def test_every_file_of_the_collection_is_used() -> None:
    sources = "".join(file.read_text(encoding="utf-8") for file in HERE.glob("*.py"))
    for folder in ("rows", "configs", "templates"):
        for file in (HERE / folder).iterdir():
            assert f'"{file.name}"' in sources or f'/{file.name}"' in sources, file


@pytest.mark.parametrize("name", ["canary"])
def test_nothing_of_the_collection_runs_code(
    outcomes: dict[tuple[str, str], dict[str, Any]], name: str
) -> None:
    """Pickles, YAML tags and auto_map of the collection would leave a file of this name."""
    assert [one["what"] for one in outcomes.values() if any(name in path for path in one["changed"])] == []
