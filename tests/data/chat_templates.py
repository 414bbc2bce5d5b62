"""The shapes that chat templates come in, in our own words, each with a tokenizer of its kind.

`marked` shows an example as text with its trained stretches between « and ».
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from data.hard_strings import byte_level, llama3_like, metaspace, prepend
from lorimer.data.conversation import Conversation, Message
from lorimer.data.template import ChatTemplate, Example
from lorimer.data.tokenizer import Tokenizer

CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {{- message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# The system text goes into the first question; every question begins anew with <s>.
LLAMA2 = """\
{% if messages[0].role == 'system' %}
{% set head = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}{% set turns = messages[1:] %}
{% else %}{% set head = '' %}{% set turns = messages %}
{% endif %}
{% for message in turns %}
{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('user and assistant must take turns') }}
{% endif %}
{% if message.role == 'user' %}
{{- bos_token + '[INST] ' + (head if loop.first else '') + message.content + ' [/INST]' -}}
{% else %}
{{- ' ' + message.content + ' ' + eos_token -}}
{% endif %}
{% endfor %}"""

# No system role, the assistant is called model, texts are trimmed.
GEMMA = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}
{%- for message in messages %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""

# Role names are ordinary text; only the end of a turn is a control token.
ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

# Markers that eat the whitespace after them, and one end of text after the whole chat.
PHI = """\
{% for message in messages %}
{{- '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' -}}
{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

# An answer has no end of its own: the next speaker's marker ends it.
GLM = """\
[gMASK]<sop>{% for message in messages %}<|{{ message.role }}|>
{{ message.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""

# Thinking is kept only after the last question.
QWEN3 = """\
{%- set ns = namespace(last=0) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
{%- set content = message.content %}
{%- if message.role == 'assistant' and '</think>' in content and loop.index0 < ns.last %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

TOOLS = """\
{%- if tools %}
{{- '<|im_start|>system\\nTools:\\n' }}{% for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

# The generation prompt opens a thought that the finished chat does not show.
THINKS_FIRST = """\
{% for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"""


@dataclass(frozen=True, slots=True)
class Shape:
    source: str | None
    base: str = "byte level"
    bos: str | None = None
    eos: str = "<|im_end|>"
    markers: tuple[str, ...] = ()
    rstrip: bool = False
    eos_too: tuple[str, ...] = ()  # other ids that the base's settings name as ends


SHAPES = {
    "chatml": Shape(CHATML),
    "llama 3": Shape(
        LLAMA3, "llama 3", "<|begin_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>")
    ),
    "llama 2": Shape(LLAMA2, "prepend", "<s>", "</s>"),
    "mistral": Shape(LLAMA2, "metaspace", "<s>", "</s>", ("[INST]", "[/INST]")),
    "gemma": Shape(GEMMA, "metaspace", "<bos>", "<end_of_turn>", ("<start_of_turn>",)),
    "zephyr": Shape(ZEPHYR, "prepend", "<s>", "</s>"),
    "phi": Shape(
        PHI, "prepend", "<s>", "<|endoftext|>", ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"), True
    ),
    "glm": Shape(
        GLM,
        eos="<|endoftext|>",
        markers=("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>"),
        eos_too=("<|user|>",),
    ),
    "qwen 3": Shape(QWEN3),
    "tools": Shape(TOOLS),
    "default on chatml": Shape(None),
    "default on another": Shape(None, "prepend", "<s>", "</s>"),
    "thinks first": Shape(THINKS_FIRST),
}
BASES = {"byte level": byte_level, "llama 3": llama3_like, "prepend": prepend, "metaspace": metaspace}
WITHOUT_CHATML = ("default on another",)


@cache
def tokenizer_json(name: str) -> str:
    shape = SHAPES[name]
    described = json.loads(BASES[shape.base]())
    if name in WITHOUT_CHATML:
        kept = [token for token in described["added_tokens"] if "im_" not in token["content"]]
        described["added_tokens"] = kept
    backend = Backend.from_str(json.dumps(described))
    wanted = [shape.eos, *([shape.bos] if shape.bos else []), *shape.markers]
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False, rstrip=shape.rstrip) for token in wanted]
    )
    return str(backend.to_str())


def config(name: str) -> dict[str, str | None]:
    shape = SHAPES[name]
    return {"bos_token": shape.bos, "eos_token": shape.eos}


def tokenizer(name: str) -> Tokenizer:
    made = Tokenizer(tokenizer_json(name), config(name))
    made.more_eos_ids = tuple(made.id(token) or 0 for token in SHAPES[name].eos_too)
    return made


@cache
def template(name: str) -> ChatTemplate:
    return ChatTemplate(SHAPES[name].source, tokenizer(name))


ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}


def chat(*turns: str) -> Conversation:
    """chat("u:hi", "a:hello"); roles by their first letters."""
    return Conversation(
        tuple(Message(ROLES[turn[0]], turn[2:]) for turn in turns), None, None, "rows.jsonl:3"
    )


def only(template: ChatTemplate, conversation: Conversation, train_on: str = "assistant") -> Example:
    """The one example that a chat becomes."""
    (example,) = template.examples(conversation, train_on)
    return example


def marked(example: Example, tokenizer: Tokenizer) -> str:
    shown, ids, trained = "", example.ids.tolist(), example.trained.tolist()
    at = 0
    while at < len(ids):
        end = at
        while end < len(ids) and trained[end] == trained[at]:
            end += 1
        # Decoded after what came before, so that no decoder takes a space for the dummy one.
        before = tokenizer.decode(ids[:at], skip_special=False)
        text = tokenizer.decode(ids[:end], skip_special=False)[len(before) :]
        shown += f"«{text}»" if trained[at] else text
        at = end
    return shown
