"""lorimer plan."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lorimer.train.plan import Change, Load, Plan

PARTS = {
    "program": "Python, PyTorch, rows",
    "weights": "frozen weights",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "workspace": "workspace",
}
ASIDE = {"loading": "loading", "preflight": "preflight", "evaluation": "evaluation", "merging": "merging"}
BAR = 24


def plan(
    config: Annotated[
        str | None,
        typer.Argument(help="The config file, or a folder with a config.json.", show_default=False),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="key=value: settings put over the file's.", show_default=False),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="KIND:SIZE", help="Another machine: cpu:8GB, cuda:24GB.", show_default=False),
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(help="Its speed in training, in TFLOP/s, for the time.", show_default=False),
    ] = None,
    guide: Annotated[
        bool,
        typer.Option("--guide", help="7B, 13B, 70B: full, LoRA, QLoRA, beside published figures."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What a run needs before it begins: memory by part, time, disk, and what to change if it does not fit.

    Example: lorimer plan home.yaml quant=nf4 --device cpu:8GB

    No weight is read. A model's folder or config.json alone is planned at its longest rows.
    """
    from lorimer.errors import ConfigError, UserError
    from lorimer.train.plan import alternatives

    if guide:
        _guide()
        return
    if tflops is not None and not 0 < tflops < float("inf"):
        raise UserError(f"--tflops {tflops:g} is no speed", fix="For example: --tflops 1.5")
    if config is None:
        raise ConfigError("no config file is given", fix="Give a YAML file or a folder with a config.json.")
    found, base, program = _planned(config, settings or [], device, tflops)
    others = [] if found.fits else alternatives(found, base, program)
    if json:
        changes = [{"settings": [c.text for c in chosen], "peak": peak} for chosen, peak in others]
        typer.echo(json_text.dumps(found.as_json() | {"alternatives": changes}, indent=2))
    else:
        _print(found, others)


def _planned(
    config: str, settings: list[str], device: str | None, tflops: float | None
) -> tuple[Plan, Any, int]:
    """The plan of a config file with its rows, or of a model's shape alone."""
    from lorimer.config import config_from, read_config
    from lorimer.model.load import choose_place
    from lorimer.train.plan import make_plan, resident_bytes, stated_load, target_of

    path = Path(config)
    if path.is_dir() or path.name == "config.json":
        from lorimer.bases.shape import ShapeBase

        base: Any = ShapeBase(path)
        given = [text for text in settings if not text.startswith("base=")]
        plain = config_from({"base": str(path), "data": {"train": "rows.jsonl"}}, need_files=False)
        run = _over(plain, given)
        load = stated_load(run)
    else:
        run = read_config(config, settings)
        base, load = _rows(run)
    program = resident_bytes()
    target = target_of(device, program)
    # Another machine's `auto` is not known: bf16, as on most that are planned for.
    kind = run.train.dtype if target.here or run.train.dtype != "auto" else "bf16"
    dtype = choose_place("cpu", kind).dtype
    return make_plan(run, base, load, target, program=program, dtype=dtype, tflops=tflops), base, program


def _over(config: Any, settings: list[str]) -> Any:
    """A config with key=value settings over it."""
    import tempfile

    from lorimer.config import dump_yaml, read_config

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(dump_yaml(config), encoding="utf-8")
        return read_config(path, settings, need_files=False)


def _rows(config: Any) -> tuple[Any, Load]:
    """The base's headers, and what the rows come to."""
    from lorimer.bases.open import open_base
    from lorimer.bases.store import resolve_base
    from lorimer.data.added import AddedTokens
    from lorimer.data.prepare import prepare
    from lorimer.data.template import ChatTemplate
    from lorimer.data.tokenizer import Tokenizer
    from lorimer.model.families import why_not_native
    from lorimer.model.grow import with_tokens
    from lorimer.train.plan import load_of, stream_steps

    base = with_tokens(open_base(resolve_base(config.base)), AddedTokens.of_config(config.data))
    template = ChatTemplate(base.chat_template, Tokenizer.from_base(base))
    data = prepare(config.data, template, seed=config.train.seed)
    steps = stream_steps(config, len(data.train))
    answered = min(len(data.test), config.evaluate.rows or len(data.test))
    share = not config.lora.dropout and why_not_native(base.config) is None
    return base, load_of(config, data.train, steps=steps, share=share, answered=answered)


# --- what is shown --------------------------------------------------------------------------------


