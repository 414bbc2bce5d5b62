"""main(): one command found, run, and its errors turned into a message and an exit code.

The table of commands is written here so that `lorimer --help` imports nothing heavy: a command's
file is imported when that command runs. A test holds the table against the commands' own help.
"""

from __future__ import annotations

import difflib
import gc
import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorimer.errors import Interrupted, LorimerError, Terminated, UserError


@dataclass(frozen=True, slots=True)
class Command:
    """A command: where it is written, and what the list says about it."""

    name: str
    where: str  # module:function, or module:app for a command with commands of its own
    summary: str


SECTIONS: dict[str, tuple[Command, ...]] = {
    "Begin": (
        Command("quickstart", "quickstart:quickstart", "train a real model here, prove it, use it"),
        Command("doctor", "doctor:doctor", "this machine, and what to fix"),
    ),
    "Train": (
        Command("data", "data:app", "check training data, see what is trained"),
        Command("config", "config:app", "explain the settings of a run"),
        Command("plan", "plan:plan", "memory, time and disk of a run, before it begins"),
        Command("train", "train:train", "train an adapter from a config file"),
        Command("verify", "verify:verify", "check a run's files, and do its last steps again"),
    ),
    "Prove and use": (
        Command("eval", "eval:evaluate", "scores on held-out rows, against the base"),
        Command("generate", "generate:generate", "answer a prompt, or a file of prompts"),
        Command("chat", "chat:chat", "talk with a base or an adapter"),
        Command("merge", "merge:merge", "write base and adapter as one model"),
        Command("export", "export:export", "write a run for llama.cpp, Ollama or PEFT"),
    ),
    "Bases": (
        Command("pull", "bases:pull", "bring a base here"),
        Command("ls", "bases:ls", "the bases kept here"),
        Command("show", "bases:show", "what a base is"),
        Command("rm", "bases:rm", "delete a kept base"),
    ),
}
COMMANDS = {command.name: command for group in SECTIONS.values() for command in group}

HEAD = """\
lorimer: fine-tune a language model with LoRA, prove it, use it

  lorimer quickstart                      no account, no GPU
  lorimer train my.yaml train.epochs=3    your own rows
"""
TAIL = """\
lorimer COMMAND --help says more, with an example.
lorimer --version prints the version."""


def main() -> None:
    """The entry point of the `lorimer` script."""
    # Importing PyTorch makes half a million objects, and looking through them again and again for cycles is
    # a tenth of a short command.
    gc.set_threshold(100_000, 50, 50)
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; every message is printed here."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name out of a damaged file may hold what no terminal can print.
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _dispatch(list(arguments))
        sys.stdout.flush()
        return code
    except LorimerError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader went away, as in `lorimer ls | head -1`; the rest is not wanted. Python would
        # try to flush it once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _unexpected(error)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(overview())
        return 0
    name, *rest = arguments
    if name in ("--version", "-V"):
        from lorimer import __version__

        print(f"lorimer {__version__}")
        return 0
    if name not in COMMANDS:
        raise UserError(f"there is no command `{name}`", fix=_nearest(name))
    return _call(COMMANDS[name], rest)


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name, COMMANDS, 1)
    return f"Did you mean `lorimer {close[0]}`?" if close else "`lorimer --help` lists the commands."


def _call(command: Command, arguments: list[str]) -> int:
    try:
        code = load_command(command).main(
            arguments, prog_name=f"lorimer {command.name}", standalone_mode=False
        )
    except Exception as error:
        # What the parser refuses: its class has another home in each version of typer.
        if not hasattr(error, "format_message") or isinstance(error, LorimerError):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            return 0
        where = getattr(getattr(error, "ctx", None), "command_path", f"lorimer {command.name}")
        raise UserError(_sentence(error.format_message()), fix=f"See: {where} --help") from error
    return code if isinstance(code, int) else 0


def _sentence(text: str) -> str:
    return (text[:1].lower() + text[1:]).rstrip(".")


def load_command(command: Command, width: int | None = None) -> Any:
    """The command ready to parse arguments; `width` sets the columns of its help."""
    import typer

    file, _, attribute = command.where.partition(":")
    found = getattr(importlib.import_module(f"lorimer.cli.{file}"), attribute)
    settings: dict[str, Any] = {"help_option_names": ["--help", "-h"], "max_content_width": 80}
    if width is not None:
        settings["terminal_width"] = width
    app = found
    if not isinstance(found, typer.Typer):
        app = typer.Typer()
        app.command(command.name)(found)
    app._add_completion = False
    app.rich_markup_mode = None
    built = typer.main.get_command(app)
    built.context_settings = {**settings, **built.context_settings}
    return built


def overview() -> str:
    """The list of commands, in the order in which they are used."""
    lines = [HEAD]
    for title, commands in SECTIONS.items():
        lines.append(title)
        lines += [f"  {command.name:<12}{command.summary}" for command in commands]
        lines.append("")
    return "\n".join([*lines, TAIL])


def _unexpected(error: Exception) -> int:
    if os.environ.get("LORIMER_DEBUG") == "1":
        traceback.print_exception(error)
        return 1
    what = " ".join(str(error).split())[:300]
    name = type(error).__name__
    if isinstance(error, MemoryError) or "out of memory" in what or "can't allocate memory" in what:
        fix = "Give less at once: a lower `train.micro_batch_tokens`, or a lower `--batch-size` in eval."
        return _fail(f"there is not enough memory ({name})\n  {fix}", 1)
    return _fail(
        f"this is a bug in lorimer: {name}: {what}\n"
        "  Run it again with LORIMER_DEBUG=1 for the traceback, and report it with that.",
        1,
    )


def _fail(message: str, code: int) -> int:
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    word = "\033[1;31merror:\033[0m" if colour else "error:"
    sys.stdout.flush()
    # Ctrl-C was asked for, so it is no error.
    print(
        message if code in (Interrupted.exit_code, Terminated.exit_code) else f"{word} {message}",
        file=sys.stderr,
    )
    return code


if __name__ == "__main__":
    main()
