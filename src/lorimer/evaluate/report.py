"""report.html: a run on one page that needs nothing but a browser.

Everything comes from the run's folder, so the page can be written again at any time. What a run
does not have (held-out rows, a validation file, an end) the page does not show; the template
escapes all text, so that rows and answers stay text.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorimer.errors import DataError
from lorimer.evaluate.chart import SMOOTHED_FROM, Line, Point, line_chart, smooth, thin
from lorimer.evaluate.facts import GIB, counted, duration, facts, next_commands, short_path
from lorimer.evaluate.run import Change, Comparison, Scores, compare_scores, read_scores
from lorimer.evaluate.show import change_text, interval_text, sentences, value_text
from lorimer.evaluate.text import METRICS
from lorimer.run import RunFolder
from lorimer.storage import is_number, write_file

if TYPE_CHECKING:
    from lorimer.evaluate.compare import Difference

TEMPLATE = "report.jinja"
# Changed answers on the page, and characters of each text.
ANSWERS, SHOWN = 3, 1500
# Lines of train.log: what the run said of its data and its course.
NOTES = 20
# No page may hold these: a browser shows nothing, or the wrong thing, for them.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

Facts = list[tuple[str, list[str]]]


@dataclass(frozen=True, slots=True)
class Proof:
    """The two evaluations of the held-out rows, compared; or why they are not."""

    after: Scores | None = None
    comparison: Comparison | None = None
    problem: str = ""


def write_report(run: RunFolder) -> Path:
    """report.html from what the run's folder holds. Raises StorageError if it cannot be written."""
    # A lone surrogate, as a row may hold one, has no UTF-8: it becomes a question mark.
    write_file(run.report, render_report(run).encode("utf-8", "replace"))
    return run.report


def render_report(run: RunFolder) -> str:
    """The page as text."""
    import jinja2

    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: CONTROL.sub("�", value) if type(value) is str else value,
    )
    return environment.get_template(TEMPLATE).render(page(run))


def page(run: RunFolder) -> dict[str, Any]:
    """What the template shows."""
    record = {key: value for key, value in run.read_record().items() if _is_sound(key, value)}
    info = record["info"] if isinstance(record.get("info"), dict) else {}
    lines = [
        line
        for line in read_lines(run.metrics)
        if all(isinstance(value, bool) or is_number(value) for value in line.values()) and "step" in line
    ]
    steps = [line for line in lines if "loss" in line]
    valid = [line for line in lines if "valid_loss" in line]
    proof = _proof(run, record, info)
    changes = read_changes(run)[:ANSWERS] if proof.comparison else []
    state, status = _status(record, info, steps)
    return {
        "name": run.path.name,
        "state": state,
        "status": status,
        "lead": _lead(record, info, steps),
        "error": record.get("error") if state in ("failed", "interrupted") else None,
        "proof": proof,
        "proof_rows": [_proof_row(item) for item in proof.comparison.differences]
        if proof.comparison
        else [],
        "sentences": sentences(proof.comparison) if proof.comparison else [],
        "loss": _loss_chart(steps, valid),
        "rate": _rate_chart(steps),
        "groups": [
            ("What was trained", _trained(info)),
            ("Tokens, time and memory", _spent(record, info, steps)),
            ("Where it comes from", _origin(record)),
        ],
        "changes": [_clipped(change) for change in changes],
        "settings": _read_text(run.config),
        "notes": _read_text(run.log).splitlines()[-NOTES:],
        "commands": _commands(run, state, changes, proved=proof.comparison is not None),
        "here": str(Path.cwd()),
    }


# --- reading ----------------------------------------------------------------------------------


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; a line that a crash cut short is left out."""
    values = []
    for line in _read_text(path).splitlines():
        try:
            values.append(json.loads(line))
        except ValueError:
            continue
    return [value for value in values if isinstance(value, dict)]


def read_changes(run: RunFolder) -> list[Change]:
    """The answers that the run kept in samples.jsonl."""
    wanted = Change.__annotations__.keys()
    return [Change(**line) for line in read_lines(run.samples) if wanted <= line.keys()]  # type: ignore[typeddict-item]


def _read_text(path: Path) -> str:
    """A file of the run, or nothing if there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _is_sound(key: str, value: object) -> bool:
    """Times and sizes of run.json are numbers."""
    return is_number(value) if key.endswith(("_seconds", "_bytes")) else True


