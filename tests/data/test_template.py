"""Which tokens are trained, seen as text, and what inference feeds: always the same ids."""

from __future__ import annotations

import hashlib
import random
import re
from typing import Any

import numpy as np
import pytest

from data.chat_templates import CHATML, SHAPES, TOOLS, chat, config, marked, only, tokenizer_json
from data.chat_templates import template as template_of
from data.chat_templates import tokenizer as tokenizer_of
from data.hard_strings import CONTROLS, HARD, PLAIN, WORDS
from lorimer.data.conversation import Conversation, Message
from lorimer.data.template import ChatTemplate
from lorimer.errors import TemplateError

ONE = ("u:hi", "a:hello")
TWO = ("s:Sys.", "u:hi", "a:one", "u:more", "a:two")
EMPTY = ("u:hi", "a:")
SPELLED = ("u:say <|im_end|></s>", "a:<|im_end|>ok</s>")
THOUGHT = ("u:hi", "a:<think>why</think>\n\nsure", "u:and", "a:<think>so</think>\n\nyes")

# Trained stretches between « and ». Written by hand from each template.
ORACLE = [
    (
        "chatml",
        ONE,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n«hello<|im_end|>»\n",
    ),
    (
        "chatml",
        TWO,
        "<|im_start|>system\nSys.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n«one<|im_end|>»\n<|im_start|>user\nmore<|im_end|>\n"
        "<|im_start|>assistant\n«two<|im_end|>»\n",
    ),
    (
        "chatml",
        EMPTY,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n«<|im_end|>»\n",
    ),
    (
        "chatml",
        SPELLED,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nsay <|im_end|></s><|im_end|>\n"
        "<|im_start|>assistant\n«<|im_end|>ok</s><|im_end|>»\n",
    ),
    (
        "chatml",
        ("s:", *ONE, "u:last"),
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n«hello<|im_end|>»\n<|im_start|>user\nlast<|im_end|>\n",
    ),
    (
        "llama 3",
        TWO,
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nSys.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«one<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nmore<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«two<|eot_id|>»",
    ),
    (
        "llama 3",
        EMPTY,
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«<|eot_id|>»",
    ),
    # Decoding shows the space that this kind of tokenizer puts after each control token.
    (
        "llama 2",
        TWO,
        "<s> [INST] <<SYS>>\nSys.\n<</SYS>>\n\nhi [/INST]« one </s>»<s> [INST] more [/INST]« two </s>»",
    ),
    ("llama 2", SPELLED, "<s> [INST] say <|im_end|></s> [/INST]« <|im_end|>ok</s> </s>»"),
    (
        "mistral",
        TWO,
        "<s>[INST] <<SYS>>\nSys.\n<</SYS>>\n\nhi [/INST]« one </s>»<s>[INST] more [/INST]« two </s>»",
    ),
    ("mistral", ("u:what is [INST]", "a:[/INST]"), "<s>[INST] what is [INST] [/INST]« [/INST] </s>»"),
    (
        "gemma",
        ("u: hi ", "a: one ", "u:more", "a:two"),
        "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n«one<end_of_turn>»\n"
        "<start_of_turn>user\nmore<end_of_turn>\n<start_of_turn>model\n«two<end_of_turn>»\n",
    ),
    (
        "zephyr",
        TWO,
        "<|system|>\nSys.</s> \n<|user|>\nhi</s> \n<|assistant|>\n«one</s>» \n"
        "<|user|>\nmore</s> \n<|assistant|>\n«two</s>» \n",
    ),
    # Zephyr's role lines are plain text: a user may spell them, nothing is searched for.
    (
        "zephyr",
        ("u:<|assistant|>\nno", "a:yes"),
        "<|user|>\n<|assistant|>\nno</s> \n<|assistant|>\n«yes</s>» \n",
    ),
    # These markers take the line end after them with them.
    (
        "phi",
        TWO,
        "<|system|> Sys.<|end|><|user|> hi<|end|><|assistant|>« one<|end|>»"
        "<|user|> more<|end|><|assistant|>« two<|end|><|endoftext|>»",
    ),
    (
        "glm",
        TWO,
        "[gMASK]<sop><|system|>\nSys.<|user|>\nhi<|assistant|>\n«one<|user|>»\nmore"
        "<|assistant|>\n«two<|endoftext|>»",
    ),
    ("glm", EMPTY, "[gMASK]<sop><|user|>\nhi<|assistant|>\n«<|endoftext|>»"),
    # <|system|> is no end token of this model, so it is not taught as one.
    (
        "glm",
        ("u:hi", "a:one", "s:Sys.", "u:more", "a:two"),
        "[gMASK]<sop><|user|>\nhi<|assistant|>\n«one»<|system|>\nSys.<|user|>\nmore"
        "<|assistant|>\n«two<|endoftext|>»",
    ),
    (
        "qwen 3",
        ("u:hi", "a:<think>why</think>\n\nsure"),
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«<think>why</think>\n\nsure<|im_end|>»\n",
    ),
    (
        "default on chatml",
        TWO,
        "<|im_start|>system\nSys.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n«one<|im_end|>»\n<|im_start|>user\nmore<|im_end|>\n"
        "<|im_start|>assistant\n«two<|im_end|>»\n",
    ),
    (
        "default on another",
        ONE,
        "<|im_start|>user\nhi</s> \n<|im_start|>assistant\n«hello</s>» \n",
    ),
]


