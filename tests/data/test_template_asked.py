"""What a template is asked about itself: the day, its marks, what it refuses, where an answer begins."""

from __future__ import annotations

from datetime import datetime

import numpy as np
import pytest

from data.chat_templates import chat, marked, only
from data.chat_templates import template as template_of
from data.chat_templates import tokenizer as tokenizer_of
from lorimer.data.conversation import Conversation, Message
from lorimer.data.template import ChatTemplate
from lorimer.errors import TemplateError

ONE = ("u:hi", "a:hello")
TOOL = {"type": "function", "function": {"name": "light", "description": "on or off"}}
ASKED = "{% if add_generation_prompt %}<|im_start|>assistant\n"
OPENING = ASKED + "{% endif %}"
STRICT = (
    "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}"
    "{{ raise_exception('a role') }}{% endif %}"
)
PARTS = "{% generation %}{{ m.content }}{% endgeneration %}{% generation %}<|im_end|>{% endgeneration %}"
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"


@pytest.mark.parametrize(
    ("source", "writes"),
    [
        (f"{STRICT}{{{{ strftime_now('%Y') }}}}{TURN}{{% endfor %}}{OPENING}", True),
        (f"{STRICT}{TURN}{{% endfor %}}{ASKED}{{{{ strftime_now('%Y') }}}}{{% endif %}}", True),
        (f"{STRICT}{TURN}{{% endfor %}}{OPENING}", False),
        (f"{{{{ strftime_now('%Y') }}}}{{{{ raise_exception('nothing') }}}}{OPENING}", False),
    ],
    ids=["before each turn", "in the generation prompt", "nowhere", "in a refusal"],
)
def test_whether_a_prompt_says_which_day_it_is(source: str, writes: bool) -> None:
    template = ChatTemplate(source, tokenizer_of("chatml"))
    assert template.writes_date is writes


def test_the_day_that_is_held_is_the_one_that_is_written() -> None:
    template = ChatTemplate(f"{{{{ strftime_now('%d.%m.%Y') }}}}{OPENING}", tokenizer_of("chatml"))
    template.now = datetime(1999, 7, 6)
    assert template.render(chat("u:x").messages) == "06.07.1999"
    assert template.writes_date


@pytest.mark.parametrize(
    ("turn", "differ"),
    [
        ("{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>", ("b", "b<|im_end|>")),
        ("{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}", None),
        (
            PARTS,
            None,
        ),
        ("{{ m.content }}<|im_end|>", None),
        ("{{ m.content }}<|im_end|>{{ raise_exception('no') }}", None),
    ],
    ids=["without its end", "as trained", "in two parts", "nothing", "a refusal"],
)
def test_what_a_template_marks_and_what_is_trained(turn: str, differ: tuple[str, str] | None) -> None:
    source = (
        f"{STRICT}<|im_start|>{{{{ m.role }}}}\n{{% if m.role == 'user' %}}{{{{ m.content }}}}<|im_end|>"
        f"{{% else %}}{turn}{{% endif %}}\n{{% endfor %}}{OPENING}"
    )
    assert ChatTemplate(source, tokenizer_of("chatml")).marks_otherwise == differ


def test_a_prompt_with_tools_is_what_comes_before_its_answer() -> None:
    template = template_of("tools")
    messages = (Message("user", "on"), Message("assistant", "yes"))
    example = only(template, Conversation(messages, (TOOL,), None, "a:1"))
    before = example.ids[: int(np.argmax(example.trained))].tolist()
    assert template.prompt_ids(messages[:1], (TOOL,)) == before
    assert template.prompt_ids(messages[:1]) != before


def test_a_refused_chat_says_what_to_do() -> None:
    with pytest.raises(TemplateError) as caught:
        template_of("gemma").examples(chat("s:Sys.", *ONE))
    assert "takes no system message" in (caught.value.fix or "")


REFUSES = (
    "{% if add_generation_prompt and messages[-1].role == 'assistant' %}"
    "{{ raise_exception('ask') }}{% endif %}"
)
NO_THOUGHT = (
    "{% if m.role == 'assistant' and '</think>' not in m.content %}"
    "{{ raise_exception('think') }}{% endif %}"
)
BOT = "{% if add_generation_prompt %}<|im_start|>bot\n{% endif %}"


@pytest.mark.parametrize(
    ("source", "turns", "says"),
    [
        (
            f"{REFUSES}{{% for m in messages %}}{TURN}{{% endfor %}}{OPENING}",
            ("u:x", "a:y", "a:z"),
            "ask.*message 3",
        ),
        (
            f"{{% for m in messages %}}{NO_THOUGHT}{TURN}{{% endfor %}}{BOT}",
            ("u:x", "a:t</think>y"),
            "before message 2",
        ),
        (
            f"{{% for m in messages %}}{{{{ m.content }}}}<|im_end|>{{% endfor %}}{BOT}",
            ("a:y",),
            "before message 1",
        ),
    ],
    ids=["a prompt that is refused", "another answer that is refused", "nothing before the answer"],
)
def test_an_answer_without_a_prompt_that_it_follows_is_refused(
    source: str, turns: tuple[str, ...], says: str
) -> None:
    with pytest.raises(TemplateError, match=says):
        ChatTemplate(source, tokenizer_of("chatml")).examples(chat(*turns))


@pytest.mark.parametrize("space", ["", " "])
def test_a_joined_answer_ends_where_it_ends_and_begins_where_the_template_lets_it(space: str) -> None:
    """The prompt opens a thought that the chat does not show; more of the chat follows the answer."""
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        f"{{{{ '{space}' }}}}{{% endif %}}{{{{ m.content + '<|im_end|>\n' }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    )
    template = ChatTemplate(source, tokenizer_of("chatml"))
    (example,) = template.examples(chat("u:x", "a:<think>why</think>y", "u:more"))
    assert marked(example, template.tokenizer) == (
        "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n<think>\n«why\n</think>\n\ny<|im_end|>»\n"
    )


@pytest.mark.parametrize(
    ("content", "thought", "shown", "learnt"),
    [
        ("<think>XaX</think>\n\nXy", "", "m.content", "XaX\n</think>\n\nXy"),
        ("<think> a \n</think>\n\n y", "", "m.content", " a \n</think>\n\n y"),
        ("<think>a</think>b</think>c", "", "m.content", "a\n</think>\n\nb</think>c"),
        ("<think>why</think>y", "", "m.content.split('</think>')[-1]", "why\n</think>\n\ny"),
        ("y", "why", "m.content", "why\n</think>\n\ny"),
        ("<think>a</think>y", "why", "m.content", "why\n</think>\n\ny"),
    ],
)
def test_a_thought_that_the_prompt_opens_is_written_as_the_model_would(
    content: str, thought: str, shown: str, learnt: str
) -> None:
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        f"{{{{ {shown} + '<|im_end|>\\n' }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
    )
    template = ChatTemplate(source, tokenizer_of("chatml"))
    answer = Message("assistant", content, extra={"reasoning_content": thought} if thought else {})
    example = only(template, Conversation((Message("user", "x"), answer), None, None, "a:1"))
    trained = marked(example, template.tokenizer).partition("«")[2].partition("»")[0]
    assert trained == f"{learnt}<|im_end|>"
