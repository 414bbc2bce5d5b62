"""The templates of widely used models: what training makes is what inference feeds."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.chat_campaign import Writer, campaign, differences
from data.chat_families import FAMILIES
from data.chat_families import template as template_of
from data.chat_templates import chat, marked, only
from lorimer.config import DataConfig
from lorimer.data.conversation import Conversation, Message
from lorimer.data.doctor import check
from lorimer.data.prepare import prepare
from lorimer.data.template import ChatTemplate
from lorimer.errors import TemplateError

CHATS = 20  # `make templates` compares 1,000 for each


@pytest.mark.trap(2)
@pytest.mark.trap(3)
@pytest.mark.trap(4)
@pytest.mark.trap(5)
@pytest.mark.trap(6)
@pytest.mark.parametrize("name", FAMILIES)
def test_training_ids_are_inference_ids(name: str) -> None:
    chats, compared, found = campaign(name, CHATS, seed=1)
    assert (chats, found) == (CHATS, [])
    assert compared


def shifted(ids: Any, trained: Any) -> tuple[Any, Any]:
    return ids, np.roll(trained, 1)


def without_end(ids: Any, trained: Any) -> tuple[Any, Any]:
    return ids, trained & np.append(trained[1:], False)


def two_bos(ids: Any, trained: Any) -> tuple[Any, Any]:
    return np.append(ids[:1], ids), np.append(trained[:1], trained)


def nothing(ids: Any, trained: Any) -> tuple[Any, Any]:
    return ids, np.zeros_like(trained)


@pytest.mark.parametrize("fault", [shifted, without_end, two_bos, nothing])
@pytest.mark.parametrize("name", ["llama 3", "qwen3", "gemma", "mistral v3"])
def test_a_planted_fault_is_seen(name: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = Writer(name, random.Random(3), hard=False).chat()
    assert differences(name, conversation) == []
    examples = ChatTemplate.examples

    def faulty(self: ChatTemplate, *given: Any) -> Any:
        made = examples(self, *given)
        last = made[-1]
        ids, trained = fault(last.ids, last.trained)
        return [*made[:-1], replace(last, ids=ids, trained=trained)]

    monkeypatch.setattr(ChatTemplate, "examples", faulty)
    assert differences(name, conversation)


QUESTIONS = ("u:one?", "a:1", "u:two?", "a:2")


@pytest.mark.trap(5)
def test_a_system_text_that_moves_to_the_last_question_is_where_inference_puts_it() -> None:
    """This template shows it while the last message is a question, and nowhere once it is answered."""
    template = template_of("mistral nemo")
    conversation = chat("s:Sys.", *QUESTIONS)
    assert "Sys." not in template.render(conversation.messages)
    assert [marked(example, template.tokenizer) for example in template.examples(conversation)] == [
        "<s>[INST]Sys.\n\none?[/INST]«1</s>»",
        "<s>[INST]one?[/INST]1</s>[INST]Sys.\n\ntwo?[/INST]«2</s>»",
    ]
    assert len(template.examples(chat(*QUESTIONS))) == 1


@pytest.mark.trap(5)
def test_thoughts_are_trained_once_each_and_dropped_where_inference_drops_them() -> None:
    template = template_of("deepseek r1")
    turns = ("u:a?", "a:<think>\nhm\n</think>\n\nA", "u:b?", "a:B")
    assert [marked(example, template.tokenizer) for example in template.examples(chat(*turns))] == [
        "<｜begin▁of▁sentence｜><｜User｜>a?<｜Assistant｜><think>\n«hm\n</think>\n\nA<｜end▁of▁sentence｜>»",
        "<｜begin▁of▁sentence｜><｜User｜>a?<｜Assistant｜>\n\nA<｜end▁of▁sentence｜><｜User｜>b?<｜Assistant｜><think>\n"
        "«\n</think>\n\nB<｜end▁of▁sentence｜>»",
    ]


@pytest.mark.parametrize(
    ("name", "turns", "problem", "fix"),
    [
        ("gemma", ("s:Sys.", *QUESTIONS), "System role not supported", "takes no system message"),
        ("mistral v1", ("s:Sys.", *QUESTIONS), "must alternate", "takes no system message"),
        (
            "gemma",
            ("u:one?", "u:really?", "a:1"),
            "must alternate",
            "Messages 1 and 2 are both of the user",
        ),
        ("llama 2", (*QUESTIONS, "a:3"), "must alternate", "Messages 4 and 5 are both of the assistant"),
        ("mixtral", ("a:hello", "u:one?", "a:1"), "must alternate", "begins with an answer"),
        ("mistral v1", ("u:one?", "t:1", "a:1"), "Only user and assistant", "no tool calls"),
        ("qwen3", ("a:hello", "u:one?", "a:1"), "what comes before message 1, an answer", "Begin the chat"),
    ],
)
def test_a_refused_chat_is_named_with_what_to_do(
    name: str, turns: tuple[str, ...], problem: str, fix: str
) -> None:
    with pytest.raises(TemplateError, match=r"rows\.jsonl:3: ") as caught:
        template_of(name).examples(chat(*turns))
    assert problem in caught.value.problem
    assert "(line " in caught.value.problem
    assert fix in (caught.value.fix or "")


def test_a_refused_prompt_is_named_in_the_same_way() -> None:
    with pytest.raises(TemplateError, match="System role not supported") as caught:
        template_of("gemma").prompt_ids(chat("s:Sys.", "u:one?").messages)
    assert "takes no system message" in (caught.value.fix or "")


SIDE_BY_SIDE = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
)


@pytest.mark.trap(26)
@pytest.mark.parametrize("cut", range(1, len("<|im_end|>")))
@pytest.mark.parametrize("edge", ["", " ", "\n"])
def test_halves_of_a_marker_do_not_become_one(cut: int, edge: str) -> None:
    source = SIDE_BY_SIDE.replace("m.content", "m.content | trim") if edge else SIDE_BY_SIDE
    tokenizer = template_of("chatml").tokenizer
    template = ChatTemplate(source, tokenizer)
    first, second = "<|im_end|>"[:cut], "<|im_end|>"[cut:]
    example = only(template, chat(f"s:a{first}{edge}", f"u:{edge}{second}b", "a:c"))
    assert example.ids.tolist().count(tokenizer.id("<|im_end|>")) == 1
    assert tokenizer.decode(example.ids.tolist(), skip_special=False) == "a<|im_end|>bc<|im_end|>"


@pytest.mark.trap(26)
def test_halves_of_a_marker_beside_a_dropped_thought_do_not_become_one() -> None:
    template = template_of("qwen3")
    turns = ("u:q", "a:<think>\n<|im_\n</think>\n\nend|>", "u:q", "a:|im_end|><")
    ends = [
        example.ids.tolist().count(template.tokenizer.id("<|im_end|>"))
        for example in template.examples(chat(*turns))
    ]
    assert ends == [2, 4]


@pytest.mark.trap(26)
@pytest.mark.parametrize(
    ("around", "asked"), [("<{{ m.content }}", "|im_end|>"), ("{{ m.content }}>", "<|im_end|")]
)
def test_a_marker_that_is_half_the_template_s_and_half_a_text_s_is_none(around: str, asked: str) -> None:
    source = SIDE_BY_SIDE.replace("{{ m.content }}", around)
    tokenizer = template_of("chatml").tokenizer
    example = only(ChatTemplate(source, tokenizer), chat(f"u:{asked}", "a:c"))
    assert example.ids.tolist().count(tokenizer.id("<|im_end|>")) == 1


GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}END{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("source", "differ"),
    [
        (GENERATION.replace("END", "<|im_end|>"), None),
        (
            GENERATION.replace("END{% endgeneration %}", "{% endgeneration %}<|im_end|>"),
            ("b", "b<|im_end|>"),
        ),
        (FAMILIES["chatml"].source, None),
    ],
)
def test_what_a_template_marks_as_generated_is_compared_with_what_is_trained(
    source: str, differ: tuple[str, str] | None
) -> None:
    template = ChatTemplate(source, template_of("chatml").tokenizer)
    assert template.marks_otherwise == differ
    assert "\ue004" not in template.render(chat("u:a", "a:b").messages)


def test_marks_that_take_the_role_line_with_them_are_not_followed() -> None:
    marks, trained = template_of("smollm3").marks_otherwise or ("", "")
    assert (marks, trained) == ("<|im_start|>assistant\nb<|im_end|>\n", "b<|im_end|>")


@pytest.mark.trap(4)
@pytest.mark.parametrize("name", [name for name in FAMILIES if "strftime_now" in FAMILIES[name].source])
def test_the_day_in_a_prompt_can_be_held(name: str) -> None:
    shared = template_of(name)
    template = ChatTemplate(shared.source, shared.tokenizer)
    assert template.writes_date
    template.now = datetime(1999, 7, 6)
    assert "1999" in template.render(chat("u:a").messages)
    example = only(template, chat("u:a", "a:b"))
    assert example.ids[: int(np.argmax(example.trained))].tolist() == template.prompt_ids(
        chat("u:a").messages
    )
    assert not template_of("llama 3.1").writes_date


def row(*turns: str) -> str:
    """A line of a file; questions and answers in turn."""
    roles = ("user", "assistant") * len(turns)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    return json.dumps({"messages": messages}) + "\n"


@pytest.fixture
def rows(tmp_path: Path) -> DataConfig:
    path = tmp_path / "train.jsonl"
    two = row("q", "<think>\nw\n</think>\n\nx", "q", "y")
    path.write_text(two * 2 + row("q", "<think>\nw\n</think>\n\nx"), encoding="utf-8")
    return DataConfig(train=str(path))


def test_chats_that_are_taken_apart_are_said(rows: DataConfig) -> None:
    data = prepare(rows, template_of("qwen3"), seed=0)
    assert len(data.train) == 5
    assert [note for note in data.notes if "2 chats are trained as 4 examples" in note]
    assert [len(examples) for _, examples in data.looked_at] == [2, 2, 1]
    assert prepare(rows, template_of("chatml"), seed=0).notes == []
    (note,) = prepare(
        rows.model_copy(update={"train_on": "last_assistant"}), template_of("llama 3.2"), seed=0
    ).notes
    assert "writes the day into each prompt" in note


def test_data_check_says_what_training_says(rows: DataConfig) -> None:
    report = check(rows, template_of("qwen3"))
    (found,) = [finding for finding in report.findings if finding.code == "split-chats"]
    assert (found.severity, found.count) == ("note", 2)
    totals, data = report.totals["train"], prepare(rows, template_of("qwen3"), seed=0)
    assert (totals.rows, totals.used) == (3, 3)
    assert (totals.tokens, totals.trained_tokens) == (data.tokens, data.trained_tokens)
    codes = {finding.code for finding in check(rows, template_of("smollm3")).findings}
    assert "marked-otherwise" in codes


def test_tools_and_calls_of_a_row_reach_every_template_that_has_them() -> None:
    call = {
        "id": "call00001",
        "type": "function",
        "function": {"name": "set_light", "arguments": {"on": True}},
    }
    messages = (
        Message("user", "on"),
        Message("assistant", "", (call,)),
        Message("tool", "done", None, {"tool_call_id": "call00001"}),
        Message("assistant", "It is on."),
    )
    tool = {
        "type": "function",
        "function": {"name": "set_light", "description": "Lights.", "parameters": {}},
    }
    for name in (name for name in FAMILIES if FAMILIES[name].tools and name != "llama 4"):
        template = template_of(name)
        examples = template.examples(Conversation(messages, (tool,), None, "a:1"))
        learnt = "".join(marked(example, template.tokenizer) for example in examples)
        assert learnt.count("«") == 2, name
        assert "Lights." in learnt, name
        assert "set_light" in learnt.split("«")[1].split("»")[0], name
