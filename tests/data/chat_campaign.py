"""Random chats for each family of chat templates: is what training makes what inference feeds?

    python tests/data/chat_campaign.py                  1,000 chats for each family, some minutes
    python tests/data/chat_campaign.py --chats 50 "qwen3"

For each chat: every answer is trained in exactly one example; the ids before it are those that inference
feeds; its own ids are those of what the model writes, by an oracle in chat_families.py that knows no
template, up to a token that stops it. Of every tenth chat the prompts are compared with transformers.
Ends with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2] / "src"), str(Path(__file__).parents[1])]

from data.chat_families import FAMILIES, config, own, template, tokenizer_json
from lorimer.data.conversation import Conversation, Message
from lorimer.data.template import Example

WORDS = (
    *(
        "the",
        "light",
        "is",
        "on",
        "what",
        "123",
        "4.5",
        "naïve",
        "日本語",
        "مرحبا",
        "👩‍👧 🏳️‍🌈",
        "e\u0301",
        "\u00a0",
        "—",
    ),
    *(
        "def f(x):\n    return x",
        '{"a": [1, "b"]}',
        "{{ x }}",
        "{% if %}",
        "C:\\n",
        "<b>",
        "a|b",
        "User:",
        "▁",
    ),
)
EDGES = (" ", "\n", "  ", "\t", "\n\n", "\r\n")
TOOL = {
    "type": "function",
    "function": {
        "name": "set_light",
        "description": "Sets a <light>, 'é' & more.",
        "parameters": {"type": "object", "properties": {"room": {"type": "string"}}, "required": ["room"]},
    },
}


class Writer:
    """Random texts for one family. Hard ones spell its markers, halves of them, and have odd edges."""

    def __init__(self, name: str, rng: random.Random, *, hard: bool) -> None:
        family = FAMILIES[name]
        self.family, self.rng, self.hard = family, rng, hard
        self.markers = [family.eos, *([family.bos] if family.bos else []), *family.markers, *family.words]

    def text(self, *, empty: bool = True) -> str:
        rng = self.rng
        if empty and rng.random() < 0.08:
            return rng.choice(("", " ", "\n", "  \n")) if self.hard else ""
        words = rng.choices(WORDS, k=rng.randrange(1, 7))
        if self.hard:
            words += [self.marker() for _ in range(rng.choice((0, 0, 1, 2)))]
            rng.shuffle(words)
        text = rng.choice((" ", " ", "\n", "")).join(words)
        if not self.hard:
            return text.strip() or "yes"
        return rng.choice(("", "", *EDGES)) + text + rng.choice(("", "", *EDGES))

    def marker(self) -> str:
        """A marker of the family, or what stays of it when it is cut."""
        marker = self.rng.choice([*self.markers, "<|im_end|>", "</s>", "[INST]", "<|eot_id|>"])
        cut = self.rng.randrange(1, len(marker))
        return self.rng.choice((marker, marker, marker[:cut], marker[cut:]))

    def answer(self) -> Message:
        rng, said = self.rng, self.text()
        if self.family.words:  # the model's own words are no text to play with
            said = re.sub("|".join(map(re.escape, self.family.words)), "", said)
        if not self.family.thinks or rng.random() < 0.4:
            return Message("assistant", said)
        thought = re.sub("</?think>|</?tool_call>", "", self.text(empty=False)).strip() or "hm"
        if rng.random() < 0.3 and "reasoning_content" in self.family.source:
            return Message("assistant", said, None, {"reasoning_content": thought})
        return Message("assistant", f"<think>\n{thought}\n</think>\n\n{said}")

    def called(self, number: int) -> tuple[Message, Message]:
        """A call and what the tool says to it."""
        arguments = {"room": self.text(), "n": number, "deep": [self.text(), None, True]}
        name = f"set_{self.rng.choice(('light', 'lamp'))}"
        call = {
            "id": f"call{number:05d}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        said = Message("assistant", "" if self.rng.random() < 0.7 else self.text(), (call,))
        return said, Message("tool", self.text(), None, {"tool_call_id": call["id"]})

    def chat(self, place: str = "rows.jsonl:1") -> Conversation:
        rng = self.rng
        messages = []
        if self.family.system == "first" and rng.random() < 0.5:
            messages.append(Message("system", rng.choice(("", "/no_think ")) + self.text()))
        tools = self.family.tools and rng.random() < 0.5
        for number in range(rng.randrange(1, 6)):
            messages.append(Message("user", self.text()))
            if tools and rng.random() < 0.4:
                messages += self.called(number)
            messages.append(self.answer())
        if rng.random() < 0.1:
            messages.append(Message("user", self.text()))
        return Conversation(tuple(messages), (TOOL,) if tools else None, None, place)


def differences(name: str, conversation: Conversation) -> list[str]:
    """What training makes of a chat that inference would not, in words; nothing if all is equal."""
    family, made = FAMILIES[name], template(name)
    tokenizer, messages = made.tokenizer, conversation.messages
    examples = made.examples(conversation)
    spans = [(example, *span) for example in examples for span in _spans(example)]
    answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
    found = []
    if len(spans) != len(answers):
        found.append(f"{len(spans)} trained spans for {len(answers)} answers")
    if len(examples) > 1 and not family.parts:
        found.append(f"{len(examples)} examples where one would do")
    stops = {*tokenizer.eos_ids, *made.end_ids}
    for number in answers:
        prompt = made.prompt_ids(messages[:number], conversation.tools)
        own = [span for span in spans if span[0].ids[: span[1]].tolist() == prompt]
        if len(own) != 1:
            found.append(f"message {number + 1}: its prompt stands before {len(own)} trained spans")
            continue
        example, first, last = own[0]
        if int(example.ids[last - 1]) not in stops:
            found.append(
                f"message {number + 1}: it ends with {tokenizer.token(int(example.ids[last - 1]))!r}"
            )
        wanted = _written(name, conversation, number)
        found += _apart(name, example, first, last, wanted, f"message {number + 1}")
    return found


def _spans(example: Example) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(example.trained.astype(np.int8), prepend=0, append=0))
    return [(int(first), int(last)) for first, last in edges.reshape(-1, 2)]


def _written(name: str, conversation: Conversation, number: int) -> str:
    """The oracle's text; what ends an answer of GLM is the marker of who speaks next."""
    message, after = conversation.messages[number], conversation.messages[number + 1 :]
    if name != "glm 4":
        return FAMILIES[name].says(message, not after)
    if message.tool_calls:
        named = message.tool_calls[0]["function"]
        said = f"{named['name']}\n{json.dumps(named['arguments'], ensure_ascii=False)}"
    else:
        said = message.content
    speaker = after[0].role.replace("tool", "observation") if after else ""
    return said + own(f"<|{speaker}|>" if after else "<|endoftext|>")


