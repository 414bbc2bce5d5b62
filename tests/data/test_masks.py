"""Two hundred chats labelled by rules that a reader can check: what is trained stands between « and ».

Each format's turns are written out here as its model's page shows them, apart from the template's code and
from the code that finds the answers in it.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from data.chat_templates import chat, marked, only
from data.chat_templates import template as template_of

Pairs = list[tuple[str, str]]
WORDS = (
    "hi",
    "ok.",
    "two words",
    "42",
    "3.5 m",
    "C'est ça?",
    '{"a": 1}',
    "x = y",
    "a-b",
    "naïve",
    "日本",
    "No!",
)


def chatml(system: str | None, pairs: Pairs) -> str:
    turns = f"<|im_start|>system\n{system or 'Be brief.'}<|im_end|>\n"
    for asked, answer in pairs:
        turns += f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n«{answer}<|im_end|>»\n"
    return turns


def llama3(system: str | None, pairs: Pairs) -> str:
    def turn(role: str, text: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}"

    turns = "<|begin_of_text|>" + (turn("system", f"{system}<|eot_id|>") if system else "")
    for asked, answer in pairs:
        turns += turn("user", f"{asked}<|eot_id|>") + turn("assistant", f"«{answer}<|eot_id|>»")
    return turns


# Decoding shows a space that these kinds of tokenizer put before a word.
def llama2(system: str | None, pairs: Pairs, begin: str = "<s> [INST]") -> str:
    head = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    turns = ""
    for asked, answer in pairs:
        turns += f"{begin} {head}{asked} [/INST]« {answer} </s>»"
        head = ""
    return turns


def mistral(system: str | None, pairs: Pairs) -> str:
    return llama2(system, pairs, "<s>[INST]")


def gemma(system: str | None, pairs: Pairs) -> str:
    turns = "<bos>"
    for asked, answer in pairs:
        turns += f"<start_of_turn>user\n{asked}<end_of_turn>\n"
        turns += f"<start_of_turn>model\n«{answer}<end_of_turn>»\n"
    return turns


def zephyr(system: str | None, pairs: Pairs) -> str:
    turns = f"<|system|>\n{system}</s> \n" if system else ""
    for asked, answer in pairs:
        turns += f"<|user|>\n{asked}</s> \n<|assistant|>\n«{answer}</s>» \n"
    return turns


def phi(system: str | None, pairs: Pairs) -> str:
    turns = f"<|system|> {system}<|end|>" if system else ""
    for n, (asked, answer) in enumerate(pairs, 1):
        end = "<|endoftext|>" if n == len(pairs) else ""
        turns += f"<|user|> {asked}<|end|><|assistant|>« {answer}<|end|>{end}»"
    return turns


def glm(system: str | None, pairs: Pairs) -> str:
    """The marker of who speaks next ends an answer, so it is learnt with it."""
    turns = "[gMASK]<sop>" + (f"<|system|>\n{system}" if system else "") + "<|user|>"
    for n, (asked, answer) in enumerate(pairs, 1):
        turns += f"\n{asked}<|assistant|>\n«{answer}{'<|endoftext|>' if n == len(pairs) else '<|user|>'}»"
    return turns


LABELLED: dict[str, Callable[[str | None, Pairs], str]] = {
    "chatml": chatml,
    "llama 3": llama3,
    "llama 2": llama2,
    "mistral": mistral,
    "gemma": gemma,
    "zephyr": zephyr,
    "phi": phi,
    "glm": glm,
}
CHATS = 30


@pytest.mark.trap(5)
@pytest.mark.trap(7)
@pytest.mark.trap(8)
@pytest.mark.parametrize("name", LABELLED)
def test_what_is_trained_is_what_the_label_says(name: str) -> None:
    template, rng = template_of(name), random.Random(8)
    seen = set()
    for number in range(CHATS):
        system = rng.choice(WORDS) if number % 2 and name != "gemma" else None
        pairs = [(rng.choice(WORDS), rng.choice(WORDS)) for _ in range(1 + number % 4)]
        turns = [turn for asked, answer in pairs for turn in (f"u:{asked}", f"a:{answer}")]
        example = only(template, chat(*([f"s:{system}"] if system else []), *turns))
        wanted = LABELLED[name](system, pairs)
        assert marked(example, template.tokenizer) == wanted
        seen.add(wanted)
    assert len(seen) >= 25  # 200 in all