def _print(plan: Plan, others: list[tuple[list[Change], int]]) -> None:
    from lorimer.evaluate.facts import duration
    from lorimer.train.memory import parameters
    from lorimer.train.plan import alternatives_text, size_text

    config, load, parts = plan.config, plan.load, plan.memory.parts()
    quant = "" if config.quant.kind == "none" else f", {config.quant.kind}"
    typer.echo(
        f"base       {config.base} ({plan.spec.family}, {parameters(plan.spec) / 1e6:,.0f} M{quant})"
    )
    there = f"{size_text(plan.target.memory)} {'available' if plan.target.here else 'stated'}"
    typer.echo(f"machine    {plan.target.device}, {there}")
    again = "nothing" if plan.shape.recompute == "none" else plan.shape.recompute
    typer.echo(f"steps      {plan.micro_batch_tokens:,} tokens at once, computed again: {again}")
    typer.echo("")
    widest = max(parts[name] for name in PARTS)
    for name, text in PARTS.items():
        bar = "#" * max(1, round(BAR * parts[name] / widest))
        typer.echo(f"  {text:<22}{size_text(parts[name]):>10}  {bar}")
    verdict = "fits" if plan.fits else "does not fit"
    typer.echo(f"  {'peak':<22}{size_text(plan.memory.peak):>10}  {verdict}")
    typer.echo("")
    beside = ", ".join(f"{text} {size_text(parts[name])}" for name, text in ASIDE.items())
    typer.echo(f"beside     {beside}")
    if load.rows:
        tokens, trained = load.tokens * load.steps, load.trained * load.steps
        typer.echo(
            f"rows       {load.rows:,} in {load.steps:,} steps: {tokens:,.0f} tokens computed, "
            f"{trained:,.0f} trained"
        )
    if plan.seconds is None:
        typer.echo("time       not known: give --tflops")
    else:
        typer.echo(f"time       about {duration(plan.seconds)} of training")
    typer.echo("disk       " + ", ".join(f"{name} {size_text(size)}" for name, size in plan.disk.items()))
    if not plan.fits:
        typer.echo("\n" + alternatives_text(others))


# --- the guides' table ----------------------------------------------------------------------------

# Layers, hidden, inner, heads, key/value heads, vocabulary of Llama 2.
SIZES = {
    "7B": (32, 4096, 11008, 32, 32, 32000),
    "13B": (40, 5120, 13824, 40, 40, 32000),
    "70B": (80, 8192, 28672, 64, 8, 32000),
}
# GB of GPU memory. QLoRA's: arXiv 2305.14314, appendix G, one row of 512 tokens (65B for 70B). LoRA's and
# the other QLoRA's: least figures of Unsloth's documentation.
PUBLISHED = {
    ("7B", "QLoRA"): "6.9 (paper), 5 (Unsloth)",
    ("13B", "QLoRA"): "11.3 (paper)",
    ("70B", "QLoRA"): "45.0 (paper, 65B), 41 (Unsloth)",
    ("7B", "LoRA"): "19 (Unsloth)",
    ("70B", "LoRA"): "164 (Unsloth)",
    ("70B", "full"): "over 780 (paper, 65B)",
}


def guide_rows() -> list[tuple[str, str, float, str]]:
    """Size, method, computed bytes and published figures: one row of 512 tokens, r 16 on all layers, the
    layers computed again; full training with 16-bit weights and gradients and AdamW in 32 bits."""
    from lorimer.config import QuantConfig
    from lorimer.model.spec import ModelSpec, RopeSpec
    from lorimer.train.memory import Shape, count, parameters

    rows = []
    for name, (layers, hidden, inner, heads, kv_heads, vocabulary) in SIZES.items():
        spec = ModelSpec(
            *("llama", vocabulary, hidden, inner, layers, heads, kv_heads, hidden // heads, 1e-5),
            rope=RopeSpec(1e4, hidden // heads),
            max_positions=4096,
            tied_head=False,
        )
        modules = [path for group in spec.groups(0) for path in group.paths]
        for method in ("full", "LoRA", "QLoRA"):
            quant = QuantConfig(kind="nf4" if method == "QLoRA" else "none")
            ranks, everywhere = dict.fromkeys(modules, 16), dict.fromkeys(modules, layers)
            shape = Shape(spec, ranks, everywhere, 2, quant, recompute="layers")
            found = count(shape, tokens=512, trained=512, program=0, file_bytes=0)
            total = found.held + found.activations + found.workspace
            if method == "full":
                total = 16 * parameters(spec) + found.activations + found.workspace
            rows.append((name, method, float(total), PUBLISHED.get((name, method), "")))
    return rows


def _guide() -> None:
    typer.echo(f"{'model':<8}{'method':<8}{'computed':>12}   published, GB")
    for name, method, total, published in guide_rows():
        typer.echo(f"{name:<8}{method:<8}{total / 1e9:>9.1f} GB   {published}")
    typer.echo(
        "\ncomputed: one row of 512 tokens, r 16 on all linear layers, layers computed again, without the\n"
        "program itself. full: weights and gradients in 16 bits, AdamW's copies in 32. Paper: QLoRA,\n"
        "arXiv 2305.14314; Unsloth: the least figures of its documentation."
    )
