"""docs/mutants.md: what was measured, and why each survivor may live."""

from __future__ import annotations

import tomllib
from pathlib import Path

from made import Mutant
from scope import Module

REASONS = Path(__file__).parent / "reasons.toml"
HEAD = """\
<!-- Made by make mutants; do not edit. Reasons: tests/mutants/reasons.toml. -->

# Mutants

`make mutants` changes one place of the source at a time and runs the module's fast tests against it: a
mutant is killed if a test fails, and survives if all pass. The mutants are those of mutmut's operators, a
condition of `if` taken the other way, and a call that stands alone left out.

Left out by rule, as no behaviour hangs on it: type annotations, decorators, docstrings, asserts, the words
of messages, `encoding=` (a test of the layout holds that it is given), `indent=` of JSON, `strict=` of
`zip`. Of the changes of one string or one argument the strongest is taken. Constants of modules and fields
of classes are not changed. Of `data/conversation.py` the functions that decide which turns there are.

"""


def reasons() -> dict[tuple[str, str], str]:
    """(file, change) -> why it may survive."""
    found: dict[tuple[str, str], str] = {}
    for entry in tomllib.loads(REASONS.read_text(encoding="utf-8")).get("reason", []):
        for change in entry["mutants"]:
            found[entry["file"], change] = entry["why"]
    return found


def page(results: list[tuple[Module, list[tuple[Mutant, bool]]]], least: float) -> tuple[str, list[str]]:
    """The text, and what is wrong: a share below `least`, a survivor without reason, a reason too many."""
    why, faults, used = reasons(), [], set()
    rows = [
        "| | module | mutants | killed | survived | killed % | tests |",
        "|---|---|---|---|---|---|---|",
    ]
    lists: list[str] = []
    total = total_killed = 0
    for module, tried in results:
        if not tried:
            rows.append(f"| {module.group} | `{module.file}` | not measured | | | | |")
            faults.append(f"{module.file}: not measured")
            continue
        killed = sum(dead for _, dead in tried)
        total, total_killed = total + len(tried), total_killed + killed
        share = killed / len(tried)
        tests = ", ".join(f"`{name}`" for name in module.tests)
        rows.append(
            f"| {module.group} | `{module.file}` | {len(tried)} | {killed} | {len(tried) - killed} "
            f"| {100 * share:.1f} | {tests} |"
        )
        if share < least:
            faults.append(f"{module.file}: {100 * share:.1f} % killed, wanted {100 * least:.0f}")
        survivors: dict[str, list[str]] = {}
        for mutant, dead in tried:
            name = f"{mutant.function}: {mutant.change}"
            key = module.file, name
            used.add(key)
            if dead:
                faults += [f"{module.file}: killed, but has a reason: {name}"] if key in why else []
                continue
            if key not in why:
                faults.append(f"{module.file}: no reason: {name}")
            survivors.setdefault(why.get(key, "No reason is given."), []).append(name)
        if survivors:
            lists.append(f"\n## {module.file}\n")
        for reason, names in survivors.items():
            lists += [f"\n{reason}\n", *(f"- `` {name} ``" for name in names)]
        gone = [change for file, change in why if file == module.file and (file, change) not in used]
        faults += [f"{module.file}: a reason for a mutant that is not made: {change}" for change in gone]
    share = 100 * total_killed / total
    rows.append(f"| | all | {total} | {total_killed} | {total - total_killed} | {share:.1f} | |")
    return HEAD + "\n".join([*rows, "\n# Survivors", *lists]) + "\n", faults