@pytest.mark.trap(2)
@pytest.mark.trap(5)
@pytest.mark.trap(7)
@pytest.mark.trap(8)
@pytest.mark.trap(28)
@pytest.mark.parametrize(("name", "turns", "wanted"), ORACLE)
def test_the_trained_spans_are_those_written_by_hand(
    name: str, turns: tuple[str, ...], wanted: str
) -> None:
    template = template_of(name)
    assert marked(only(template, chat(*turns)), template.tokenizer) == wanted


KEEPING = [name for name in SHAPES if name != "thinks first"]
ROLES_OF = {"gemma": "ua", "mistral": "ua", "llama 2": "ua"}


def a_chat(rng: random.Random, name: str) -> tuple[str, ...]:
    """Two to five turns of hard texts; templates that want it get question and answer in turn."""
    pieces = [
        *CONTROLS,
        *WORDS,
        *PLAIN,
        " ",
        "\n",
        "word",
        "<|eot_id|>",
        "[/INST]",
        "<|user|>",
        "<end_of_turn>",
    ]

    def text() -> str:
        return "".join(rng.choices(pieces, k=rng.randrange(4)))

    system = [] if name in ROLES_OF or rng.random() < 0.5 else [f"s:{text()}"]
    asked = [(f"u:{text()}", f"a:{text()}") for _ in range(rng.randrange(1, 3))]
    return (*system, *(turn for pair in asked for turn in pair))


@pytest.mark.trap(4)
@pytest.mark.trap(6)
@pytest.mark.trap(26)
@pytest.mark.parametrize("name", KEEPING)
def test_what_inference_feeds_is_what_comes_before_the_trained_span(name: str) -> None:
    template, rng = template_of(name), random.Random(name)
    tokenizer = template.tokenizer
    eos = tokenizer.eos_id
    for _ in range(60):
        conversation = chat(*a_chat(rng, name))
        answers = [n for n, message in enumerate(conversation.messages) if message.role == "assistant"]
        last = name == "qwen 3"  # which drops earlier thoughts
        example = only(template, conversation, "last_assistant" if last else "assistant")
        answers = answers[-1:] if last else answers
        spans = np.flatnonzero(np.diff(example.trained.astype(np.int8), prepend=0) == 1)
        assert len(spans) == len(answers)
        for start, number in zip(spans, answers, strict=True):
            prompt = template.prompt_ids(conversation.messages[:number], conversation.tools)
            assert example.ids[:start].tolist() == prompt
        assert example.trained[-1] or not example.trained[-2:].all()
        assert eos in example.ids
        assert set(np.unique(example.ids)) <= set(range(tokenizer.vocab_size))


