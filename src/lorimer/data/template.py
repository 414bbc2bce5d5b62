"""A conversation -> ids, and which of them are trained.

Trained spans follow from where turns begin and end in the rendered text: never from searching
for strings, never from token ids. For each answer: it begins where the text ends that inference
would feed at this point, and ends with the template's own end-of-turn token, which is trained.
What spells a control token in a message is hidden while rendering, so a control token that is
found is the template's own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

import numpy as np

from lorimer.data.conversation import Conversation, Message
from lorimer.data.rendering import Chat, shared
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

# A generation prompt that ends inside a thought.
OPENED = re.compile(r"<think>\s*\Z")
LEAD = 64  # at most so many characters does a template write before an answer


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
        self.now: datetime | None = None  # what training takes for today; None: what the clock says
        self._compiled = CompiledTemplate(self.source)

    @cached_property
    def hash(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()

    @cached_property
    def end_ids(self) -> list[int]:
        """The tokens that end an assistant turn, as the template writes them; [] if it writes none.

        Where several stand together (`<|end|>`, then an end of text after the whole chat), each is one.
        """
        chat = self._chat([Message("user", "a"), Message("assistant", "b")])
        try:
            text = chat.text(2)
            turn = self._turns(chat, 2, text)[0]
        except (TemplateError, IndexError):
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
        return found

    @cached_property
    def writes_date(self) -> bool:
        """Whether a prompt says which day it is."""
        try:
            chats = [self._chat([Message("user", "a")], now=datetime(year, 1, 2)) for year in (1990, 2001)]
            return chats[0].text(1, generation=True) != chats[1].text(1, generation=True)
        except TemplateError:
            return False

    @cached_property
    def marks_otherwise(self) -> tuple[str, str] | None:
        """What `{% generation %}` marks of an answer, and what is trained of it, where they differ.

        None where they agree, and for a template that marks nothing.
        """
        chat = self._chat([Message("user", "a"), Message("assistant", "b")])
        try:
            text = chat.text(2)
            turns = self._turns(chat, 2, text)
        except TemplateError:
            return None
        marked = "".join(text[first:last] for first, last in chat.marks[2])
        trained = "".join(text[turn.first : turn.last] for turn in turns)
        return None if marked in ("", trained) else (marked, trained)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text as it looks, markers in messages spelled out."""
        chat = self._chat(messages, tools)
        return self.tokenizer.show(chat.first_text(len(messages), generation=add_generation_prompt))

    def prompt_ids(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """What inference feeds: ids up to and including the generation prompt.

        The same ids that `examples` puts before the answer that follows these messages.
        """
        chat = self._chat(messages, tools)
        text = chat.first_text(len(messages), generation=True)
        starts = [turn.first for turn in self._turns(chat, len(messages), text)]
        return self.tokenizer.encode_pieces(_pieces(text, [(start, start) for start in starts]))[0]

    def examples(self, conversation: Conversation, train_on: str = "assistant") -> list[Example]:
        """The conversation's ids, and which of them are trained, in one example or in several.

        train_on is assistant (every answer and its end of turn), last_assistant or all. One example
        holds all answers if each stands in it after exactly what inference would feed. A template that
        changes earlier turns (drops their thoughts, moves the system text to the last question) needs
        several: each is the chat up to an answer, with the answers that it keeps, so that each answer
        is trained once and after what inference feeds. Raises TemplateError if the template refuses
        the chat, or if no text that it makes keeps an answer after its prompt.
        """
        if conversation.text is not None:
            return [self._encode_text(conversation)]
        messages = conversation.messages
        chat = self._chat(messages, conversation.tools, conversation.place)
        left = [number for number, message in enumerate(messages) if message.role == "assistant"]
        if train_on == "last_assistant":
            left = left[-1:]
        chat.first_text(len(messages))
        whole, kept = self._encode_upto(chat, len(messages), left)
        if train_on == "all" or not left:
            flags = np.full(len(whole.ids), train_on == "all")
            flags[:1] = False
            return [Example(whole.ids, flags, whole.place)]
        made = [whole] if kept else []
        while left := [number for number in left if number not in kept]:
            example, kept = self._encode_upto(chat, left[-1] + 1, left)
            if left[-1] not in kept:
                raise _not_kept(chat, left[-1])
            made.append(example)
        return made[::-1]

    def _encode_upto(self, chat: Chat, upto: int, wanted: Sequence[int]) -> tuple[Example, set[int]]:
        """The chat up to a message, trained on those of the wanted answers that it keeps, and which."""
        text = chat.text(upto)
        turns = self._turns(chat, upto, text)
        kept = {turn.message for turn in turns} & set(wanted)
        if wanted and upto == wanted[-1] + 1 and wanted[-1] not in kept:
            joined = self._joined(chat, wanted[-1])
            if joined is not None:
                text, turns, kept = *joined, {wanted[-1]}
        spans = [(turn.first, turn.last if turn.message in kept else turn.first) for turn in turns]
        ids, trained = self.tokenizer.encode_pieces(_pieces(text, spans))
        eos = self.tokenizer.eos_id
        if turns and not turns[-1].closed and turns[-1].last == len(text) and eos is not None:
            # The template leaves its last answer open: what ends it at inference is the end token.
            ids, trained = [*ids, eos], [*trained, True]
        return _example(ids, trained, chat.place), kept

    def _encode_text(self, conversation: Conversation) -> Example:
        """Plain text: [bos] text eos, all of it trained."""
        tokenizer = self.tokenizer
        assert conversation.text is not None
        begin = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
        end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        ids = begin + tokenizer.encode_content(conversation.text) + end
        return _example(ids, [True] * len(ids), conversation.place)

    def _chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        place: str = "",
        now: datetime | None = None,
    ) -> Chat:
        """A chat with its markers hidden, ready to be rendered."""
        variables = self._variables(now or self.now)
        variables["tools"] = _hidden(list(tools), self.tokenizer.hide) if tools else None
        hidden = [self._hidden_message(message) for message in messages]
        return Chat(self._compiled, hidden, variables, place)

    def _variables(self, now: datetime | None) -> dict[str, Any]:
        """What a template may read besides the chat."""
        variables: dict[str, Any] = {}
        for role in ("bos", "eos", "pad", "unk"):
            variables[f"{role}_token"] = self.tokenizer.token_text(role) or ""
        if now is not None:
            variables["strftime_now"] = now.strftime
        if self.is_default:
            known = self.tokenizer.id("<|im_end|>") is not None
            variables["bos"] = variables["bos_token"] if self.tokenizer.adds_bos else ""
            variables["end"] = "<|im_end|>" if known else variables["eos_token"]
        return variables

    def _hidden_message(self, message: Message) -> dict[str, Any]:
        own = message.role == "assistant"

        def hide(text: str) -> str:
            return self.tokenizer.hide(text, own_words=own)

        value: dict[str, Any] = {"role": message.role, "content": hide(message.content)}
        if message.tool_calls:
            value["tool_calls"] = _hidden(list(message.tool_calls), hide)
        return value | {key: _hidden(item, hide) for key, item in message.extra.items()}

    def _turns(self, chat: Chat, upto: int, text: str) -> list[Turn]:
        """Where the assistant turns before message `upto` lie in a text that begins with them. A turn
        whose prompt is not what comes before it, or that reads otherwise there, is left out."""
        answers = [number for number in range(upto) if chat.messages[number]["role"] == "assistant"]
        found = (self._turn(chat, upto, text, number) for number in answers)
        return [turn for turn in found if turn is not None]

    def _turn(self, chat: Chat, upto: int, text: str, number: int) -> Turn | None:
        """One turn; None if the text before it, or the answer itself, is another in this text."""
        prompt = chat.prompt(number)
        if prompt is None or not text.startswith(prompt):
            return None
        if number + 1 == upto:
            return self._close(number, len(prompt), len(text), text)
        own = chat.text(number + 1)
        end = max(len(prompt), shared(own, text))
        if end < len(own) and not self.tokenizer.control_spans(text[len(prompt) : end]):
            return None  # they part before the answer's end: a later message changed the answer
        return self._close(number, len(prompt), end, text)

    def _joined(self, chat: Chat, number: int) -> tuple[str, list[Turn]] | None:
        """A chat up to an answer whose prompt the template does not keep: the prompt as inference feeds it,
        then the answer as the template writes it. None where it is not sure that the one follows the other.

        Some templates show a system text or tools only while the last message is a question (Mistral's).
        Others open a thought in the prompt and show none (R1's): what the model writes there is the rest
        of the thought, then the answer.
        """
        prompt, before = chat.prompt(number), chat.before_answer(number)
        if prompt is None or before is None:
            return None
        opening = OPENED.search(prompt)
        head = prompt if opening is None else prompt[: opening.start()]
        start = self._follows(head, before)
        if start is None:
            return None
        answer = chat.text(number + 1)[start:]
        if opening is not None:
            answer = _rest_of_thought(chat.messages[number], answer)
        text = prompt + answer
        turns = self._turns(chat, number, text)
        return text, [*turns, self._close(number, len(prompt), len(text), text)]

    def _follows(self, head: str, before: str) -> int | None:
        """Where in `before` an answer begins that stands after `head` at inference: after the longest end
        of `head` that is found near the end of `before` and has a control token in it."""
        cuts = range(len(before), max(0, len(before) - LEAD), -1)
        size, cut = max((shared(head[::-1], before[:cut][::-1]), cut) for cut in cuts) if cuts else (0, 0)
        return cut if size and self.tokenizer.control_spans(head[-size:]) else None

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


def _rest_of_thought(message: Mapping[str, Any], answer: str) -> str:
    """What follows an opened `<think>`: the message's thought, then its answer as the template shows it."""
    thought = str(message.get("reasoning_content", ""))
    if "</think>" in message["content"]:
        thought = thought or message["content"].partition("</think>")[0].removeprefix("<think>")
        # It may be shown, but not as the model writes it.
        answer = answer.partition("</think>")[2] if "</think>" in answer else answer
    return thought.strip("\n") + "\n</think>\n\n" + answer.lstrip("\n")


def _not_kept(chat: Chat, number: int) -> TemplateError:
    refusal = chat.refusals.get(number)
    if refusal is not None:
        return TemplateError(
            f"{refusal.problem}; that is what comes before message {number + 1}, an answer",
            fix="Begin the chat with a user message, set `data.train_on: last_assistant`, or give another "
            "`data.chat_template`.",
        )
    return TemplateError(
        f"{chat.place + ': ' if chat.place else ''}the chat template does not keep what comes before "
        f"message {number + 1}: with the answer added, the text before it is another than inference would "
        "feed",
        fix="Give a template that keeps it with `data.chat_template`, or train on `all`.",
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
