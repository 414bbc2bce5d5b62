"""Rows of any known format -> one kind of conversation.

    format      keys of a row                          becomes
    messages    messages, optional system, tools       its messages: role, content
    sharegpt    conversations, optional system, tools  its messages: from, value
    alpaca      instruction, output, optional          history, then the instruction, a blank line and
                input, system, history                 the input as one user message, then the output
    completion  prompt, completion                     a user and an assistant message; lists of
                                                       messages are taken as they are
    text        text                                   plain text, no chat template

Texts are taken as they are written. A key with the value null counts as absent, as Parquet fills
missing keys with it. Other keys of a row are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorimer.data.json_text import kind_of, one_value
from lorimer.data.rows import Row
from lorimer.errors import DataError

# What a role may be called -> its name in chat templates. OpenAI's names, then those of ShareGPT.
ROLES = {
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
# Formats by the keys that tell them.
FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
# Keys often met that need another name, and which.
RENAMES = {
    ("prompt", "response"): "rename `response` to `completion`",
    ("question", "answer"): "rename them to `prompt` and `completion`",
    ("input", "output"): "rename `input` to `instruction`",
    ("instruction", "response"): "rename `response` to `output`",
    ("conversation",): "rename `conversation` to `conversations`",
    ("prompt", "chosen", "rejected"): "these are preference pairs: write `chosen` as `completion`",
}
EXTRAS = ("name", "tool_call_id", "reasoning_content")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is system, user, assistant or tool; `extra` holds what templates may also use:
    name, tool_call_id, reasoning_content."""

    role: str
    content: str
    tool_calls: tuple[Mapping[str, Any], ...] | None = None
    extra: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row: messages with the tools they may call, or, for plain text, `text` and no messages."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] | None
    text: str | None
    place: str

    @property
    def asked(self) -> str:
        """Everything before the last answer, as one text; of plain text the text."""
        if self.text is not None:
            return self.text
        last = max((i for i, turn in enumerate(self.messages) if turn.role == "assistant"), default=None)
        return "\n".join(turn.content for turn in self.messages[:last])


def to_conversation(row: Row, format: str = "auto", system: str | None = None) -> Conversation:
    """Read a row in the named format; `auto` looks at its keys. Raises DataError with path and line.

    `system` is put before chats that have no system message of their own. A chat without any
    assistant message is an error: nothing in it could be trained or scored.
    """
    try:
        return _read(row, detect_format(row) if format == "auto" else format, system)
    except DataError as error:
        raise DataError(error.problem, fix=error.fix, path=row.path, line=row.line) from None


def detect_format(row: Row) -> str:
    """The one format whose keys the row has. Raises DataError that lists the keys found and wanted."""
    keys = _keys(row)
    found = [name for name, wanted in FORMATS.items() if keys.issuperset(wanted)]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(f"{name} ({_listed(FORMATS[name])})" for name in found)
        raise DataError(
            f"the row could be read in {len(found)} ways: {names}",
            fix=f"Set `data.format` to one of {', '.join(found)}.",
            path=row.path,
            line=row.line,
        )
    hint = next((f"{how}; or " for wanted, how in RENAMES.items() if keys.issuperset(wanted)), "")
    accepted = "; ".join(f"{_listed(wanted)} ({name})" for name, wanted in FORMATS.items())
    raise DataError(
        f"no format has the keys {_listed(sorted(keys))}" if keys else "the row has no keys",
        fix=_sentence(f"{hint}give rows with {accepted}. `data.format` names one."),
        path=row.path,
        line=row.line,
    )


def to_messages(prompt: str | Sequence[Mapping[str, Any] | Message]) -> tuple[Message, ...]:
    """What a model is asked: a text is one user message, a list is read as `messages` are."""
    if isinstance(prompt, str):
        return (Message("user", prompt),)
    if not prompt:
        raise DataError("the prompt has no messages", fix="Give at least one.")
    return tuple(
        turn if isinstance(turn, Message) else _numbered(number, turn)
        for number, turn in enumerate(prompt, 1)
    )


def _read(row: Row, format: str, system: str | None) -> Conversation:
    if format not in FORMATS:
        known = ", ".join(("auto", *FORMATS))
        raise DataError(f"there is no format `{format}`", fix=f"Set `data.format` to one of {known}.")
    missing = [key for key in FORMATS[format] if key not in _keys(row)]
    if missing:
        raise DataError(
            f"{format} rows have {_listed(FORMATS[format])}; {_listed(missing)} is missing or null here, "
            f"the keys are {_listed(sorted(_keys(row))) or 'none'}",
            fix="Mend the row, or set `data.format`; `auto` looks at the keys of each row.",
        )
    value = {key: item for key, item in row.value.items() if item is not None}
    if format == "text":
        return Conversation((), None, _filled_text(value["text"], "text"), row.place)
    messages = READERS[format](value)
    if not messages:
        raise DataError("the chat has no messages", fix="Delete the row.")
    if not any(message.role == "assistant" for message in messages):
        census = ", ".join(sorted({message.role for message in messages}))
        raise DataError(
            f"the chat has no assistant message (only {census}): nothing in it can be trained",
            fix="Add the answer, or delete the row.",
        )
    if system is not None and all(message.role != "system" for message in messages):
        messages = [Message("system", system), *messages]
    return Conversation(tuple(messages), _tools(value.get("tools")), None, row.place)


