"""Rows of every format -> the same conversation, or one message that says what is wrong."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from lorimer.data.conversation import Conversation, Message, detect_format, to_conversation, to_messages
from lorimer.data.rows import Row, read_rows, scan_rows
from lorimer.errors import DataError

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"x": 1}}}


def row(value: dict[str, Any]) -> Row:
    return Row(value, "rows.jsonl", 7)


def turns(value: dict[str, Any], format: str = "auto", system: str | None = None) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in to_conversation(row(value), format, system).messages]


# format, row, its turns
READ = {
    "messages": ("messages", {"messages": [U, A]}, "user:q assistant:a"),
    "system": (
        "messages",
        {"messages": [{"role": "system", "content": "s"}, U, A]},
        "system:s user:q assistant:a",
    ),
    "developer": (
        "messages",
        {"messages": [{"role": "developer", "content": "s"}, U, A]},
        "system:s user:q assistant:a",
    ),
    "system beside": ("messages", {"system": "s", "messages": [U, A]}, "system:s user:q assistant:a"),
    "tool": (
        "messages",
        {"messages": [U, A, {"role": "tool", "content": "t"}, A]},
        "user:q assistant:a tool:t assistant:a",
    ),
    "parts": (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]},
                A,
            ]
        },
        "user:b\nc assistant:a",
    ),
    "same role twice": ("messages", {"messages": [U, U, A, A]}, "user:q user:q assistant:a assistant:a"),
    "last turn a question": ("messages", {"messages": [U, A, U]}, "user:q assistant:a user:q"),
    "empty answer": (
        "messages",
        {"messages": [U, {"role": "assistant", "content": ""}]},
        "user:q assistant:",
    ),
    "white space stays": (
        "messages",
        {"messages": [{"role": "user", "content": " q\n"}, A]},
        "user: q\n assistant:a",
    ),
    "other keys": ("messages", {"id": 3, "messages": [U, A], "source": "x"}, "user:q assistant:a"),
    "null keys": (
        "messages",
        {"messages": [{**U, "name": None, "tool_calls": None}, A], "text": None},
        "user:q assistant:a",
    ),
    "sharegpt": (
        "sharegpt",
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a"},
            ]
        },
        "system:s user:q assistant:a",
    ),
    "sharegpt tools": (
        "sharegpt",
        {
            "system": "s",
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "a"},
            ],
        },
        "system:s user:q assistant: tool:2 assistant:a",
    ),
    "conversations in OpenAI's words": ("sharegpt", {"conversations": [U, A]}, "user:q assistant:a"),
    "alpaca": ("alpaca", {"instruction": "do", "output": "a"}, "user:do assistant:a"),
    "alpaca with input": (
        "alpaca",
        {"instruction": "do", "input": "it", "output": "a"},
        "user:do\n\nit assistant:a",
    ),
    "alpaca, empty input": (
        "alpaca",
        {"instruction": "do", "input": "", "output": "a"},
        "user:do assistant:a",
    ),
    "alpaca, blank input": (
        "alpaca",
        {"instruction": "do", "input": " \n", "output": "a"},
        "user:do assistant:a",
    ),
    "alpaca, null input": (
        "alpaca",
        {"instruction": "do", "input": None, "output": "a"},
        "user:do assistant:a",
    ),
    "alpaca, input alone": (
        "alpaca",
        {"instruction": "", "input": "it", "output": "a"},
        "user:it assistant:a",
    ),
    "alpaca, system and history": (
        "alpaca",
        {"system": "s", "history": [["q", "a"]], "instruction": "do", "output": "b"},
        "system:s user:q assistant:a user:do assistant:b",
    ),
    "alpaca, empty system": (
        "alpaca",
        {"system": "", "instruction": "do", "output": "a"},
        "user:do assistant:a",
    ),
    "completion": ("completion", {"prompt": "q", "completion": "a"}, "user:q assistant:a"),
    "completion of messages": ("completion", {"prompt": [U], "completion": [A]}, "user:q assistant:a"),
    "completion, mixed": (
        "completion",
        {"prompt": [{"role": "system", "content": "s"}, U], "completion": "a"},
        "system:s user:q assistant:a",
    ),
}


@pytest.mark.trap(29)
@pytest.mark.parametrize(("format", "value", "wanted"), READ.values(), ids=READ.keys())
def test_reads(format: str, value: dict[str, Any], wanted: str) -> None:
    assert detect_format(row(value)) == format
    assert " ".join(f"{role}:{content}" for role, content in turns(value)) == wanted
    assert turns(value, format) == turns(value)


# row, words of the message, words of the fix
REFUSED = {
    "null content": (
        {"messages": [U, {"role": "assistant", "content": None}]},
        "message 2: `content` is null",
        "text",
    ),
    "no content": (
        {"messages": [U, {"role": "assistant", "text": "a"}]},
        "message 2: `content` is missing; its keys are `role`, `text`",
        "",
    ),
    "number": (
        {"messages": [{"role": "user", "content": 5}, A]},
        "message 1: `content` is a number, wanted text",
        '"5"',
    ),
    "unknown role": (
        {"messages": [U, {"role": "narrator", "content": "x"}, A]},
        "message 2: the role `narrator` is not known",
        "developer",
    ),
    "role in capitals": (
        {"messages": [U, {"role": "Assistant", "content": "x"}]},
        "the role `Assistant` is not known",
        "",
    ),
    "role no text": ({"messages": [{"role": 1, "content": "x"}]}, "the role `1` is not known", ""),
    "no role": (
        {"messages": [{"content": "x"}]},
        "message 1: it has no `role`; its keys are `content`",
        "`from`",
    ),
    "message is text": ({"messages": ["hi"]}, "message 1: it is text, wanted an object", ""),
    "messages is text": ({"messages": "[...]"}, "`messages` is text, wanted a list", "CSV"),
    "no messages": ({"messages": []}, "the chat has no messages", "Delete"),
    "only user turns": ({"messages": [U, U]}, "no assistant message (only user)", "Add the answer"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, A]},
        "a part of type `image_url`",
        "",
    ),
    "part is text": (
        {"messages": [{"role": "user", "content": ["text"]}, A]},
        "`content` holds text as a part",
        "",
    ),
    "half a character in arguments": (
        {"messages": [U, {**A, "tool_calls": [{"name": "f", "arguments": r'{"x": "\ud83d"}'}]}]},
        r"\ud83d is half of a character",
        "",
    ),
    "text part of null": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}, A]},
        "`text` is null",
        "",
    ),
    "calls of a user": (
        {"messages": [{**U, "tool_calls": [CALL]}, A]},
        "`tool_calls` on a user message",
        "",
    ),
    "call without name": (
        {"messages": [U, {**A, "tool_calls": [{"function": {}}]}]},
        "no `function.name`",
        "",
    ),
    "arguments no object": (
        {"messages": [U, {**A, "tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
        "`arguments` of `f` is a list",
        "",
    ),
    "arguments no JSON": (
        {"messages": [U, {**A, "tool_calls": [{"name": "f", "arguments": "{x"}]}]},
        "`arguments` is text that cannot be read as JSON",
        "",
    ),
    "tools no list": ({"messages": [U, A], "tools": {"a": 1}}, "`tools` is an object", ""),
    "turn not to be trained": (
        {"messages": [U, {**A, "weight": 0}, U, A]},
        "message 2: `weight: 0` asks not to train",
        "last_assistant",
    ),
    "turn not to be trained, Axolotl": ({"messages": [U, {**A, "train": False}]}, "`train: false`", ""),
    "answer in the prompt": (
        {"prompt": [U, A, U], "completion": [A]},
        "`prompt` holds an assistant message",
        "last_assistant",
    ),
    "output a number": ({"instruction": "do", "output": 3}, "`output` is a number, wanted text", '"3"'),
    "nothing asked": (
        {"instruction": "", "input": " ", "output": "a"},
        "`instruction` and `input` are empty",
        "",
    ),
    "history of texts": ({"instruction": "q", "output": "a", "history": ["q"]}, "`history` holds text", ""),
    "empty text": ({"text": ""}, "`text` is empty", ""),
    "null answer": (
        {"instruction": "do", "output": None},
        "no format has the keys `instruction`",
        "`instruction`, `output` (alpaca)",
    ),
    "unknown keys": (
        {"foo": 1, "bar": 2},
        "no format has the keys `bar`, `foo`",
        "`messages` (messages); ",
    ),
    "no keys": ({}, "the row has no keys", "`data.format`"),
    "near: response": ({"prompt": "q", "response": "a"}, "no format", "Rename `response` to `completion`"),
    "near: preference": ({"prompt": "q", "chosen": "a", "rejected": "b"}, "no format", "preference"),
    "two formats": (
        {"instruction": "q", "output": "a", "text": "t"},
        "2 ways: alpaca (`instruction`, `output`), text (`text`)",
        "`data.format` to one of alpaca, text",
    ),
}


@pytest.mark.trap(29)
@pytest.mark.trap(32)
@pytest.mark.parametrize(("value", "problem", "fix"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses_with_file_and_line(value: dict[str, Any], problem: str, fix: str) -> None:
    with pytest.raises(DataError) as caught:
        to_conversation(row(value))
    assert (caught.value.path, caught.value.line) == ("rows.jsonl", 7)
    assert problem in caught.value.problem
    assert fix in (caught.value.fix or "")


def test_a_named_format_settles_two_ways() -> None:
    value = {"instruction": "q", "output": "a", "text": "t"}
    assert turns(value, "alpaca") == [("user", "q"), ("assistant", "a")]
    assert to_conversation(row(value), "text").text == "t"


def test_a_named_format_that_does_not_fit_lists_the_keys() -> None:
    with pytest.raises(
        DataError, match="`completion` is missing or null here, the keys are `prompt`, `text`"
    ):
        to_conversation(row({"prompt": "q", "text": "t"}), "completion")


def test_plain_text_has_no_messages() -> None:
    conversation = to_conversation(row({"text": " t\n"}), system="s")
    assert (conversation.text, conversation.messages, conversation.place) == (" t\n", (), "rows.jsonl:7")


@pytest.mark.trap(27)
@pytest.mark.parametrize(
    "system", ["plain", "quotes \" and '", r"\boxed{x} \n", "{{ messages }} {% raw %}", ""]
)
def test_system_goes_before_chats_that_have_none(system: str) -> None:
    assert turns({"messages": [U, A]}, system=system)[0] == ("system", system)
    own = {"messages": [{"role": "developer", "content": "own"}, U, A]}
    assert turns(own, system=system) == turns(own)


def test_what_templates_use_is_kept_and_the_rest_is_not() -> None:
    value = {
        "messages": [
            {**U, "name": "ann", "date": "today"},
            {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [CALL]},
            {"role": "tool", "content": "2", "tool_call_id": "c1"},
            A,
        ],
        "tools": [{"type": "function", "function": {"name": "add"}}],
    }
    conversation = to_conversation(row(value))
    user, call, tool, _ = conversation.messages
    assert dict(user.extra) == {"name": "ann"}
    assert (call.content, call.tool_calls, dict(call.extra)) == ("", (CALL,), {"reasoning_content": "hm"})
    assert dict(tool.extra) == {"tool_call_id": "c1"}
    assert conversation.tools == (value["tools"][0],)


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {
            "role": "assistant",
            "tool_calls": [{**CALL, "function": {"name": "add", "arguments": '{"x": 1}'}}],
        },
        {"role": "assistant", "tool_calls": [{**CALL, "extra": None}]},
        {"role": "assistant", "tool_calls": [{"id": "c1", "name": "add", "arguments": {"x": 1}}]},
    ],
    ids=["object", "text", "null key", "flat"],
)
def test_calls_have_one_form(turn: dict[str, Any]) -> None:
    assert to_conversation(row({"messages": [U, turn]})).messages[1].tool_calls == (CALL,)


@pytest.mark.parametrize("arguments", [None, "", {}, "{}"])
def test_a_call_without_arguments(arguments: Any) -> None:
    turn = {"role": "assistant", "content": None, "function_call": {"name": "now", "arguments": arguments}}
    wanted = {"type": "function", "function": {"name": "now", "arguments": {}}}
    assert to_conversation(row({"messages": [U, turn]})).messages[1].tool_calls == (wanted,)


def test_tools_may_be_json_text() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert to_conversation(row({"conversations": [U, A], "tools": json.dumps(tools)})).tools == tuple(tools)
    assert to_conversation(row({"conversations": [U, A], "tools": "[]"})).tools is None


def test_a_file_may_mix_formats(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    values = [{"messages": [U, A]}, {"prompt": "q", "completion": "a"}, {"instruction": "q", "output": "a"}]
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    read = [to_conversation(one) for one in read_rows(path)]
    assert [conversation.messages for conversation in read] == [
        (Message("user", "q"), Message("assistant", "a"))
    ] * 3
    assert [conversation.place for conversation in read] == [f"{path}:{line}" for line in (1, 2, 3)]


def test_prompts_for_a_model() -> None:
    asked = (Message("user", "q"),)
    assert to_messages("q") == asked
    assert to_messages([U]) == to_messages(list(asked)) == asked
    with pytest.raises(DataError, match="message 2: the role `robot`"):
        to_messages([U, {"role": "robot", "content": "x"}])
    with pytest.raises(DataError, match="no messages"):
        to_messages([])


BITS = (
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\n",
    b'"',
    b"{",
    b"]",
    b",",
    b"null",
    b"1e999",
    b"\\ud800",
    b"[" * 9,
)


def nudged(value: Any, rng: random.Random) -> Any:
    """The value with one part of it, at any depth, put in place of something else."""
    if rng.random() < 0.25 or not isinstance(value, dict | list) or not value:
        return rng.choice([None, 1, True, "", "x", [], {}, [None], {"a": None}, [{"role": "user"}]])
    if isinstance(value, dict):
        key = rng.choice(list(value))
        return {**value, key: nudged(value[key], rng)}
    at = rng.randrange(len(value))
    return [*value[:at], nudged(value[at], rng), *value[at + 1 :]]


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_in_a_file_becomes_a_row_or_one_message(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    good = [value for _, value, _ in READ.values()]
    outcomes = set()
    for _ in range(100):
        data = bytearray("\n".join(json.dumps(nudged(value, rng)) for value in good).encode())
        for _ in range(rng.randrange(3)):
            at = rng.randrange(len(data))
            data[at : at + rng.randrange(6)] = rng.choice(BITS)
        path = tmp_path / f"rows{rng.choice(['.jsonl', '.json', '.csv'])}"
        path.write_bytes(bytes(data))
        for item in scan_rows(path):
            try:
                if isinstance(item, DataError):
                    raise item
                for turn in to_conversation(item).messages:
                    turn.content.encode("utf-8")
                outcomes.add("read")
            except DataError as error:
                outcomes.add(error.path == str(path))
    assert outcomes == {"read", True}


@pytest.mark.parametrize(
    ("said", "asked"),
    [
        ({"messages": [U, A]}, "q"),
        ({"system": "s", "messages": [U, A, {"role": "user", "content": "more"}, A]}, "s\nq\na\nmore"),
        ({"messages": [U, A, {"role": "user", "content": "last"}]}, "q"),
        ({"text": "words"}, "words"),
    ],
)
def test_what_was_asked_is_all_before_the_last_answer(said: dict[str, Any], asked: str) -> None:
    assert to_conversation(row(said)).asked == asked


def test_what_is_asked_of_a_chat_without_an_answer_is_all_of_it() -> None:
    assert Conversation((Message("user", "a"), Message("user", "b")), None, None, "x:1").asked == "a\nb"


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"messages": "q"}, "`messages` is text"),
        ({"conversations": "q"}, "`conversations` is text"),
        ({"prompt": 3, "completion": "a"}, "`prompt` is a number"),
        ({"prompt": "q", "completion": 3}, "`completion` is a number"),
        ({"system": 3, "messages": [U, A]}, "`system` is a number"),
        ({"instruction": "q", "output": "a", "history": [[3, "a"]]}, "`history` is a number"),
        ({"instruction": "q", "output": "a", "history": [["q", 3]]}, "`history` is a number"),
        ({"messages": [U, {**A, "training": False}]}, "message 2: `training: false` asks not to train"),
        ({"messages": [U, {**A, "weight": 0.0}]}, "message 2: `weight: 0.0` asks not to train"),
    ],
)
def test_what_is_wrong_is_called_by_its_key(value: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError) as caught:
        to_conversation(row(value))
    assert problem in caught.value.problem


@pytest.mark.parametrize("weight", [1, True, 1.0])
def test_a_turn_that_is_to_be_trained_may_say_so(weight: Any) -> None:
    assert turns({"messages": [U, {**A, "weight": weight, "train": True}]}) == turns({"messages": [U, A]})


def test_a_format_that_there_is_not_is_refused_with_those_there_are() -> None:
    with pytest.raises(DataError, match="no format `chat`") as caught:
        to_conversation(row({"messages": [U, A]}), "chat")
    assert caught.value.fix == (
        "Set `data.format` to one of auto, messages, sharegpt, alpaca, completion, text."
    )


def test_a_call_in_sharegpts_words_is_a_call() -> None:
    call = {"name": "add", "arguments": {"x": 1}}
    value = [{"from": "human", "value": "q"}, {"from": "function_call", "value": json.dumps(call)}]
    (_, turn) = to_conversation(row({"conversations": value})).messages
    assert (turn.role, turn.content) == ("assistant", "")
    assert turn.tool_calls == ({"type": "function", "function": call},)