@pytest.mark.trap(6)
@pytest.mark.parametrize("name", ["chatml", "llama 3", "default on chatml", "tools"])
def test_the_trained_ids_decode_to_the_answer(name: str) -> None:
    template = template_of(name)
    for answer in HARD:
        wanted = answer.strip() if name == "llama 3" else answer
        example = only(template, chat("u:q", f"a:{answer}"))
        learnt = template.tokenizer.decode(example.ids[example.trained].tolist(), skip_special=False)
        assert learnt == wanted + SHAPES[name].eos


@pytest.mark.trap(6)
def test_the_trained_ids_of_thousands_of_pairs_decode_to_the_answer() -> None:
    """Whatever stands on both sides of the seam: spaces, half words, other scripts, emoji."""
    template, rng = template_of("chatml"), random.Random(6)
    pieces = [
        *PLAIN,
        " ",
        "  ",
        "\n",
        "\t",
        "a",
        "ab",
        "1",
        ".",
        "汉",
        "日本",
        "é",
        "e\u0301",
        "🙂",
        "👨‍👩‍👧",
        "\u200b",
    ]
    for _ in range(5000):
        question, answer = ("".join(rng.choices(pieces, k=rng.randrange(1, 4))) for _ in range(2))
        example = only(template, chat(f"u:{question}", f"a:{answer}"))
        learnt = template.tokenizer.decode(example.ids[example.trained].tolist(), skip_special=False)
        assert learnt == f"{answer}<|im_end|>"


@pytest.mark.trap(26)
@pytest.mark.parametrize("name", KEEPING)
def test_the_number_of_control_tokens_does_not_depend_on_what_messages_spell(name: str) -> None:
    template = template_of(name)
    tokenizer = template.tokenizer
    markers = [*CONTROLS, *WORDS, SHAPES[name].eos, *SHAPES[name].markers]
    plain = controls_in(template, "word", "word")
    for marker in markers:
        assert controls_in(template, f"a {marker} b{marker}", "word") == plain
        own = tokenizer.id(marker) is not None and not tokenizer.is_special(tokenizer.id(marker) or 0)
        if not own:
            assert controls_in(template, "word", f"{marker}a {marker}") == plain


def controls_in(template: ChatTemplate, asked: str, answered: str) -> list[int]:
    example = only(template, chat(f"u:{asked}", f"a:{answered}"))
    names = [*CONTROLS, *WORDS, *{m for s in SHAPES.values() for m in (s.eos, s.bos or "<s>", *s.markers)}]
    known = {template.tokenizer.id(name) for name in names} - {None}
    return [number for number in example.ids.tolist() if number in known]


@pytest.mark.trap(26)
def test_every_part_of_a_message_is_hidden() -> None:
    template = template_of("tools")
    marker = "<|im_end|>"
    call = {"type": "function", "function": {"name": f"f{marker}", "arguments": {f"k{marker}": [marker]}}}
    tools = ({"type": "function", "function": {"name": f"f{marker}", "description": marker}},)
    messages = (
        Message("system", marker),
        Message("user", marker, extra={"name": marker}),
        Message("assistant", marker, (call,), {"reasoning_content": marker}),
        Message("tool", marker, extra={"tool_call_id": marker}),
        Message("assistant", marker),
    )
    example = only(template, Conversation(messages, tools, None, "a:1"))
    text = template.render(messages, tools)
    assert text.count(marker) == 16
    # One for each message and one for the tools.
    assert example.ids.tolist().count(template.tokenizer.id(marker)) == 6
    assert template.tokenizer.decode(example.ids.tolist(), skip_special=False) == text


def test_an_assistant_writes_its_own_words_and_others_do_not() -> None:
    template = template_of("tools")
    think = template.tokenizer.id("<think>")
    assert think in only(template, chat("u:q", "a:<think>")).ids
    for turns in (("u:<think>", "a:x"), ("s:<think>", "u:q", "a:x"), ("t:<think>", "a:x")):
        assert think not in only(template, chat(*turns)).ids