HISTORY = "Write each earlier turn as [question, answer]."
CALL = 'Write {"function": {"name": ..., "arguments": {...}}}.'


def _messages_row(value: Mapping[str, Any]) -> list[Message]:
    return [*_system(value), *_turns(value["messages"], "messages")]


def _sharegpt_row(value: Mapping[str, Any]) -> list[Message]:
    return [*_system(value), *_turns(value["conversations"], "conversations")]


def _alpaca_row(value: Mapping[str, Any]) -> list[Message]:
    messages = _system(value)
    history = value.get("history", [])
    if not isinstance(history, list):
        raise DataError(f"`history` is {kind_of(history)}, wanted a list", fix=HISTORY)
    for pair in history:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(f"`history` holds {kind_of(pair)}, wanted a pair", fix=HISTORY)
        messages.append(Message("user", _text(pair[0], "history")))
        messages.append(Message("assistant", _text(pair[1], "history")))
    asked = [_text(value.get(key, ""), key) for key in ("instruction", "input")]
    question = "\n\n".join(part for part in asked if part.strip())
    if not question:
        raise DataError("`instruction` and `input` are empty", fix="Delete the row.")
    return [*messages, Message("user", question), Message("assistant", _text(value["output"], "output"))]


def _completion_row(value: Mapping[str, Any]) -> list[Message]:
    asked = _side(value["prompt"], "prompt", "user")
    if any(message.role == "assistant" for message in asked):
        # Only the completion is meant to be trained, and a conversation does not keep that border.
        raise DataError(
            "`prompt` holds an assistant message",
            fix="Write the whole chat as `messages`; with `data.train_on: last_assistant` only the "
            "last answer is trained.",
        )
    return [*asked, *_side(value["completion"], "completion", "assistant")]


READERS: dict[str, Callable[[Mapping[str, Any]], list[Message]]] = {
    "messages": _messages_row,
    "sharegpt": _sharegpt_row,
    "alpaca": _alpaca_row,
    "completion": _completion_row,
}


def _side(value: Any, key: str, role: str) -> list[Message]:
    if isinstance(value, list | tuple):
        return _turns(value, key)
    return [Message(role, _text(value, key))]


def _system(value: Mapping[str, Any]) -> list[Message]:
    """A row's own `system` text; an empty one counts as absent."""
    text = _text(value.get("system", ""), "system")
    return [Message("system", text)] if text else []


def _turns(value: Any, key: str) -> list[Message]:
    if not isinstance(value, list | tuple):
        fix = 'Write it as [{"role": "user", "content": "..."}, ...]; CSV cells cannot hold chats.'
        raise DataError(f"`{key}` is {kind_of(value)}, wanted a list of messages", fix=fix)
    return [_numbered(number, turn) for number, turn in enumerate(value, start=1)]


def _numbered(number: int, turn: Any) -> Message:
    try:
        return _message(turn)
    except DataError as error:
        raise DataError(f"message {number}: {error.problem}", fix=error.fix) from None


def _message(turn: Any) -> Message:
    """One message, in OpenAI's words (role, content) or ShareGPT's (from, value)."""
    if not isinstance(turn, Mapping):
        fix = 'Write it as {"role": "user", "content": "..."}.'
        raise DataError(f"it is {kind_of(turn)}, wanted an object with `role` and `content`", fix=fix)
    given = {key: item for key, item in turn.items() if item is not None}
    named = "role" if "role" in given else "from"
    if named not in given:
        fix = "Write `role` and `content`, or `from` and `value`."
        raise DataError(f"it has no `role`; its keys are {_listed(given) or 'none'}", fix=fix)
    role = ROLES.get(given[named]) if isinstance(given[named], str) else None
    if role is None:
        known = "system, developer, user, assistant, tool (or human, gpt, observation)"
        raise DataError(f"the role `{given[named]}` is not known", fix=f"Wanted: {known}.")
    _refuse_untrained_mark(given)
    body = "content" if named == "role" else "value"
    if given[named] == "function_call":
        return Message(role, "", _called(given.get(body)))
    calls = _tool_calls(given)
    if calls and role != "assistant":
        raise DataError(f"`tool_calls` on a {role} message", fix="Only the assistant calls tools.")
    if body not in given and not calls:
        what = "null" if body in turn else f"missing; its keys are {_listed(given)}"
        raise DataError(f"`{body}` is {what}", fix="Write the text, or delete the row.")
    extra = {key: _text(given[key], key) for key in EXTRAS if key in given}
    return Message(role, _content(given.get(body, ""), body), calls, extra)