def _apart(name: str, example: Example, first: int, last: int, wanted: str, what: str) -> list[str]:
    """Where an answer's ids differ from those of what the model writes."""
    tokenizer, ids = template(name).tokenizer, example.ids.tolist()
    if FAMILIES[name].base in ("byte level", "llama 3"):
        own = _model_ids(name, wanted)
        return (
            [] if ids[first:last] == own else [f"{what}: ids {ids[first:last]} (wanted: {own}, {wanted!r})"]
        )
    # SentencePiece: what decoding shows after what came before, dummy spaces beside markers aside.
    before = tokenizer.decode(ids[:first], skip_special=False)
    text = tokenizer.decode(ids[:last], skip_special=False)[len(before) :]
    dropped = "\uf000\uf001▁" + (" \n\t\r\u00a0" if FAMILIES[name].rstrip else " ")
    shown, written = (value.translate(dict.fromkeys(map(ord, dropped))) for value in (text, wanted))
    same = shown == written
    return [] if same else [f"{what}: {text!r} (wanted: {wanted!r})"]


def _model_ids(name: str, text: str) -> list[int]:
    """Ids of what a model writes: text, its own words, and control tokens where it writes them itself."""
    tokenizer, family = template(name).tokenizer, FAMILIES[name]
    ids: list[int] = []
    for part in re.split("(\uf000[^\uf001]*\uf001)", text):
        words = "|".join(map(re.escape, family.words)) or "(?!)"
        for piece in [part] if part.startswith("\uf000") else re.split(f"({words})", part):
            number = tokenizer.id(piece.strip("\uf000\uf001"))
            known = piece.startswith("\uf000") or piece in family.words
            ids += [number] if known and number is not None else tokenizer.encode_content(piece)
    return ids


