"""lorimer generate."""

from __future__ import annotations

import json as json_text
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorimer.cli import answering

if TYPE_CHECKING:
    from lorimer.generate.model import Settings

Messages = list[dict[str, Any]]


def generate(
    target: Annotated[str, typer.Argument(metavar="ADAPTER|BASE", help="An adapter, a run, or a base.")],
    prompt: Annotated[
        str | None,
        typer.Argument(help="What to answer; read from a pipe if not given.", show_default=False),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="Prompts: one a line, or JSONL rows with messages or a prompt.", show_default=False
        ),
    ] = None,
    system: answering.System = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is: no chat template.")
    ] = False,
    max_tokens: answering.MaxTokens = 256,
    temperature: answering.Temperature = 0.0,
    top_p: answering.TopP = 1.0,
    top_k: answering.TopK = 0,
    min_p: answering.MinP = 0.0,
    repetition_penalty: answering.Penalty = 1.0,
    seed: answering.Seed = 0,
    stop: answering.Stop = None,
    base: answering.Base = None,
    quant: answering.Quant = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each answer.")] = False,
) -> None:
    """Answer a prompt, or each prompt of a file.

    Example: lorimer generate runs/home "turn on the kitchen lights"
    """
    from lorimer.errors import UserError
    from lorimer.generate.model import load

    if raw and (system or (file and file.suffix == ".jsonl")):
        raise UserError("--raw continues plain text: it has no system prompt and no messages")
    prompts = _prompts(prompt, file, system, raw)
    settings = answering.settings(
        max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed, stop
    )
    settings["raw"] = raw
    model = load(target, base=base, quant=quant)
    if len(prompts) == 1 and sys.stdout.isatty() and not json:
        _stream(model, prompts[0], settings)
        return
    for asked, answer in zip(prompts, model.generate(prompts, **settings), strict=True):
        typer.echo(
            json_text.dumps({"prompt": asked, "answer": answer}, ensure_ascii=False) if json else answer
        )


def _stream(model: Any, prompt: str | Messages, settings: Settings) -> None:
    from lorimer.data.show import visible

    for piece in model.stream(prompt, **settings):
        print(visible(piece), end="", flush=True)
    print()


def _prompts(prompt: str | None, file: Path | None, system: str | None, raw: bool) -> list[str | Messages]:
    """What to answer, each as text or as messages."""
    from lorimer.errors import UserError

    if prompt is not None and file is not None:
        raise UserError("a prompt and --file exclude each other: give one")
    if file is not None:
        found = _from_file(file)
    elif prompt is not None:
        found = [prompt]
    elif not sys.stdin.isatty():
        found = [sys.stdin.read().rstrip("\n")]
    else:
        raise UserError("there is no prompt", fix='For example: lorimer generate runs/home "hello"')
    if any(not item for item in found):
        raise UserError("a prompt is empty", fix="Write something to answer.")
    if system is None:
        return found
    first = {"role": "system", "content": system}
    return [[first, *([{"role": "user", "content": p}] if isinstance(p, str) else p)] for p in found]


def _from_file(file: Path) -> list[str | Messages]:
    from lorimer.errors import DataError

    if file.suffix in (".jsonl", ".ndjson"):
        return _rows(file)
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        fix = "Check the path; prompts are lines of UTF-8 text, or rows of .jsonl."
        raise DataError(f"cannot be read: {reason}", fix=fix, path=file) from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise DataError("there is no prompt in it", fix="Write one prompt a line.", path=file)
    return list(prompts)


def _rows(file: Path) -> list[str | Messages]:
    """The `prompt` of each row, or its `messages` up to the last that is not the assistant's."""
    from lorimer.data.rows import read_rows
    from lorimer.errors import DataError

    found: list[str | Messages] = []
    for row in read_rows(file):
        value = row.value.get("prompt") or row.value.get("messages")
        if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
            if value[-1].get("role") == "assistant":
                value = value[:-1]
        elif not isinstance(value, str):
            problem = f"the row has neither a prompt nor messages (found: {', '.join(row.value)})"
            fix = "Write the prompt as `prompt` or as `messages`."
            raise DataError(problem, fix=fix, path=row.path, line=row.line)
        found.append(value)
    return found