def _refuse_untrained_mark(given: Mapping[str, Any]) -> None:
    """Marks of other tools that say "do not train this turn" must not pass unread."""
    for key in ("weight", "train", "training"):
        if key in given and given[key] in (0, False):
            raise DataError(
                f"`{key}: {json.dumps(given[key])}` asks not to train this message, which is not done here",
                fix="End the chat before it, or set `data.train_on: last_assistant`.",
            )


def _content(value: Any, key: str) -> str:
    """A text, or OpenAI's list of text parts, joined by line ends as servers join them."""
    if not isinstance(value, list | tuple):
        return _text(value, key)
    parts = []
    for part in value:
        if not isinstance(part, Mapping):
            fix = 'Write it as {"type": "text", "text": "..."}.'
            raise DataError(
                f"`{key}` holds {kind_of(part)} as a part, wanted an object with `type`", fix=fix
            )
        if part.get("type") != "text":
            fix = "Text is all that is trained: take the part out, or delete the row."
            raise DataError(f"`{key}` holds a part of type `{part.get('type')}`, wanted text", fix=fix)
        parts.append(_text(part.get("text"), "text"))
    return "\n".join(parts)


def _text(value: Any, key: str) -> str:
    if isinstance(value, str):
        return value
    shown = json.dumps(value, ensure_ascii=False, default=str)[:40]
    fix = (
        f"Write it as text: {json.dumps(shown, ensure_ascii=False)}."
        if value is not None
        else "Write the text."
    )
    raise DataError(f"`{key}` is {kind_of(value)}, wanted text", fix=fix)


def _filled_text(value: Any, key: str) -> str:
    if not _text(value, key):
        raise DataError(f"`{key}` is empty: nothing in it can be trained", fix="Delete the row.")
    return str(value)


def _tool_calls(given: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...] | None:
    """`tool_calls`, or the one call of OpenAI's older `function_call`."""
    if "function_call" in given:
        return _called(given["function_call"])
    calls = given.get("tool_calls")
    if not calls:
        return None
    if not isinstance(calls, list | tuple):
        raise DataError(f"`tool_calls` is {kind_of(calls)}, wanted a list", fix=CALL)
    return tuple(_tool_call(call) for call in calls)


def _called(value: Any) -> tuple[Mapping[str, Any], ...]:
    """Calls written as a value: an object or a list of them, or JSON text of either."""
    value = _from_json(value, "function_call")
    return tuple(_tool_call(call) for call in (value if isinstance(value, list) else [value]))


def _tool_call(call: Any) -> Mapping[str, Any]:
    """One call in OpenAI's form. Arguments given as JSON text become an object, as servers pass them
    to templates; keys that Parquet filled with null are left out."""
    if not isinstance(call, Mapping):
        raise DataError(f"a tool call is {kind_of(call)}, wanted an object", fix=CALL)
    given = {key: item for key, item in call.items() if item is not None}
    function = given.get("function", given)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError("a tool call has no `function.name`", fix=CALL)
    arguments = function.get("arguments")
    arguments = {} if arguments in (None, "") else _from_json(arguments, "arguments")
    if not isinstance(arguments, Mapping):
        problem = f"`arguments` of `{function['name']}` is {kind_of(arguments)}, wanted an object"
        raise DataError(problem, fix=CALL)
    named = {"name": function["name"], "arguments": arguments}
    return {**({"id": given["id"]} if "id" in given else {}), "type": "function", "function": named}


def _tools(value: Any) -> tuple[Mapping[str, Any], ...] | None:
    """The tools of a row; an empty list or text counts as none."""
    value = _from_json(value or None, "tools")
    if value is not None and (
        not isinstance(value, list | tuple) or not all(isinstance(tool, Mapping) for tool in value)
    ):
        fix = 'Write each as {"type": "function", "function": {"name": ..., "parameters": ...}}.'
        raise DataError(f"`tools` is {kind_of(value)}, wanted a list of objects", fix=fix)
    return tuple(value) if value else None


def _from_json(value: Any, key: str) -> Any:
    """A value that may be written as JSON text, as flat tables do."""
    if not isinstance(value, str):
        return value
    try:
        return one_value(value)
    except DataError as error:
        problem = f"`{key}` is text that cannot be read as JSON: {error.problem}"
        raise DataError(problem, fix="Write it as JSON.") from None


def _keys(row: Row) -> set[str]:
    return {key for key, value in row.value.items() if value is not None}


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(f"`{key}`" for key in keys)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