TOOL = {"type": "function", "function": {"name": "light", "description": "<b>&'é'"}}
CALL = {"type": "function", "function": {"name": "light", "arguments": {"on": True}}}


@pytest.mark.trap(2)
def test_a_chat_with_tools() -> None:
    template = template_of("tools")
    messages = (
        Message("user", "on"),
        Message("assistant", "", (CALL,)),
        Message("tool", "done"),
        Message("assistant", "It is on."),
    )
    example = only(template, Conversation(messages, (TOOL,), None, "a:1"))
    assert marked(example, template.tokenizer) == (
        '<|im_start|>system\nTools:\n{"type": "function", "function": {"name": "light", '
        '"description": "<b>&\'é\'"}}\n<|im_end|>\n<|im_start|>user\non<|im_end|>\n<|im_start|>assistant\n'
        '«<tool_call>\n{"name": "light", "arguments": {"on": true}}\n</tool_call><|im_end|>»\n'
        "<|im_start|>user\n<tool_response>\ndone\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n«It is on.<|im_end|>»\n"
    )


@pytest.mark.trap(1)
@pytest.mark.parametrize("pad", ["<|im_end|>", "</s>", None])
def test_the_end_of_turn_is_trained_whatever_the_pad_token_is(pad: str | None) -> None:
    tokenizer = tokenizer_of("chatml")
    tokenizer.config["pad_token"] = pad
    template = ChatTemplate(CHATML, tokenizer)
    example = only(template, chat(*TWO))
    ends = np.flatnonzero(example.ids == tokenizer.id("<|im_end|>"))
    assert example.trained[ends].tolist() == [False, False, True, False, True]
    assert (example.ids == only(template_of("chatml"), chat(*TWO)).ids).all()


@pytest.mark.trap(3)
@pytest.mark.parametrize("name", KEEPING)
@pytest.mark.parametrize("adds", [True, False, None])
def test_there_is_one_bos_where_template_or_tokenizer_gives_it(name: str, adds: bool | None) -> None:
    tokenizer = tokenizer_of(name)
    tokenizer.config["add_bos_token"] = adds
    template = ChatTemplate(SHAPES[name].source, tokenizer)
    bos = tokenizer.bos_id
    ids = only(template, chat(*ONE)).ids.tolist()
    written = "bos_token" in template.source or (template.is_default and tokenizer.adds_bos)
    assert ids.count(bos) == (1 if written else 0)
    assert template.prompt_ids(chat(*ONE).messages[:1]).count(bos) == ids.count(bos)
    text = only(template, Conversation((), None, "<s> some words", "a:1")).ids.tolist()
    assert text.count(bos) == (1 if tokenizer.adds_bos else 0)
    assert text[:2] != [bos, bos]


@pytest.mark.trap(3)
@pytest.mark.parametrize("name", [name for name in KEEPING if SHAPES[name].source])
def test_text_and_ids_are_those_of_apply_chat_template(name: str, tmp_path: Any) -> None:
    from transformers import PreTrainedTokenizerFast

    (tmp_path / "tokenizer.json").write_text(tokenizer_json(name), encoding="utf-8")
    given = {key: value for key, value in config(name).items() if value}
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **given)
    template = template_of(name)
    theirs.chat_template = template.source
    turns = ("u:What is it?", "a:It is {{ x }} {% y %} & <b>.", "u:Really?\n", "a:Yes, 日本.")
    for chosen in (
        (turns, turns[:1], turns[:3]) if name in ROLES_OF else (turns, turns[:3], ("s:S", *turns))
    ):
        messages = chat(*chosen).messages
        plain = [{"role": message.role, "content": message.content} for message in messages]
        for prompt in (False, True):
            text = theirs.apply_chat_template(plain, tokenize=False, add_generation_prompt=prompt)
            assert template.render(messages, add_generation_prompt=prompt) == text
            ids = theirs.apply_chat_template(plain, add_generation_prompt=prompt, return_dict=False)
            if prompt:
                assert template.prompt_ids(messages) == ids
            elif name != "glm" and any(message.role == "assistant" for message in messages):
                assert only(template, Conversation(messages, None, None, "")).ids.tolist() == ids


