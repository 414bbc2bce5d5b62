"""A conversation -> ids, and which of them are trained.

Trained spans follow from where turns begin and end in the rendered text: never from searching
for strings, never from token ids. For each answer: it begins where the text ends that inference
would feed at this point, and ends with the template's own end-of-turn token, which is trained.
What spells a control token in a message is hidden while rendering, so a control token that is
found is the template's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lorimer.data.conversation import Conversation, Message
from lorimer.data.sandbox import CompiledTemplate
from lorimer.data.tokenizer import Piece, Tokenizer
from lorimer.errors import TemplateError

Array = np.ndarray[Any, Any]

# For a base without a template: ChatML, ended by the tokenizer's own end token where the base
# does not know ChatML's. Then the role lines are ordinary text to the model.
DEFAULT = (
    "{{ bos }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{{ end }}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Example:
    """A row ready for training.

    ids      int32 [n]
    trained  bool [n]: token i is predicted and counts in the loss; never token 0
    place    where the row came from, "file:line"
    """

    ids: Array
    trained: Array
    place: str


@dataclass(frozen=True, slots=True)
class Turn:
    """One assistant turn in a rendered text: characters first to last are trained."""

    message: int
    first: int
    last: int
    closed: bool  # whether the template's own end of turn is among them


class ChatTemplate:
    """The chat template of a base, or a default where `source` is None."""

    def __init__(self, source: str | None, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.is_default = source is None
        self.source = DEFAULT if source is None else source
        self._compiled = CompiledTemplate(self.source)

    @cached_property
    def hash(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()

    @cached_property
    def end_ids(self) -> list[int]:
        """The tokens that end an assistant turn, as the template writes them; [] if it writes none.

        Where several stand together (`<|end|>`, then an end of text after the whole chat), each is one.
        """
        probe = [Message("user", "a"), Message("assistant", "b")]
        try:
            text = self._render_hidden(probe, None, generation=False)
            turn = self._turns(probe, None, text, "")[0]
        except TemplateError:
            return []
        answer = text[turn.first : turn.last]
        found: list[int] = []
        end = len(answer)
        for first, last in reversed(self.tokenizer.control_spans(answer)):
            if answer[last:end].strip():
                break
            number = self.tokenizer.id(answer[first:last])
            found += [] if number is None else [number]
            end = first
        return found if turn.closed else []

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text as it looks, markers in messages spelled out."""
        return self.tokenizer.show(self._render_hidden(messages, tools, generation=add_generation_prompt))

    def prompt_ids(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """What inference feeds: ids up to and including the generation prompt.

        The same ids that `encode` puts before the answer that follows these messages.
        """
        text = self._render_hidden(messages, tools, generation=True)
        starts = [turn.first for turn in self._turns(messages, tools, text, "", strict=False)]
        return self.tokenizer.encode_pieces(_pieces(text, [(start, start) for start in starts]))[0]

    def encode(self, conversation: Conversation, train_on: str = "assistant") -> Example:
        """The conversation's ids, and which of them are trained.

        train_on is assistant (every answer and its end of turn), last_assistant or all. Raises
        TemplateError if the template refuses it or does not keep what comes before an answer.
        """
        if conversation.text is not None:
            return self._encode_text(conversation)
        messages, tools, place = conversation.messages, conversation.tools, conversation.place
        text = self._render_hidden(messages, tools, generation=False, place=place)
        turns = self._turns(messages, tools, text, place, train_on=train_on)
        chosen = turns if train_on == "assistant" else turns[-1:]
        spans = [(turn.first, turn.last if turn in chosen else turn.first) for turn in turns]
        ids, trained = self.tokenizer.encode_pieces(_pieces(text, spans))
        eos = self.tokenizer.eos_id
        if turns and not turns[-1].closed and turns[-1].last == len(text) and eos is not None:
            # The template leaves its last answer open: what ends it at inference is the end token.
            ids, trained = [*ids, eos], [*trained, True]
        if train_on == "all":
            trained = [True] * len(ids)
        return _example(ids, trained, place)

    def _encode_text(self, conversation: Conversation) -> Example:
        """Plain text: [bos] text eos, all of it trained."""
        tokenizer = self.tokenizer
        assert conversation.text is not None
        begin = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
        end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        ids = begin + tokenizer.encode_content(conversation.text) + end
        return _example(ids, [True] * len(ids), conversation.place)

    def _render_hidden(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        generation: bool,
        place: str = "",
    ) -> str:
        variables: dict[str, Any] = {
            "messages": [self._hidden_message(message) for message in messages],
            "tools": _hidden(list(tools), self.tokenizer.hide) if tools else None,
            "add_generation_prompt": generation,
        }
        for role in ("bos", "eos", "pad", "unk"):
            variables[f"{role}_token"] = self.tokenizer.token_text(role) or ""
        if self.is_default:
            known = self.tokenizer.id("<|im_end|>") is not None
            variables["bos"] = variables["bos_token"] if self.tokenizer.adds_bos else ""
            variables["end"] = "<|im_end|>" if known else variables["eos_token"]
        return self._compiled.render(variables, place=place)

    def _hidden_message(self, message: Message) -> dict[str, Any]:
        own = message.role == "assistant"

        def hide(text: str) -> str:
            return self.tokenizer.hide(text, own_words=own)

        value: dict[str, Any] = {"role": message.role, "content": hide(message.content)}
        if message.tool_calls:
            value["tool_calls"] = _hidden(list(message.tool_calls), hide)
        return value | {key: _hidden(item, hide) for key, item in message.extra.items()}

    def _turns(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        text: str,
        place: str,
        *,
        train_on: str = "assistant",
        strict: bool = True,
    ) -> list[Turn]:
        """Where each assistant turn lies in the rendered text. With `strict` a trained turn whose
        prompt is not what comes before it is an error; else such a turn is left out."""
        answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
        turns = []
        for number in answers:
            turn = self._turn(messages, tools, text, place, number)
            if turn is not None:
                turns.append(turn)
            elif strict and (train_on == "assistant" or number == answers[-1]) and train_on != "all":
                raise _not_kept(number, place)
        return turns

    def _turn(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        text: str,
        place: str,
        number: int,
    ) -> Turn | None:
        """One turn; None if the text before it, or the answer itself, is another in the whole chat."""
        prompt = self._prompt(messages[:number], tools, place)
        if prompt is None or not text.startswith(prompt):
            return None
        if number + 1 == len(messages):
            return self._close(number, len(prompt), len(text), text)
        upto = self._render_hidden(messages[: number + 1], tools, generation=False, place=place)
        end = max(len(prompt), _shared(upto, text))
        if end < len(upto) and not self.tokenizer.control_spans(text[len(prompt) : end]):
            return None  # they part before the answer's end: a later message changed the answer
        return self._close(number, len(prompt), end, text)

    def _prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, place: str
    ) -> str | None:
        """The text that inference feeds before an answer; None if the template refuses to."""
        try:
            return self._render_hidden(messages, tools, generation=True, place=place)
        except TemplateError:
            return None

    def _close(self, number: int, first: int, end: int, text: str) -> Turn:
        """The turn's end: after the last control token in it, else after one that follows at once
        and is an end token of the model (a template that opens each turn with it, as GLM's)."""
        inside = [stop for _, stop in self.tokenizer.control_spans(text[first:end])]
        if inside:
            return Turn(number, first, first + inside[-1], closed=True)
        for start, stop in self.tokenizer.control_spans(text[end:])[:1]:
            if start == 0 and self.tokenizer.id(text[end : end + stop]) in self.tokenizer.eos_ids:
                return Turn(number, first, end + stop, closed=True)
        return Turn(number, first, end, closed=False)


