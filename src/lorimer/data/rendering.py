"""A chat on its way through a template: each of its texts made once, and what a refusal asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from lorimer.data.sandbox import CompiledTemplate
from lorimer.errors import TemplateError

OTHER = "\uf8fe"  # what no answer begins with


class Chat:
    """A conversation on its way through a template: markers hidden once, each text made once.

    messages   as the template sees them: their markers hidden
    refusals   prompts that the template refuses, by the number of messages in them
    marks      what `{% generation %}` marks in the text of the messages before this number
    """

    def __init__(
        self,
        compiled: CompiledTemplate,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        place: str = "",
    ) -> None:
        self.messages, self.place = list(messages), place
        self.refusals: dict[int, TemplateError] = {}
        self.marks: dict[int, list[tuple[int, int]]] = {}
        self._compiled, self._variables = compiled, dict(variables)
        self._texts: dict[tuple[int, bool], str] = {}

    def text(self, upto: int, *, generation: bool = False) -> str:
        """The first messages as the template writes them, with the generation prompt if wanted."""
        if (upto, generation) not in self._texts:
            text, marks = self._render(self.messages[:upto], generation)
            self._texts[upto, generation] = text
            self.marks |= {} if generation else {upto: marks}
        return self._texts[upto, generation]

    def prompt(self, upto: int) -> str | None:
        """The text that inference feeds before an answer; None if the template refuses to."""
        if upto in self.refusals:
            return None
        try:
            return self.text(upto, generation=True)
        except TemplateError as error:
            self.refusals[upto] = error
            return None

    def before_answer(self, number: int) -> str | None:
        """What stands before an answer where it is shown: what another answer shares with it."""
        other = {"role": "assistant", "content": OTHER}
        try:
            shown, _ = self._render([*self.messages[:number], other], generation=False)
            text = self.text(number + 1)
        except TemplateError:
            return None
        return text[: shared(text, shown)]

    def first_text(self, upto: int, *, generation: bool = False) -> str:
        """As `text`; a refusal says what about the messages is refused, and what to do."""
        try:
            return self.text(upto, generation=generation)
        except TemplateError as error:
            fix = self._remedy(upto, generation)
            raise error if fix is None else TemplateError(error.problem, fix=fix) from None

    def _render(
        self, messages: Sequence[Mapping[str, Any]], generation: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        given = {"messages": list(messages), "add_generation_prompt": generation}
        return self._compiled.render_marked(self._variables | given, place=self.place)

    def _remedy(self, upto: int, generation: bool) -> str | None:
        """What to do about messages that are refused: the smallest change after which they are not."""
        messages = self.messages[:upto]
        if not any(message["role"] == "user" for message in messages):
            return "The chat has no user message: add the question."
        if messages[0]["role"] == "assistant":
            return "The chat begins with an answer: begin it with a user message."
        twice = [i for i, (a, b) in enumerate(pairwise(messages), 2) if a["role"] == b["role"] != "tool"]
        without = [message for message in messages if message["role"] != "system"]
        if len(without) < len(messages) and self._takes(without, generation):
            return (
                "The template takes no system message, or only as the first: put its text at the "
                "beginning of the first question, or give another `data.chat_template`."
            )
        if twice:
            role = messages[twice[0] - 1]["role"]
            return (
                f"Messages {twice[0] - 1} and {twice[0]} are both of the {role}: make them one, or give "
                "another `data.chat_template`."
            )
        plain = [
            {key: item for key, item in message.items() if key != "tool_calls"}
            for message in messages
            if message["role"] != "tool" and not message.get("tool_calls")
        ]
        if len(plain) < len(messages):
            return (
                "The template may take no tool calls or answers of tools, or not in this order: look at "
                "them, or give another `data.chat_template`."
            )
        return None

    def _takes(self, messages: Sequence[Mapping[str, Any]], generation: bool) -> bool:
        try:
            self._render(messages, generation)
        except TemplateError:
            return False
        return True


def shared(one: str, other: str) -> int:
    """How many first characters two texts share."""
    if other.startswith(one):
        return len(one)
    low, high = 0, min(len(one), len(other))  # the first `low` are shared, the first `high + 1` are not
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low