@cache
def theirs(name: str) -> Any:
    """The same tokenizer and template in transformers."""
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(tokenizer_json(name), encoding="utf-8")
        made = PreTrainedTokenizerFast(tokenizer_file=str(path), **config(name))
    made.chat_template = FAMILIES[name].source
    return made


def as_dicts(messages: tuple[Message, ...]) -> list[dict[str, Any]]:
    given = []
    for message in messages:
        value: dict[str, Any] = {"role": message.role, "content": message.content, **message.extra}
        given.append(value | ({"tool_calls": list(message.tool_calls)} if message.tool_calls else {}))
    return given


def against_transformers(name: str, conversation: Conversation) -> list[str]:
    """Each answer's prompt against apply_chat_template. Texts are equal for every family. Ids are equal
    too, but for answers already given where one follows ordinary text: they are cut where they began."""
    made, messages, tools = template(name), conversation.messages, conversation.tools
    found = []
    for number, message in enumerate(messages):
        if message.role != "assistant":
            continue
        given = as_dicts(messages[:number])
        asked = {"tools": list(tools) if tools else None, "add_generation_prompt": True}
        text = theirs(name).apply_chat_template(given, tokenize=False, **asked)
        if made.render(messages[:number], tools, add_generation_prompt=True) != text:
            found.append(f"message {number + 1}: another text than in transformers")
        ids = theirs(name).apply_chat_template(given, return_dict=False, **asked)
        own = made.prompt_ids(messages[:number], tools)
        first = all(earlier.role != "assistant" for earlier in messages[:number])
        if own != ids and (first or FAMILIES[name].seam == "marker"):
            found.append(f"message {number + 1}: other ids than in transformers: {own} (wanted: {ids})")
    return found


def campaign(name: str, chats: int, seed: int = 0) -> tuple[int, int, list[str]]:
    """Chats compared, prompts compared with transformers, and what differed."""
    rng, found, compared = random.Random(f"{name} {seed}"), [], 0
    for number in range(chats):
        hard = number % 2 == 1
        conversation = Writer(name, rng, hard=hard).chat(f"chat {number}")
        found += [f"{name}, chat {number}: {what}" for what in differences(name, conversation)]
        if number % 10 == 0:
            compared += sum(message.role == "assistant" for message in conversation.messages)
            found += [f"{name}, chat {number}: {what}" for what in against_transformers(name, conversation)]
    return chats, compared, found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*", help="all of them if none is named")
    parser.add_argument("--chats", type=int, default=1000)
    given = parser.parse_args()
    started, total, failed = time.perf_counter(), 0, 0
    for name in given.families or FAMILIES:
        begun = time.perf_counter()
        chats, compared, found = campaign(name, given.chats)
        total, failed = total + chats, failed + len(found)
        seconds = time.perf_counter() - begun
        facts = f"{chats:>7,} chats{compared:>6,} prompts as in transformers{len(found):>6} differences"
        print(f"{name:<16}{facts}{seconds:>7.1f} s", flush=True)
        for line in found[:3]:
            print(f"    {line}")
    print(f"{total:,} chats, {failed} differences, {time.perf_counter() - started:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