def _proof(run: RunFolder, record: dict[str, Any], info: dict[str, Any]) -> Proof:
    """Scores count only once the run has ended: those of an earlier end are of another adapter."""
    if not info.get("test_rows"):
        return Proof(problem="This run kept no rows aside to prove itself on.")
    if record.get("status") != "finished":
        return Proof(problem="The held-out rows are answered when the run is finished.")
    try:
        before, after = (read_scores(run.eval / f"{name}.json") for name in ("before", "after"))
        return Proof(after, compare_scores(before, after))
    except DataError as error:
        return Proof(problem=f"The two evaluations cannot be compared: {error.problem}.")


# --- words ------------------------------------------------------------------------------------


def _status(record: dict[str, Any], info: dict[str, Any], steps: list[dict[str, Any]]) -> tuple[str, str]:
    """How it ended: a class for its colour, and a word."""
    state = str(record.get("status", "unknown"))
    done, total = _steps_done(steps), info.get("steps", 0)
    if state == "finished" and done < total:
        return state, f"stopped early, after step {done:,} of {total:,}"
    return state, state if state == "finished" or not total else f"{state} after step {done:,} of {total:,}"


def _steps_done(steps: list[dict[str, Any]]) -> int:
    return int(steps[-1]["step"]) if steps else 0


def _lead(record: dict[str, Any], info: dict[str, Any], steps: list[dict[str, Any]]) -> str:
    """The run in one sentence."""
    rows = f" on {counted(info['rows'], 'row')}" if "rows" in info else ""
    base = record.get("base", "a base")
    if not steps:
        return f"{base}{rows}: no step was finished."
    seconds = sum(line.get("seconds", 0.0) for line in steps)
    return f"{base} trained{rows}: {counted(_steps_done(steps), 'step')} in {duration(seconds)}."


def _trained(info: dict[str, Any]) -> Facts:
    try:
        lines = facts(info)
    except (KeyError, TypeError):  # an older run, or one that ended before it could say
        return []
    grouped: Facts = []
    for name, text in lines:
        if name:
            grouped.append((name, []))
        grouped[-1][1].append(text)
    return grouped


def _spent(record: dict[str, Any], info: dict[str, Any], steps: list[dict[str, Any]]) -> Facts:
    """Tokens, time, speed and memory, from the steps; the rest from the record if it got so far."""
    if not steps:
        return []
    sums = {name: sum(line.get(name, 0) for line in steps) for name in ("rows", "tokens", "trained_tokens")}
    seconds = sum(line.get("seconds", 0.0) for line in steps)
    peak = record.get("peak_memory_bytes") or max(line.get("memory_bytes", 0) for line in steps)
    tokens = [
        f"{sums['tokens']:,} in {counted(sums['rows'], 'row')}",
        f"{sums['trained_tokens']:,} of them trained",
    ]
    if info.get("shared_prefix"):
        tokens.append(f"{info['shared_prefix']:,} begin every row and are computed once a pack")
    times = [f"{duration(seconds)} in {counted(len(steps), 'step')}"]
    others = {"load": "to load", "eval": "to evaluate", "save": "to save checkpoints"}
    for key, words in others.items():
        if record.get(f"{key}_seconds"):
            times.append(f"{duration(record[f'{key}_seconds'])} {words}")
    speed = ["not measured"]
    if seconds > 0:
        speed = [
            f"{sums[name] / seconds:,.{digits}f} {name} a second"
            for name, digits in (("tokens", 0), ("rows", 1))
        ]
    return [
        ("tokens", tokens),
        ("time", times),
        ("speed", speed),
        ("memory", [f"{peak / GIB:.2f} GiB at most"]),
    ]