def test_tools_are_rendered_as_transformers_does() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = (Message("user", "on"), Message("assistant", "", (CALL,)), Message("tool", "done"))
    plain = [{"role": "user", "content": "on"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    plain += [{"role": "tool", "content": "done"}]
    theirs = render_jinja_template([plain], tools=[TOOL], chat_template=TOOLS)[0][0]
    assert template_of("tools").render(messages, [TOOL]) == theirs


@pytest.mark.trap(5)
def test_a_template_that_drops_earlier_thoughts_takes_an_example_for_each_answer() -> None:
    template = template_of("qwen 3")
    whole = (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nsure<|im_end|>\n"
        "<|im_start|>user\nand<|im_end|>\n<|im_start|>assistant\n«<think>so</think>\n\nyes<|im_end|>»\n"
    )
    examples = template.examples(chat(*THOUGHT))
    assert [marked(example, template.tokenizer) for example in examples] == [
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«<think>why</think>\n\nsure<|im_end|>»\n",
        whole,
    ]
    for example, before in zip(examples, (1, 3), strict=True):
        prompt = example.ids[: int(np.argmax(example.trained))].tolist()
        assert prompt == template.prompt_ids(chat(*THOUGHT).messages[:before])
    last = only(template, chat(*THOUGHT), train_on="last_assistant")
    assert marked(last, template.tokenizer) == whole


@pytest.mark.trap(5)
def test_an_example_holds_as_many_answers_as_it_keeps() -> None:
    """Only the answer with a thought needs one of its own; a question after the last answer changes it."""
    template = template_of("qwen 3")
    turns = ("u:a", "a:one", *THOUGHT[:2], "u:b", "a:two", "u:more?")
    learnt = [
        [text.split("»")[0] for text in marked(example, template.tokenizer).split("«")[1:]]
        for example in template.examples(chat(*turns))
    ]
    assert learnt == [["<think>why</think>\n\nsure<|im_end|>"], ["one<|im_end|>", "two<|im_end|>"]]
    (last,) = template.examples(chat(*THOUGHT, "u:more?"), "last_assistant")
    assert "«<think>so</think>" in marked(last, template.tokenizer)


@pytest.mark.trap(5)
@pytest.mark.trap(4)
@pytest.mark.parametrize("train_on", ["assistant", "last_assistant"])
@pytest.mark.parametrize(
    ("answer", "learnt"),
    [
        ("hello", "\n</think>\n\nhello<|im_end|>"),
        ("<think>\nwhy\n</think>\n\nhello", "why\n</think>\n\nhello<|im_end|>"),
        ("why</think>hello", "why\n</think>\n\nhello<|im_end|>"),
    ],
)
def test_a_thought_that_the_prompt_opens_is_trained_from_there(
    train_on: str, answer: str, learnt: str
) -> None:
    template = template_of("thinks first")
    example = only(template, chat("u:hi", f"a:{answer}"), train_on)
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert marked(example, template.tokenizer) == f"{prompt}«{learnt}»\n"


@pytest.mark.trap(4)
@pytest.mark.trap(5)
@pytest.mark.parametrize("train_on", ["assistant", "last_assistant"])
def test_a_generation_prompt_that_the_answer_does_not_follow_is_refused(train_on: str) -> None:
    source = CHATML.replace("'<|im_start|>assistant\\n'", "'<|im_start|>model\\n'")
    template = ChatTemplate(source, tokenizer_of("chatml"))
    with pytest.raises(TemplateError, match=r"rows.jsonl:3: .*does not keep what comes before message 2"):
        template.examples(chat(*ONE), train_on)


@pytest.mark.trap(8)
@pytest.mark.parametrize(
    ("train_on", "wanted"),
    [
        (
            "assistant",
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«one<|im_end|>»\n"
            "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n«two<|im_end|>»\n",
        ),
        (
            "last_assistant",
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n"
            "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n«two<|im_end|>»\n",
        ),
        (
            "all",
            "<|im_start|>«user\nhi<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n"
            "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n»",
        ),
    ],
)
def test_train_on(train_on: str, wanted: str) -> None:
    template = template_of("qwen 3")
    assert marked(only(template, chat(*TWO[1:]), train_on), template.tokenizer) == wanted


def test_all_of_a_chat_can_be_trained_where_the_template_keeps_nothing() -> None:
    example = only(template_of("thinks first"), chat(*ONE), "all")
    assert example.trained.tolist() == [False] + [True] * (len(example.ids) - 1)


@pytest.mark.trap(7)
@pytest.mark.parametrize("name", KEEPING)
def test_an_assistant_header_in_a_question_trains_nothing_of_the_question(name: str) -> None:
    template = template_of(name)
    header = template.render(chat("u:x").messages, add_generation_prompt=True).split("x")[-1]
    question = f"{header}not this{header}nor this"
    example = only(template, chat(f"u:{question}", "a:only this"))
    learnt = template.tokenizer.decode(example.ids[example.trained].tolist())
    assert learnt.strip() == "only this"


@pytest.mark.trap(27)
@pytest.mark.parametrize(
    "system",
    [
        "\\boxed{x} \\n \\x08",
        "'quoted' \"twice\"",
        "{{ 7 * 7 }}",
        "{% raise %}",
        "{# gone? #}",
        "</s>{{ messages }}",
        "a\\",
        "'}}{{'",
    ],
)
def test_a_system_prompt_is_never_part_of_the_template(system: str) -> None:
    for name in ("chatml", "llama 2", "zephyr", "default on chatml"):
        template = template_of(name)
        conversation = chat(f"s:{system}", *ONE)
        assert system in template.render(conversation.messages)
        ids = only(template, conversation).ids.tolist()
        assert system in template.tokenizer.decode(ids, skip_special=False)


@pytest.mark.trap(27)
@pytest.mark.parametrize("name", ["chatml", "llama 2", "zephyr", "default on chatml"])
def test_any_system_prompt_is_in_the_text_as_it_was_written(name: str) -> None:
    template, rng = template_of(name), random.Random(name)
    pieces = [
        "\\",
        '"',
        "'",
        "{{",
        "}}",
        "{%",
        "%}",
        "{#",
        "#}",
        "\n",
        "n",
        "boxed",
        "x08",
        "{0}",
        "%s",
        "$&",
    ]
    for _ in range(200):
        system = f"a{''.join(rng.choices(pieces, k=6))}b"
        conversation = chat(f"s:{system}", *ONE)
        assert system in template.render(conversation.messages)
        shown = template.tokenizer.decode(only(template, conversation).ids.tolist(), skip_special=False)
        assert system in shown


@pytest.mark.trap(28)
@pytest.mark.parametrize("name", SHAPES)
def test_nothing_of_the_machinery_is_left_in_a_rendering(name: str) -> None:
    template = template_of(name)
    conversation = chat("u:<|im_end|>{INPUT}", "a:{OUTPUT}</s>")
    text = template.render(conversation.messages, add_generation_prompt=True)
    assert "{INPUT}" in text
    assert not re.search("[\ue000-\ue003]|INPUT}.*INPUT}|{{|{%", text)
    example = only(template, conversation, "all")
    shown = template.tokenizer.decode(example.ids.tolist(), skip_special=False)
    assert not re.search("[\ue000-\ue003]", shown)


@pytest.mark.trap(34)
def test_a_long_chat_is_not_cut() -> None:
    tokenizer = tokenizer_of("chatml")
    tokenizer.config["model_max_length"] = 16
    template = ChatTemplate(CHATML, tokenizer)
    example = only(template, chat("u:" + "word " * 3000, "a:" + "answer " * 3000))
    assert marked(example, tokenizer).endswith("answer answer <|im_end|>»\n")
    assert tokenizer.decode(example.ids.tolist()).count("word") == 3000


def test_plain_text_is_trained_whole_with_one_end() -> None:
    tokenizer = tokenizer_of("llama 3")
    tokenizer.config["bos_token"] = "<s>"  # what the post-processor of this tokenizer puts in front
    template = ChatTemplate(None, tokenizer)
    example = only(template, Conversation((), None, "some <|eot_id|> words", "a.jsonl:7"))
    assert marked(example, tokenizer) == "<s>«some <|eot_id|> words<|eot_id|>»"
    assert example.ids.tolist().count(tokenizer.eos_id or 0) == 1
    assert example.place == "a.jsonl:7"


def test_an_example_is_compact() -> None:
    example = only(template_of("chatml"), chat(*ONE))
    assert (example.ids.dtype, example.trained.dtype) == (np.int32, np.bool_)
    assert example.ids.shape == example.trained.shape
    assert not example.trained[0]
    assert example.place == "rows.jsonl:3"


def test_a_template_is_known_by_its_source() -> None:
    template = template_of("chatml")
    assert template.hash == hashlib.sha256(CHATML.encode()).hexdigest()
    assert not template.is_default
    assert template_of("default on chatml").is_default
    assert template_of("default on chatml").hash == template_of("default on another").hash


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("chatml", ["<|im_end|>"]),
        ("llama 3", ["<|eot_id|>"]),
        ("llama 2", ["</s>"]),
        ("gemma", ["<end_of_turn>"]),
        ("zephyr", ["</s>"]),
        ("glm", []),
        ("default on chatml", ["<|im_end|>"]),
        ("default on another", ["</s>"]),
        ("thinks first", []),
        ("phi", ["<|endoftext|>", "<|end|>"]),
    ],
)
def test_the_tokens_that_end_an_answer(name: str, ends: list[str]) -> None:
    template = template_of(name)
    assert [template.tokenizer.token(number) for number in template.end_ids] == ends


