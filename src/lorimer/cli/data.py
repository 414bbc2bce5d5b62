"""lorimer data: what is wrong with a data set, and which of its tokens are trained."""

from __future__ import annotations

import json as json_text
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lorimer.bases.open import BaseFiles
    from lorimer.config import DataConfig
    from lorimer.data.checks import Finding
    from lorimer.data.doctor import Report, Totals
    from lorimer.data.rows import Row
    from lorimer.data.show import Stretch
    from lorimer.data.template import ChatTemplate

app = typer.Typer(no_args_is_help=True, help="Look at training data: `check` it, `show` rows, `split` it.")

DEFAULT_BASE = "smollm2-135m"
WIDTH = 60
PLACES = 3  # shown of each finding; --json has all

Base = Annotated[
    str | None,
    typer.Option(
        help=f"Whose tokenizer and chat template: a name, folder or .gguf. (default: {DEFAULT_BASE})"
    ),
]
Format = Annotated[
    str | None, typer.Option(help="auto, messages, sharegpt, alpaca, completion or text. (default: auto)")
]
TrainOn = Annotated[str | None, typer.Option(help="assistant, last_assistant or all. (default: assistant)")]
System = Annotated[str | None, typer.Option(help="System prompt for chats that have none.")]
Template = Annotated[str | None, typer.Option(help="A Jinja file in place of the base's chat template.")]
Tokens = Annotated[
    list[str] | None,
    typer.Option(
        "--add-token", help="A token that the base does not have. Repeat it for more.", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def check(
    files: Annotated[list[str], typer.Argument(help="Training rows: files or hub ids.")],
    base: Base = None,
    valid: Annotated[str | None, typer.Option(help="Validation rows.")] = None,
    test: Annotated[str | None, typer.Option(help="Held-out rows.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest row in tokens. (default: 1024)")] = None,
    too_long: Annotated[str | None, typer.Option(help="error, drop or truncate. (default: drop)")] = None,
    train_on: TrainOn = None,
    format: Format = None,
    system: System = None,
    chat_template: Template = None,
    add_token: Tokens = None,
    fix: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write repaired copies there.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """What is wrong with the rows, by file and line, and how many tokens they come to.

    Example: lorimer data check train.jsonl --test test.jsonl --fix clean

    A repaired copy lacks the rows that are broken, doubled or also held out, and what cannot be seen.

    Ends with 2 if there is an error, else with 0. Without --base, and with no base kept here, tokens
    are not counted.
    """
    from lorimer.data import doctor
    from lorimer.data.show import visible
    from lorimer.errors import BaseError

    config = _config(
        train=files,
        valid=valid,
        test=test,
        max_tokens=max_tokens,
        too_long=too_long,
        train_on=train_on,
        format=format,
        system=system,
        chat_template=chat_template,
        add_tokens=add_token,
    )
    try:
        opened, template = _template(base, config)
        report = doctor.check(config, template, eos_ids=opened.eos_token_ids())
    except BaseError:
        if base is not None:
            raise
        report = doctor.check(config, None)
    mended = _mend(config, report, fix) if fix is not None else {}
    if json:
        value = report.to_dict() | ({"mended": mended} if mended else {})
        typer.echo(json_text.dumps(value, indent=2, ensure_ascii=False))
    else:
        typer.echo(visible("\n".join(report_lines(report, base or DEFAULT_BASE))))
        for name, facts in mended.items():
            why = ", ".join(
                f"{count} {code}" for code, count in (facts["left_out"] | facts["changed"]).items()
            )
            typer.echo(f"{name}: {facts['before']:,} rows, {facts['after']:,} in {facts['path']}")
            if why:
                typer.echo("\n".join(_wrapped(why, "  ")))
    raise typer.Exit(0 if report.ok else 2)


def _mend(config: DataConfig, report: Report, out: Path) -> dict[str, dict[str, Any]]:
    from dataclasses import asdict

    from lorimer.data.mend import mend

    return {name: asdict(one) | {"path": str(one.path)} for name, one in mend(config, report, out).items()}


@app.command()
def split(
    file: Annotated[str, typer.Argument(help="Rows: a file or a hub id.")],
    out: Annotated[Path, typer.Option(help="The folder to write train, valid and test into.")],
    valid: Annotated[float, typer.Option(help="Share of the rows for validation.")] = 0.05,
    test: Annotated[float, typer.Option(help="Share of the rows to hold out.")] = 0.1,
    group: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Rows of one value stay together.", show_default=False),
    ] = None,
    near: Annotated[bool, typer.Option(help="Rows that ask nearly the same stay together.")] = True,
    seed: Annotated[int, typer.Option(help="Another seed splits otherwise.")] = 0,
    format: Format = None,
) -> None:
    """Rows into train, valid and test, so that none is answered by another.

    Example: lorimer data split all.jsonl --out parts --test 0.1 --group user

    Rows that ask the same always stay together.
    """
    from lorimer.data.rows import read_rows
    from lorimer.data.split import split as split_into
    from lorimer.errors import UserError
    from lorimer.storage import make_folder, write_file

    if valid < 0 or test < 0 or valid + test >= 1:
        raise UserError(
            f"--valid {valid:g} and --test {test:g} leave nothing to train on", fix="Give shares below 1."
        )
    names = [name for name, share in (("train", 1.0), ("valid", valid), ("test", test)) if share]
    for name in names:
        if (out / f"{name}.jsonl").exists():
            raise UserError(
                "there is something there already", fix="Choose a new folder.", path=out / f"{name}.jsonl"
            )
    rows = read_rows(file)
    parts = dict(
        zip(
            ("train", "valid", "test"),
            split_into(rows, valid, test, group=group, near=near, seed=seed, format=format or "auto"),
            strict=True,
        )
    )
    make_folder(out)
    for name in names:
        lines = [json_text.dumps(row.value, ensure_ascii=False, default=str) for row in parts[name]]
        write_file(out / f"{name}.jsonl", "".join(line + "\n" for line in lines))
        typer.echo(f"{name:<6}{len(lines):>9,} rows  {out / f'{name}.jsonl'}")


@app.command()
def show(
    file: Annotated[str, typer.Argument(help="Rows: a file or a hub id.")],
    base: Base = None,
    n: Annotated[int, typer.Option("-n", min=1, help="How many rows.")] = 3,
    row: Annotated[int | None, typer.Option(min=1, help="Only the row at this line.")] = None,
    train_on: TrainOn = None,
    format: Format = None,
    system: System = None,
    chat_template: Template = None,
    add_token: Tokens = None,
    ids: Annotated[bool, typer.Option("--ids", help="Print token ids, too.")] = False,
    json: Json = False,
) -> None:
    """Rows as the model sees them, with what is trained marked.

    Example: lorimer data show train.jsonl -n 1

    In a terminal trained text is green; in a pipe, or with NO_COLOR set, it is between ⟦ and ⟧.
    """
    from lorimer.data.conversation import to_conversation
    from lorimer.data.show import stretches

    config = _config(
        train=file,
        train_on=train_on,
        format=format,
        system=system,
        chat_template=chat_template,
        add_tokens=add_token,
    )
    _, template = _template(base, config)
    shown = []
    for one in _chosen(file, n, row):
        conversation = to_conversation(one, config.format, config.system)
        examples = template.examples(conversation, config.train_on)
        for number, example in enumerate(examples, 1):
            part = f" ({number} of {len(examples)})" if len(examples) > 1 else ""
            shown.append((one.place + part, stretches(example, template.tokenizer)))
    if json:
        typer.echo(json_text.dumps([_as_dict(*pair) for pair in shown], indent=2, ensure_ascii=False))
        return
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    typer.echo(_legend(colour))
    for place, parts in shown:
        typer.echo()
        typer.echo(_heading(place, parts))
        typer.echo(_ids(parts, colour) if ids else _text(parts, colour))


def _config(**given: Any) -> DataConfig:
    """DataConfig from the options that were given; the rest keep their defaults."""
    from pydantic import ValidationError

    from lorimer.config import DataConfig
    from lorimer.errors import ConfigError

    try:
        return DataConfig(**{key: value for key, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = "--" + "-".join(str(part) for part in first["loc"]).replace("_", "-")
        raise ConfigError(f"{name}: {first['msg']}, found {first['input']!r}") from None


def _template(base: str | None, config: DataConfig) -> tuple[BaseFiles, ChatTemplate]:
    from lorimer.bases.open import open_base
    from lorimer.bases.store import resolve_base
    from lorimer.data.added import AddedTokens
    from lorimer.data.template import ChatTemplate
    from lorimer.data.tokenizer import Tokenizer
    from lorimer.errors import TemplateError

    added = AddedTokens.of_config(config)
    opened = open_base(resolve_base(base or DEFAULT_BASE))
    if added:  # rows of new tokens need torch, whose import takes longer than most checks
        from lorimer.model.grow import with_tokens

        opened = with_tokens(opened, added)
    source = opened.chat_template
    if config.chat_template is not None:
        try:
            source = Path(config.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            fix = "Save it as UTF-8, or give another --chat-template."
            raise TemplateError(f"it cannot be read: {error}", fix=fix, path=config.chat_template) from None
    return opened, ChatTemplate(source, Tokenizer.from_base(opened))


def _chosen(file: str, n: int, line: int | None) -> list[Row]:
    from lorimer.data.rows import read_rows
    from lorimer.errors import DataError

    rows = read_rows(file)
    if line is None:
        return rows[:n]
    found = [one for one in rows if one.line == line]
    if not found:
        fix = f"The rows are at lines {rows[0].line} to {rows[-1].line}."
        raise DataError(f"there is no row at line {line}", fix=fix, path=file)
    return found


def report_lines(report: Report, base: str) -> list[str]:
    """The report as lines of at most 60 columns, but for long paths; the verdict last."""
    lines = []
    for name, totals in report.totals.items():
        lines += [*_totals(name, totals, report), ""]
    for finding in report.findings:
        lines += [*_finding(finding), ""]
    counts = dict.fromkeys(("error", "warning", "note"), 0)
    for finding in report.findings:
        counts[finding.severity] += 1
    verdict = ", ".join(f"{count} {word}{'' if count == 1 else 's'}" for word, count in counts.items())
    lines.append(verdict if any(counts.values()) else "nothing found that is wrong")
    if report.counted:
        lines.append(f"tokens counted with {base}")
    else:
        lines += _wrapped(f"tokens not counted: give --base, or run `lorimer pull {base}`", "")
    return lines


def _totals(name: str, totals: Totals, report: Report) -> Iterator[str]:
    left_out = totals.rows - totals.used
    yield f"{name:<6} {totals.rows:,} row{'' if totals.rows == 1 else 's'}" + (
        f", {left_out:,} left out" if left_out else ""
    )
    formats = ", ".join(f"{kind} {count:,}" for kind, count in totals.formats.items())
    roles = ", ".join(f"{role} {count:,}" for role, count in totals.roles.items())
    facts = [f"formats: {formats}", f"messages: {roles}" if roles else ""]
    if totals.deciles:
        share = f"{totals.trained_share:.0%}"
        facts.insert(0, f"{totals.tokens:,} tokens, {totals.trained_tokens:,} trained ({share})")
        facts += [
            f"lengths by tenths: {' '.join(map(str, totals.deciles))} (limit {report.max_tokens})",
            f"longest: {totals.longest}",
        ]
    for fact in facts:
        yield from _wrapped(fact, " " * 7)


def _finding(finding: Finding) -> Iterator[str]:
    rest = " " * 8
    yield from _wrapped(finding.message, rest, first=f"{finding.severity:<8}")
    places = finding.places[:PLACES]
    for place in places:
        yield rest + place
    if finding.count > len(places):
        yield f"{rest}and {finding.count - len(places):,} more (--json lists all)"
    yield from _wrapped(finding.fix, rest + "   ", first=rest + "-> ")


def _wrapped(text: str, indent: str, first: str | None = None) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent if first is None else first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _as_dict(place: str, parts: Sequence[Stretch]) -> dict[str, Any]:
    return {
        "place": place,
        "tokens": sum(len(part.ids) for part in parts),
        "trained_tokens": sum(len(part.ids) for part in parts if part.trained),
        "stretches": [
            {"text": part.text, "ids": list(part.ids), "trained": part.trained, "control": part.control}
            for part in parts
        ],
    }


def _legend(colour: bool) -> str:
    if not colour:
        return "⟦trained⟧ not trained"
    return f"{_styled('trained', True, False)}  not trained  {_styled('<control token>', False, True)}"


def _heading(place: str, parts: Sequence[Stretch]) -> str:
    facts = _as_dict(place, parts)
    return f"{place}\n{facts['tokens']:,} tokens, {facts['trained_tokens']:,} trained"


def _text(parts: Sequence[Stretch], colour: bool) -> str:
    from lorimer.data.show import visible

    return _marked([(visible(part.text), part) for part in parts], colour, "")


def _ids(parts: Sequence[Stretch], colour: bool) -> str:
    """Text first, then the ids with the same marks."""
    numbers = [(" ".join(map(str, part.ids)), part) for part in parts]
    return f"{_text(parts, colour)}\n{_marked(numbers, colour, ' ')}"


def _marked(texts: Sequence[tuple[str, Stretch]], colour: bool, between: str) -> str:
    if colour:
        return between.join(_styled(text, part.trained, part.control) for text, part in texts)
    pieces: list[str] = []
    inside = False
    for text, part in texts:
        if inside and not part.trained:
            pieces.append("⟧")
        pieces.append(between if pieces else "")
        if part.trained and not inside:
            pieces.append("⟦")
        pieces.append(text)
        inside = part.trained
    return "".join(pieces) + ("⟧" if inside else "")


def _styled(text: str, trained: bool, control: bool) -> str:
    colour = typer.colors.GREEN if trained else None
    return typer.style(text, fg=colour, bold=trained or None, dim=(control and not trained) or None)
