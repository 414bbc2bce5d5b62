"""The traps of data: rows or a template that fall into each and the checks that say so, or why none can.

Numbers are those of docs/traps.md, whose column of checks is made from this.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADER = "<|im_start|>assistant\n"
ENDLESS = CHATML.replace("<|im_end|>\n", "")
BARE = "{% for message in messages %}{{ message.content }}<|im_end|>{% endfor %}"
# Thoughts only after the last question, as Qwen's.
FORGETS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if loop.last %}{{ message.content }}"
    "{% else %}{{ message.content.split('</think>') | last }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = {"type": "function", "function": {"name": "light", "arguments": {"on": True}}}


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def chat(question: str, answer: str, *more: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [turn("user", question), turn("assistant", answer), *more]}


def encoded(row: dict[str, Any], encoding: str) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode(encoding)


SOUND = [chat(f"what is {n} and {n}", f"{2 * n}") for n in range(5)]
UNANSWERED = chat("x", "", turn("user", "z"))
LONG = chat("y" * 400, "x")
CUT = {"max_tokens": 200, "too_long": "truncate"}


@dataclass(frozen=True, slots=True)
class Fall:
    """Rows that are put after five sound ones, and the check that must name all of them."""

    check: str
    rows: tuple[Any, ...]
    template: str = CHATML
    settings: dict[str, Any] = field(default_factory=dict)
    sound: int = 5  # of the rows before them; 0 where the file is these rows alone


FOUND: dict[int, tuple[Fall, ...]] = {
    1: (Fall("end-not-trained", (chat("x", "y", turn("user", "z")),), ENDLESS),),
    2: (Fall("end-not-trained", (chat("x", "y", turn("user", "z")),), ENDLESS),),
    3: (Fall("double-bos", (chat("x", "y"),), "{{ bos_token }}{{ bos_token }}" + CHATML),),
    4: (Fall("template", (chat("x", "y"),), CHATML.replace("<|im_start|>assistant", "<|im_start|>bot")),),
    5: (
        Fall("split-chats", (chat("x", "<think>a</think>b", *chat("y", "c")["messages"]),), FORGETS),
        Fall(
            "not-shown", (chat("x", "", turn("user", "y"), turn("assistant", "z", reasoning_content="w")),)
        ),
    ),
    7: (Fall("control-markers", (chat(f"{HEADER}x", "y"),)),),
    8: (Fall("all-trained", ({"messages": [turn("assistant", "x")]},), BARE),),
    9: (
        Fall("too-long", (LONG,), settings={"max_tokens": 200}),
        Fall("answer-cut-off", (LONG,), settings=CUT),
    ),
    10: (Fall("nothing-trained", (UNANSWERED,), ENDLESS),),
    19: (Fall("too-long", (LONG,), settings={"max_tokens": 200}),),
    20: (Fall("too-long", (LONG,), settings={"max_tokens": 200, "too_long": "error"}),),
    23: (
        Fall("duplicate", (chat("WHAT is 1 and  1", "2"),)),
        Fall("contradiction", (chat("what is 3 and 3", "7"),)),
    ),
    26: (
        Fall("control-markers", (chat("x", "y<|im_end|>"),)),
        Fall("rendered-text", ({"text": "<|im_start|>user\nx<|im_end|>"},)),
    ),
    28: (Fall("placeholder", (chat("{{ question }}", "x"), chat("dear [your name]", "y"))),),
    29: (
        Fall("bad-row", ({"messages": [turn("robot", "x"), turn("assistant", "y")]},)),
        Fall("bad-row", ({"messages": [turn("user", "x")]},)),
        Fall(
            "not-shown",
            (chat("x", "y", turn("tool", "z"), turn("assistant", "w")),),
            CHATML.replace("{{ message.content }}", "{{ message.content if message.role != 'tool' }}"),
        ),
        Fall("not-shown", ({"messages": [turn("user", "x"), turn("assistant", "y", tool_calls=[CALL])]},)),
        Fall("not-shown", ({**chat("x", "y"), "tools": [CALL]},)),
        Fall("late-system", (chat("x", "y", turn("system", "s"), *chat("z", "w")["messages"]),)),
        Fall("open-end", (chat("x", "y", turn("user", "z")),)),
        Fall("role-twice", (chat("x", "y", turn("assistant", "z")),)),
    ),
    30: (
        Fall("unreadable", (encoded(chat("café", "x"), "cp1252"), encoded(chat("汉语", "x"), "gb18030"))),
        Fall("hidden-characters", (chat("\ufeffx", "y"),)),
        Fall("mixed-formats", ({"prompt": "x", "completion": "y"},)),
    ),
    31: (Fall("broken-text", (chat("café".encode().decode("cp1252"), "x"),)),),
    32: (
        Fall("bad-row", (chat("x", None),)),  # type: ignore[arg-type]
        Fall("empty-answer", (chat("x", " \n"),)),
        Fall("empty-question", (chat("", "x"),)),
        Fall("no-rows", (), sound=0),
        Fall("split", (chat("x", "y"),), settings={"valid_fraction": 0.5}, sound=0),
    ),
    33: (Fall("too-long", (chat("x", "word " * 20_000),)),),
}
CANNOT: dict[int, str] = {
    6: "prompt and answer are encoded apart, as inference encodes them",
    11: "a loss that is not finite stops the run; no row holds one",
    12: "a step's loss is divided by its trained tokens, counted before its first pack",
    13: "only tokens that are predicted are counted as trained",
    14: "the last step is divided by its own trained tokens",
    15: "nothing else divides",
    16: "the labels of a pack are shifted once, whatever the loss is",
    17: "a pack says where each row begins, and attention ends there",
    18: "positions are counted in each row, and its first token is never predicted",
    21: "valid is computed as train is, row by row",
    22: "the loss on valid and test is a sum over tokens",
    24: "rows are not grouped by length; the order is drawn from the seed",
    25: "tokens are never cached",
    27: "a text is a value that the template reads, never part of its source",
    34: "limits in the tokenizer's files are not read; `data.max_tokens` is the only one",
}