def _not_kept(number: int, place: str) -> TemplateError:
    return TemplateError(
        f"{place + ': ' if place else ''}the chat template does not keep what comes before message "
        f"{number + 1}: with the answer added, the text before it is another than inference would feed",
        fix="Set `data.train_on: last_assistant`, or give a template that keeps it with "
        "`data.chat_template`.",
    )


def _pieces(text: str, spans: Sequence[tuple[int, int]]) -> list[Piece]:
    """Cut a text before each span; a piece's first characters, up to the span's end, are trained."""
    starts = [first for first, _ in spans]
    if not starts:
        return [Piece(text, 0)]
    pieces = [Piece(text[: starts[0]], 0)]
    for (first, last), until in zip(spans, [*starts[1:], len(text)], strict=True):
        pieces.append(Piece(text[first:until], last - first))
    return pieces


def _shared(one: str, other: str) -> int:
    """How many first characters two texts share."""
    if other.startswith(one):
        return len(one)
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _hidden(value: Any, hide: Any) -> Any:
    """Markers hidden in every text of a nested value, the keys too."""
    if isinstance(value, str):
        return hide(value)
    if isinstance(value, Mapping):
        return {_hidden(key, hide): _hidden(item, hide) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_hidden(item, hide) for item in value]
    return value


def _example(ids: Sequence[int], trained: Sequence[bool], place: str) -> Example:
    flags = np.array(trained, dtype=bool)
    flags[:1] = False
    return Example(np.array(ids, dtype=np.int32), flags, place)
