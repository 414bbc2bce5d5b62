"""lorimer chat: a conversation in a terminal, or line by line through a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorimer.cli import answering

if TYPE_CHECKING:
    from lorimer.generate.model import Model, Settings

HELP = """\
/base            answer the last message again with the base alone, to compare
/adapter FOLDER  take another adapter; without a folder, none
/system TEXT     begin again with this system prompt; without a text, none
/reset           begin again
/help            this
/exit            leave; Ctrl-D does too. Ctrl-C stops an answer."""


def chat(
    target: Annotated[str, typer.Argument(metavar="ADAPTER|BASE", help="An adapter, a run, or a base.")],
    system: answering.System = None,
    max_tokens: answering.MaxTokens = 512,
    temperature: answering.Temperature = 0.0,
    top_p: answering.TopP = 1.0,
    top_k: answering.TopK = 0,
    min_p: answering.MinP = 0.0,
    repetition_penalty: answering.Penalty = 1.0,
    seed: answering.Seed = 0,
    stop: answering.Stop = None,
    base: answering.Base = None,
    quant: answering.Quant = None,
) -> None:
    """Talk with a base or an adapter.

    Example: lorimer chat runs/home

    In the chat, /help lists what else can be typed.
    """
    from lorimer.generate.model import load

    settings = answering.settings(
        max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed, stop
    )
    Chat(load(target, base=base, quant=quant), settings, system).run()


class Chat:
    """The turns so far, and what each typed line does to them."""

    def __init__(self, model: Model, settings: Settings, system: str | None) -> None:
        self.model, self.settings, self.system = model, settings, system
        self.messages: list[dict[str, Any]] = []
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": lambda text: print(HELP),
            "/reset": self.reset,
            "/system": self.set_system,
            "/base": self.compare,
            "/adapter": self.set_adapter,
        }
        self.reset("")

    def run(self) -> None:
        """Read lines until /exit or the end of the input."""
        interactive = sys.stdin.isatty()
        if interactive:
            import readline  # noqa: F401  # arrows and history in input()

            adapter = self.model.adapter_path
            print(f"{self.model.name}{f' with {adapter}' if adapter else ''}; /help lists commands")
        while True:
            try:
                line = input("> " if interactive else "").strip()
            except EOFError:
                print(end="\n" if interactive else "")
                return
            except KeyboardInterrupt:
                print()
                continue
            if line == "/exit":
                return
            if line:
                self.take(line)

    def take(self, line: str) -> None:
        """One typed line: a command or a message. A user's error is said and the chat goes on."""
        from lorimer.errors import UserError

        name, _, rest = line.partition(" ")
        try:
            if name in self.commands:
                self.commands[name](rest.strip())
            elif name.startswith("/"):
                print(f"there is no command {name}; /help lists them", file=sys.stderr)
            else:
                self.say(line)
        except UserError as error:
            print(error, file=sys.stderr)

    def say(self, text: str) -> None:
        """Answer a message; one that could not be answered is not kept."""
        self.messages.append({"role": "user", "content": text})
        try:
            answer = self.stream(self.messages)
        except BaseException:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": answer})

    def stream(self, messages: list[dict[str, Any]]) -> str:
        """Print an answer as it comes; Ctrl-C ends it where it is."""
        from lorimer.data.show import visible

        pieces: list[str] = []
        answer = self.model.stream(messages, **self.settings)
        try:
            for piece in answer:
                pieces.append(piece)
                print(visible(piece), end="", flush=True)
        except KeyboardInterrupt:
            print(" (stopped)", end="")
        finally:
            answer.close()  # type: ignore[attr-defined]
            print()
        return "".join(pieces)

    def compare(self, text: str) -> None:
        last = max((i for i, m in enumerate(self.messages) if m["role"] == "user"), default=None)
        if last is None:
            print("nothing was said yet", file=sys.stderr)
        elif self.model.adapter is None:
            print("there is no adapter: this is the base", file=sys.stderr)
        else:
            with self.model.adapter_enabled(False):
                self.stream(self.messages[: last + 1])

    def set_adapter(self, path: str) -> None:
        self.model.set_adapter(path or None)
        print(f"adapter: {self.model.adapter_path or 'none'}", file=sys.stderr)

    def set_system(self, text: str) -> None:
        self.system = text or None
        self.reset("")

    def reset(self, text: str) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