def _origin(record: dict[str, Any]) -> Facts:
    """What is needed to make the run again, as far as run.json says it."""
    machine = record.get("machine") or {}
    memory = (machine.get("memory") or {}).get("total")
    computer = [str(machine[key]) for key in ("cpu", "system") if machine.get(key)]
    computer += [f"{machine['cores']} cores"] if isinstance(machine.get("cores"), int) else []
    computer += [f"{memory / GIB:.0f} GiB of memory"] if memory else []
    versions = [f"lorimer {record['version']}"] if "version" in record else []
    versions += [f"{name} {version}" for name, version in (record.get("versions") or {}).items()]
    names = {"base": "base_fingerprint", "data": "data_hash", "template": "template_hash"}
    found: Facts = [
        ("command", [record["command"]] if "command" in record else []),
        ("machine", computer),
        ("versions", versions),
        ("hashes", [f"{name} {str(record[key])[:16]}" for name, key in names.items() if record.get(key)]),
        (
            "from, to",
            [str(record[key]).replace("T", " ") for key in ("started", "finished") if record.get(key)],
        ),
    ]
    return [(name, lines) for name, lines in found if lines]


def _proof_row(item: Difference) -> dict[str, str]:
    verdict = ("better" if item.better else "worse") if item.clear else "open"
    words = {"better": "clearly better", "worse": "clearly worse", "open": "not clear"}
    return {
        "name": item.name,
        "text": METRICS[item.name].text,
        "before": value_text(item.metric, item.before),
        "after": value_text(item.metric, item.after),
        "change": change_text(item.metric, item.difference),
        "interval": interval_text(item),
        "counts": f"{item.won} / {item.lost} / {item.tied}",
        "verdict": verdict,
        "words": words[verdict] if item.won + item.lost else "no difference",
    }


def _clipped(change: Change) -> dict[str, str]:
    """Of a prompt the end is what is answered; of an answer the beginning tells most."""
    texts = {key: str(value) for key, value in change.items()}
    for key in ("reference", "before", "after"):
        if len(texts[key]) > SHOWN:
            texts[key] = texts[key][: SHOWN - 1] + "…"
    if len(texts["prompt"]) > SHOWN:
        texts["prompt"] = "…" + texts["prompt"][1 - SHOWN :]
    return texts


def _commands(run: RunFolder, state: str, changes: Sequence[Change], *, proved: bool) -> list[str]:
    if state == "finished":
        return next_commands(run.path, changes, proved=proved)
    return [f"lorimer train --resume {shlex.quote(short_path(run.path))}"] if run.saved_steps() else []


# --- charts -----------------------------------------------------------------------------------


def _points(lines: list[dict[str, Any]], key: str) -> list[Point]:
    return [(line["step"], line[key]) for line in lines if key in line]


def _loss_chart(steps: list[dict[str, Any]], valid: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The training loss, smoothed where it is long enough, and the validation loss with its best."""
    each = _points(steps, "loss")
    if not each:
        return None
    shown = thin(each)
    per_point = math.ceil(len(each) / len(shown))
    lines, legend = [], []
    if len(shown) < SMOOTHED_FROM:
        lines.append(Line("train", shown, dots=len(shown) <= 12))
        legend.append(("train", f"training loss, {each[-1][1]:.4f} at the end"))
    else:
        reach = max(2, len(shown) // 25)
        mean = smooth(shown, reach)
        lines += [Line("each", shown), Line("train", mean)]
        legend.append(("train", f"training loss, mean of {(2 * reach + 1) * per_point} steps"))
        legend.append(("each", "each step" if per_point == 1 else f"each {per_point} steps"))
    best = None
    if valid:
        points = _points(valid, "valid_loss")
        best = min(points, key=lambda point: point[1])
        lines.append(Line("valid", thin(points), dots=len(points) <= 30))
        legend.append(("valid", f"validation loss, best {best[1]:.4f} at step {best[0]:,}"))
    drawn = line_chart(
        lines, label="Loss by step", log=True, mark=best[0] if best and len(valid) > 1 else None
    )
    return {"svg": drawn, "legend": legend}


def _rate_chart(steps: list[dict[str, Any]]) -> dict[str, Any] | None:
    points = _points(steps, "learning_rate")
    if len(points) < 2:
        return None
    return {
        "svg": line_chart([Line("rate", thin(points))], label="Learning rate by step", height=150),
        "legend": [],
    }
