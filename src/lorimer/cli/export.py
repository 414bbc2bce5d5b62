"""lorimer export."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lorimer.export.gguf import GgufReport
    from lorimer.export.source import Source

# What is written if `--type` is not given.
DEFAULTS = {"gguf": "f16", "gguf-lora": "f32", "merged": "auto", "bnb": "nf4"}
KNOWN = ("gguf", "gguf-lora", "merged", "bnb", "peft")


def export(
    what: Annotated[str, typer.Argument(help="A run, an adapter folder, or a base.")],
    to: Annotated[str, typer.Option(help="gguf, gguf-lora, merged, bnb or peft.")],
    out: Annotated[
        Path | None,
        typer.Option(help="What to write [default: in the run's exports folder].", show_default=False),
    ] = None,
    type: Annotated[
        str | None,
        typer.Option(
            help="gguf: f32, f16, bf16, q8_0, q6_k, q5_k_m, q5_1, q5_0, q4_k_m, q4_1 or q4_0 [f16]. "
            "gguf-lora: f32, f16 or bf16 [f32]. merged: as `lorimer merge --dtype` [auto]. bnb: nf4 or fp4 "
            "[nf4].",
            show_default=False,
        ),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Another copy of the base.", show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Also for a base it was not trained on.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write a run for other tools: llama.cpp and Ollama, or PEFT and transformers.

    Example: lorimer export runs/home --to gguf-lora

    gguf-lora is the adapter alone, beside the very GGUF file it was trained on. gguf is base and adapter
    merged into one file with tokenizer and chat template. merged is a Hugging Face folder, bnb one
    in 4 bits for bitsandbytes, peft a copy of the adapter's.
    """
    from lorimer.errors import UserError
    from lorimer.evaluate.facts import short_path
    from lorimer.export.gguf import export_gguf
    from lorimer.export.gguf_lora import export_gguf_lora
    from lorimer.export.source import open_source

    if to not in KNOWN:
        raise UserError(f"--to {to} is not known", fix=f"Known: {', '.join(KNOWN)}.")
    if to == "peft" and type is not None:
        raise UserError("--type and --to peft exclude each other", fix="An adapter is copied as it is.")
    if to == "merged":
        _merged(what, out, type, base, force=force, as_json=json_)
        return
    source = open_source(what, base=base, force=force)
    if to == "peft":
        _peft(source, what, out, as_json=json_)
        return
    if to == "bnb":
        _bnb(source, what, out, DEFAULTS[to] if type is None else type, as_json=json_)
        return
    kind = DEFAULTS[to] if type is None else type.lower()
    target = out or _default(what, source, f"{kind}.gguf" if to == "gguf" else "lora.gguf")
    report = (export_gguf if to == "gguf" else export_gguf_lora)(source, target, kind)
    commands = _commands(source, report, alone=to == "gguf")
    if json_:
        value = asdict(report) | {"path": str(report.path), "commands": commands}
        typer.echo(json.dumps(value, indent=2))
        return
    types = ", ".join(f"{count} {name}" for name, count in report.types.items())
    typer.echo(
        f"{short_path(report.path)}: {report.bytes / 1e6:,.1f} MB, {report.tensors} tensors ({types})"
    )
    if report.adapted:
        typer.echo(f"{report.adapted} weights carry the update")
    if report.note:
        typer.echo(f"note: {report.note}")
    typer.echo("next:\n  " + "\n  ".join(commands))


def _default(what: str, source: Source, ending: str) -> Path:
    """In a run's exports folder, else beside us."""
    run = Path(what)
    name = f"{source.name}-{ending}"
    return run / "exports" / name if (run / "run.json").is_file() else Path(name)


def _commands(source: Source, report: GgufReport, *, alone: bool) -> list[str]:
    """What uses the file, as commands that run as they are."""
    from lorimer.evaluate.facts import short_path

    file = shlex.quote(short_path(report.path))
    name = shlex.quote(source.name.lower())
    if alone:
        modelfile = f"printf 'FROM %s\\n' {shlex.quote(str(report.path.absolute()))}"
        commands = [f"llama-server -m {file}", f"llama-cli -m {file} -p Hello"]
    else:
        is_gguf = source.base.kind == "gguf"
        path = source.base.path if is_gguf else Path(f"{source.base.path.name}-f16.gguf")
        gguf = shlex.quote(str(path))
        modelfile = (
            f"printf 'FROM %s\\nADAPTER %s\\n' {shlex.quote(str(path.absolute()))} "
            f"{shlex.quote(str(report.path.absolute()))}"
        )
        commands = [f"llama-server -m {gguf} --lora {file}", f"llama-cli -m {gguf} --lora {file} -p Hello"]
        if not is_gguf:
            folder = shlex.quote(str(source.base.path))
            commands.insert(0, f"lorimer export {folder} --to gguf --out {gguf}  # the base, once")
    return [*commands, f"{modelfile} > Modelfile && ollama create {name} -f Modelfile"]


def _merged(
    what: str, out: Path | None, dtype: str | None, base: str | None, *, force: bool, as_json: bool
) -> None:
    from lorimer.cli.merge import merge
    from lorimer.errors import UserError

    if out is None or as_json:
        raise UserError(
            "--to merged takes --out FOLDER, and no --json", fix="It is `lorimer merge` by another name."
        )
    merge(what, out, DEFAULTS["merged"] if dtype is None else dtype, base, force=force)


def _bnb(source: Source, what: str, out: Path | None, kind: str, *, as_json: bool) -> None:
    from lorimer.cli.merge import dtype_of
    from lorimer.evaluate.facts import short_path
    from lorimer.export.bnb import export_bnb

    extra = source.tokenizer.files() | {"chat_template.jinja": source.template.source.encode("utf-8")}
    report = export_bnb(source, out or _default(what, source, kind), kind, dtype_of(source.base), extra)
    if as_json:
        typer.echo(json.dumps(asdict(report) | {"path": str(report.path)}, indent=2))
        return
    typer.echo(
        f"{short_path(report.path)}: {report.bytes / 1e6:,.1f} MB, {report.quantised} of {report.tensors} "
        f"weights in {kind}"
    )
    if report.adapted:
        typer.echo(f"{report.adapted} weights carry the update")
    typer.echo(f"next: lorimer chat {shlex.quote(short_path(report.path))} --quant keep")


def _peft(source: Source, what: str, out: Path | None, *, as_json: bool) -> None:
    """Copy the adapter's folder; it is PEFT's already."""
    import shutil

    from lorimer.errors import AdapterError, UserError
    from lorimer.evaluate.facts import short_path
    from lorimer.storage import MANIFEST, write_folder

    if source.adapter is None:
        raise AdapterError("this is a base without an adapter: there is none to export", path=what)
    folder, target = source.adapter.path, out or _default(what, source, "peft")
    if target.exists():
        raise UserError("there is something there already", fix="Choose a new folder.", path=target)

    def fill(staged: Path) -> None:
        for file in folder.iterdir():
            if file.is_file() and file.name != MANIFEST:
                shutil.copyfile(file, staged / file.name)

    write_folder(target, fill)
    if as_json:
        typer.echo(json.dumps({"path": str(target)}))
    else:
        typer.echo(f"{short_path(target)}: load it with PeftModel.from_pretrained")