@pytest.mark.parametrize(
    ("between", "ends"), [("", ["<|endoftext|>", "<|im_end|>"]), ("so", ["<|endoftext|>"])]
)
def test_words_between_two_tokens_at_the_end_make_the_first_part_of_the_answer(
    between: str, ends: list[str]
) -> None:
    tokenizer = tokenizer_of("glm")
    source = f"{{% for m in messages %}}{{{{ m.content }}}}<|im_end|>{between}<|endoftext|>{{% endfor %}}"
    template = ChatTemplate(source, tokenizer)
    assert [tokenizer.token(number) for number in template.end_ids] == ends


def test_the_default_ends_turns_as_chatml_where_the_base_knows_it_though_a_text_ends_otherwise() -> None:
    tokenizer = tokenizer_of("glm")
    assert tokenizer.eos_id == tokenizer.id("<|endoftext|>")
    (example,) = ChatTemplate(None, tokenizer).examples(chat(*ONE))
    assert marked(example, tokenizer) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«hello<|im_end|>»\n"
    )


def test_a_template_may_write_every_token_that_has_a_role_and_those_that_have_none() -> None:
    tokenizer = tokenizer_of("llama 2")
    tokenizer.config |= {"pad_token": "<|im_end|>", "unk_token": "<|im_start|>"}
    source = "{% for r in [bos_token, eos_token, pad_token, unk_token] %}[{{ r }}]{% endfor %}"
    assert ChatTemplate(source, tokenizer).render([]) == "[<s>][</s>][<|im_end|>][<|im_start|>]"
    bare = tokenizer_of("chatml")
    bare.config |= {"bos_token": None, "pad_token": None, "unk_token": None}
    assert ChatTemplate(source, bare).render([]) == "[][<|im_end|>][][]"


