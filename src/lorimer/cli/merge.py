"""lorimer merge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lorimer.bases.open import BaseFiles
    from lorimer.config import QuantConfig
    from lorimer.data.template import Example
    from lorimer.evaluate.agreement import Agreement
    from lorimer.generate.model import Model
    from lorimer.lora.merge import MergeReport

SHORT = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
WAYS = ("dequantised", "original")
# Held-out rows that the two ways of merging are compared on.
ROWS = 64
# A merged model beyond these is not what was trained, and is refused.
MOST_KL, LEAST_SAME = 0.05, 0.95


def merge(
    adapter: Annotated[str, typer.Argument(help="An adapter folder, or a run.")],
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist yet.")],
    dtype: Annotated[
        str, typer.Option(help="auto (the base's own, bf16 for a quantised one), fp32, bf16 or fp16.")
    ] = "auto",
    base: Annotated[str | None, typer.Option(help="Another copy of the base.", show_default=False)] = None,
    into: Annotated[
        str,
        typer.Option(
            help="After training with `quant`: dequantised (the weights it was trained on), original, or "
            "auto, the nearer of both."
        ),
    ] = "auto",
    data: Annotated[
        str | None,
        typer.Option(help="Rows to compare both on [the run's held-out rows].", show_default=False),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also when the result is not what was trained.")
    ] = False,
) -> None:
    """Write base and adapter as one model: a Hugging Face folder that any tool loads.

    Example: lorimer merge runs/home --out home-merged

    The update is added in fp32 and cast once. After training on weights that were quantised as they were
    loaded there are two to add it to; both are compared with the model as it was trained.
    """
    from lorimer.errors import AdapterError, UserError
    from lorimer.generate.model import load
    from lorimer.lora.merge import check_target
    from lorimer.lora.merge import merge as write_merged
    from lorimer.lora.merge_foreign import merge_foreign
    from lorimer.model.foreign_decoder import ForeignDecoder
    from lorimer.model.load import NOT_QUANTISED

    if into not in ("auto", *WAYS):
        raise UserError(f"--into {into} is not known", fix=f"Known: auto, {', '.join(WAYS)}.")
    model = load(adapter, base=base, dtype="fp32")
    if model.adapter is None:
        fix = "Give the folder of an adapter or of a run."
        raise AdapterError(
            "this is a base without an adapter: there is nothing to merge", fix=fix, path=adapter
        )
    extra = model.tokenizer.files() | {"chat_template.jinja": model.template.source.encode("utf-8")}
    chosen = dtype_of(model.base) if dtype == "auto" else dtype
    check_target(out, chosen)
    if isinstance(model.decoder, ForeignDecoder):
        if into == "original" and model.quant.kind != "none":
            raise UserError(
                "--into original is for bases that lorimer's own decoder computes",
                fix="Leave it out: the update goes into the weights it was trained on.",
            )
        report = merge_foreign(
            *(model.base, model.decoder, model.adapter, out), dtype=chosen, extra_files=extra
        )
        _say(report)
        return
    way = "original"
    if model.quant.kind not in ("none", "keep"):
        way = _way(model, _examples(model, adapter, data), into, chosen, force)
    report = write_merged(
        *(model.base, model.spec, model.adapter, out),
        dtype=chosen,
        quant=model.quant if way == "dequantised" else NOT_QUANTISED,
        extra_files=extra,
    )
    _say(report)


def _say(report: MergeReport) -> None:
    from lorimer.evaluate.facts import short_path

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


def _examples(model: Model, target: str, data: str | None) -> list[Example]:
    """Held-out rows as the run's template puts them; none if there are none."""
    from lorimer.cli.eval import held_out, run_config
    from lorimer.errors import ConfigError

    config = run_config(Path(target), need_files=data is None)
    if data is None and not (config and (config.data.test or config.data.test_fraction)):
        return []
    train_on = config.data.train_on if config else "assistant"
    rows = held_out(config, data)[:ROWS]
    found = [example for row in rows for example in model.template.examples(row, train_on)]
    if not any(example.trained.any() for example in found):
        raise ConfigError("no row has an answer to compare", fix="Give other rows with --data.")
    return found


def _way(model: Model, examples: list[Example], into: str, dtype: str, force: bool) -> str:
    """Where the update goes, both ways compared with the model that was trained."""
    from lorimer.errors import AdapterError

    if not examples:
        typer.echo("there are no held-out rows to compare with: give some with --data")
        return "dequantised" if into == "auto" else into
    found = {way: _compare(model, way, dtype, examples) for way in WAYS}
    tokens = found["original"].tokens
    typer.echo(f"beside the model as it was trained ({model.quant.kind}), {tokens:,} held-out tokens:")
    typer.echo(f"  {'into':<12}{'KL':>12}{'same token':>14}")
    for way, facts in found.items():
        typer.echo(f"  {way:<12}{facts.kl:>12.2e}{facts.same:>13.2%}")
    way = min(found, key=lambda name: found[name].kl) if into == "auto" else into
    facts = found[way]
    if (facts.kl > MOST_KL or facts.same < LEAST_SAME) and not force:
        other = next(name for name in WAYS if name != way)
        raise AdapterError(
            f"merged into the {way} weights it is not what was trained: KL {facts.kl:.3f} nats, "
            f"{facts.same:.1%} the same (wanted: at most {MOST_KL}, at least {LEAST_SAME:.0%})",
            fix=f"Use --into {other}, or --force.",
        )
    typer.echo(f"into the {way} weights" + (", which are nearer" if into == "auto" else ""))
    return way


def _compare(model: Model, way: str, dtype: str, examples: list[Example]) -> Agreement:
    from lorimer.evaluate.agreement import agreement
    from lorimer.lora.merge import MergedBase
    from lorimer.model.load import NOT_QUANTISED, Place, load_decoder

    assert model.adapter is not None
    quant: QuantConfig = model.quant if way == "dequantised" else NOT_QUANTISED
    merged = MergedBase(model.base, model.spec, model.adapter, dtype, quant)
    place = Place(model.decoder.device, model.decoder.dtype)
    return agreement(model.decoder, load_decoder(merged, place), examples)
