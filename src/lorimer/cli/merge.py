"""lorimer merge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lorimer.bases.open import BaseFiles

SHORT = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}


def merge(
    adapter: Annotated[str, typer.Argument(help="An adapter folder, or a run.")],
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist yet.")],
    dtype: Annotated[
        str, typer.Option(help="auto (the base's own, bf16 for a quantised one), fp32, bf16 or fp16.")
    ] = "auto",
    base: Annotated[str | None, typer.Option(help="Another copy of the base.", show_default=False)] = None,
) -> None:
    """Write base and adapter as one model: a Hugging Face folder that any tool loads.

    Example: lorimer merge runs/home --out home-merged

    The update is added in fp32 and cast once.
    """
    from lorimer.errors import AdapterError
    from lorimer.evaluate.facts import short_path
    from lorimer.generate.model import load
    from lorimer.lora.merge import merge as write_merged

    model = load(adapter, base=base, dtype="fp32")
    if model.adapter is None:
        fix = "Give the folder of an adapter or of a run."
        raise AdapterError(
            "this is a base without an adapter: there is nothing to merge", fix=fix, path=adapter
        )
    extra = model.tokenizer.files() | {"chat_template.jinja": model.template.source.encode("utf-8")}
    chosen = dtype_of(model.base) if dtype == "auto" else dtype
    report = write_merged(model.base, model.spec, model.adapter, out, dtype=chosen, extra_files=extra)
    typer.echo(
        f"{short_path(report.path)}: {report.tensors} tensors, {report.bytes / 1e6:,.0f} MB, {report.dtype}"
    )
    typer.echo(f"{report.adapted} weights carry the update")
    if report.unchanged:
        typer.echo(
            f"{report.unchanged:.1%} of their numbers were rounded back to the base's by {report.dtype}"
        )
    typer.echo(f"next: lorimer chat {short_path(report.path)}")


def dtype_of(base: BaseFiles) -> str:
    """The type that most of the base's numbers have, bf16 if they are quantised."""
    counts: dict[str, int] = {}
    for entry in base.tensors.values():
        counts[entry.dtype] = counts.get(entry.dtype, 0) + entry.nbytes
    return SHORT.get(max(counts, key=lambda name: counts[name]), "bf16")