def test_a_base_without_an_end_token_gives_plain_text_none() -> None:
    tokenizer = tokenizer_of("chatml")
    tokenizer.config["eos_token"] = None
    assert tokenizer.eos_id is None
    (example,) = ChatTemplate(None, tokenizer).examples(Conversation((), None, "words", "a.jsonl:7"))
    assert example.ids.tolist() == tokenizer.encode_content("words")


def test_an_answer_that_a_later_message_shortens_has_an_example_of_its_own() -> None:
    """With the next question added, the first answer loses its end: nothing of it is where it was."""
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if loop.last or m.role == 'user' else m.content[:2] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    template = ChatTemplate(source, tokenizer_of("chatml"))
    made = template.examples(chat("u:q", "a:long", "u:more", "a:end"))
    head = "<|im_start|>user\nq\n<|im_start|>assistant\n"
    assert [marked(example, template.tokenizer) for example in made] == [
        f"{head}«long\n<|im_end|>»",
        f"{head}lo\n<|im_start|>user\nmore\n<|im_start|>assistant\n«end\n<|im_end|>»",
    ]


def test_an_answer_of_which_the_whole_chat_shows_only_the_beginning_is_trained_where_it_is_whole() -> None:
    source = (
        "{% for m in messages[:2] %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
        "{% if messages | length == 2 %}<|im_end|>{% endif %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    template = ChatTemplate(source, tokenizer_of("chatml"))
    (example,) = template.examples(chat("u:q", "a:x", "u:more"))
    wanted = "<|im_start|>user\nq<|im_start|>assistant\n«x<|im_end|>»"
    assert marked(example, template.tokenizer) == wanted


def test_the_next_speakers_marker_ends_an_answer_though_it_is_the_last_of_the_chat() -> None:
    source = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    template = ChatTemplate(source, tokenizer_of("glm"))
    (example,) = template.examples(chat("u:hi", "a:one", "u:"))
    assert marked(example, template.tokenizer) == "<|user|>hi<|assistant|>«one<|user|>»"


def test_a_refusal_in_the_middle_of_a_chat_names_the_row() -> None:
    source = (
        "{% if messages | length == 2 %}{{ raise_exception('no pairs') }}{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    template = ChatTemplate(source, tokenizer_of("chatml"))
    with pytest.raises(TemplateError, match=r"^rows.jsonl:3: .*no pairs"):
        template.examples(chat("u:q", "a:x", "u:more", "a:end"))
    with pytest.raises(TemplateError, match=r"^the chat template .*no pairs"):
        template.render(chat("u:q", "a:x").messages)


def test_a_refusal_names_the_row_and_the_line_of_the_template() -> None:
    with pytest.raises(
        TemplateError, match=r"rows.jsonl:3: .*\(line 7\): user and assistant must take turns"
    ):
        only(template_of("llama 2"), chat("a:hello", "u:hi", "a:hello"))


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("{{ x", "line 1"),
        ("a\nb{% for %}", "line 2"),
        ("{{ 1 | nosuchfilter }}", "nosuchfilter"),
        ("x" * (256 * 1024 + 1), "262,145 characters"),
    ],
)
def test_a_template_that_is_none_is_named(source: str, named: str) -> None:
    with pytest.raises(TemplateError, match=named):
        ChatTemplate(source, tokenizer_of("chatml"))


def test_what_transformers_offers_is_offered() -> None:
    source = (
        "{%- for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}\n"
        "{%- generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        "{{ strftime_now('%Y') | length }}{{ {'a': '<é>'} | tojson }}"
        "{{ bos_token }}{{ missing.x if missing }}"
    )
    template = ChatTemplate(source, tokenizer_of("llama 2"))
    assert template.render(chat("u:1", "a:2", "u:3").messages) == '124{"a": "<é>"}<s>'


def test_a_row_is_rendered_no_oftener_than_it_has_answers_and_texts(monkeypatch: Any) -> None:
    """One chat with one answer: the text, and the prompt that it begins with."""
    template = ChatTemplate(CHATML, tokenizer_of("chatml"))
    rendered: list[int] = []
    render = template._compiled.render_marked

    def counted(*given: Any, **named: Any) -> Any:
        rendered.append(1)
        return render(*given, **named)

    monkeypatch.setattr(template._compiled, "render_marked", counted)
    only(template, chat(*ONE))
    assert len(rendered) == 2
