"""Every bad input of this collection through the command line, and what it says.

python tests/bad/run.py                   all of them, as a person reads them
python tests/bad/run.py rows gguf         some surfaces
python tests/bad/run.py --json            one object a line, for test_bad.py
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "crash")]

import inputs  # noqa: E402

from bad.case import Case  # noqa: E402
from bad.surfaces import SURFACES  # noqa: E402


def outcome_of(sound: Path, case: Case, baseline: int) -> tuple[inputs.Outcome, list[str]]:
    with inputs.copy_of(sound) as folder:
        case.make(folder)
        largest = max(path.lstat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
        outcome = inputs.run(folder, case.command)
    return outcome, inputs.faults(outcome, case.command, baseline + inputs.MEMORY + 2 * largest)


def as_json(sound: Path, surface: str, case: Case, baseline: int) -> str:
    outcome, found = outcome_of(sound, case, baseline)
    value = asdict(outcome) | {"changed": sorted(outcome.changed), "faults": found}
    return json.dumps({"surface": surface, "what": case.what} | value)


def show(sound: Path, surface: str, case: Case, baseline: int) -> None:
    outcome, found = outcome_of(sound, case, baseline)
    found += [f"it does not say: {words}" for words in case.says if words not in outcome.said]
    if outcome.code != case.code:
        found.append(f"exit code {outcome.code}, wanted {case.code}")
    said = outcome.said.rstrip() if outcome.code or not case.code else "nothing: it is taken"
    print(f"--- {surface}: {case.what}\n{said}")
    for fault in found:
        print(f"!!! {fault}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Every bad input, and what is said about it.")
    parser.add_argument("surfaces", nargs="*")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    chosen = args.surfaces or list(SURFACES)
    cases = [(surface, case) for surface in chosen for case in SURFACES[surface]]
    with inputs.sound_inputs() as (sound, baseline):
        if args.json:
            for line in inputs.shared(lambda n: as_json(sound, *cases[n], baseline), len(cases)):
                print(line)
        else:
            for surface, case in cases:
                show(sound, surface, case, baseline)
    return 0


if __name__ == "__main__":
    sys.exit(main())
