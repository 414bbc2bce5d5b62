# ruff: noqa: E501  (templates)
"""The chat templates of widely used models, in our own words: their markers, their order, their quirks.

Each family has a small tokenizer that really has its special tokens: byte level (as GPT-2, Llama 3, Qwen) or
SentencePiece as Llama 2's and Gemma's. `says` is an oracle written by hand and without the template: what the
model writes for a message, from the end of the generation prompt to the token that stops it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from data.chat_templates import BASES
from lorimer.data.conversation import Message
from lorimer.data.template import ChatTemplate
from lorimer.data.tokenizer import Tokenizer

Says = Callable[[Message, bool], str]


def own(token: str) -> str:
    """A control token that the model writes, told from one that is spelled in a text."""
    return f"\uf000{token}\uf001"


def plainly(end: str, before: str = "", trim: bool = False) -> Says:
    """The content, then the end."""
    stop = end[: len(end) - len(end.lstrip())] + own(end.lstrip())
    return lambda message, last: before + (message.content.strip() if trim else message.content) + stop


def call_json(call: Any, arguments: str = "arguments") -> str:
    named = call["function"]
    return f'{{"name": "{named["name"]}", "{arguments}": {json.dumps(named["arguments"], ensure_ascii=False)}}}'


def tool_call_tags(end: str) -> Says:
    def says(message: Message, last: bool) -> str:
        calls = [f"<tool_call>\n{call_json(call)}\n</tool_call>" for call in message.tool_calls or ()]
        return "\n".join(([message.content] if message.content or not calls else []) + calls) + own(end)

    return says


@dataclass(frozen=True, slots=True)
class Family:
    """A template and its tokenizer.

    system    first (a system message may begin the chat) or none (refused)
    seam      text: an answer follows ordinary text, so inference that encodes anew what was said may cut it
              elsewhere; marker: it follows a marker
    eos_too   other ids that the base's settings name as ends
    parts     a chat of several answers may need several examples
    """

    source: str
    says: Says
    base: str = "byte level"
    bos: str | None = None
    eos: str = "<|im_end|>"
    markers: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    system: str = "first"
    tools: bool = False
    thinks: bool = False
    rstrip: bool = False
    seam: str = "marker"
    eos_too: tuple[str, ...] = ()
    parts: bool = False


TAGS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")

CHATML = """\
{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def chatml_default(system: str) -> str:
    return (
        "{% if messages and messages[0].role != 'system' %}{{ '<|im_start|>system\\n"
        + system
        + "<|im_end|>\\n' }}{% endif %}\n{#- the rest is plain ChatML #}\n"
    ).replace("\n{#- the rest is plain ChatML #}\n", "") + CHATML


# Tools stand in the system turn, answers of tools are gathered in one user turn.
QWEN25 = """\
{%- set own = messages and messages[0].role == 'system' %}
{%- set system = messages[0].content if own else 'You are a helpful model.' %}
{{- '<|im_start|>system\\n' + system }}
{%- if tools %}
    {{- '\\n\\n# Tools\\n\\nThese functions may be called:\\n<tools>' }}
    {%- for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}
    {{- '\\n</tools>\\n\\nA call is {"name": ..., "arguments": ...} between <tool_call></tool_call>.' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) or (m.role == 'assistant' and not m.tool_calls) %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- if m.content %}{{ '\\n' + m.content }}{% endif %}
        {%- for call in m.tool_calls %}
            {%- set f = call.function if call.function else call %}
            {{- '\\n<tool_call>\\n{"name": "' + f.name + '", "arguments": ' }}{{ f.arguments | tojson }}{{ '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# A thought is shown after the last question only, and there always, an empty one too.
QWEN3 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
    {{- '# Tools\\n<tools>' }}{% for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}{{ '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(looking=true, question=messages | length - 1) %}
{%- for m in messages[::-1] %}
    {%- if ns.looking and m.role == 'user' and not (m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}
        {%- set ns.looking = false %}{% set ns.question = messages | length - loop.index %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set said = m.content %}{% set thought = '' %}
        {%- if m.reasoning_content is string %}
            {%- set thought = m.reasoning_content %}
        {%- elif '</think>' in m.content %}
            {%- set thought = m.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set said = m.content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.question and (loop.last or thought) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + said.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + said }}
        {%- endif %}
        {%- for call in m.tool_calls or [] %}
            {%- if not loop.first or said %}{{ '\\n' }}{% endif %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}{{ call.function.arguments | tojson }}{{ '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
# The same with a prompt that opens the thought.
QWEN3_THINKING = QWEN3.replace(
    "{{- '<|im_start|>assistant\\n' }}\n    {%- if enable",
    "{{- '<|im_start|>assistant\\n<think>\\n' }}\n    {%- if enable",
)


def thought_of(message: Message) -> tuple[str, str]:
    """A message's thought and what it says after it."""
    if "reasoning_content" in message.extra:
        return message.extra["reasoning_content"].strip("\n"), message.content
    if "</think>" not in message.content:
        return "", message.content
    first, rest = message.content.split("</think>")[0], message.content.split("</think>")[-1]
    return first.rstrip("\n").split("<think>")[-1].strip("\n"), rest.lstrip("\n")


def qwen3_says(opened: str) -> Says:
    def says(message: Message, last: bool) -> str:
        thought, said = thought_of(message)
        calls = [f"<tool_call>\n{call_json(call)}\n</tool_call>" for call in message.tool_calls or ()]
        body = said.lstrip("\n")
        # Whether a line end stands before the first call hangs on what is said before it is trimmed.
        body += ("\n" if said and calls else "") + "\n".join(calls)
        return f"<think>\n{thought}\n</think>\n\n{body}{own(IM[1])}".removeprefix(opened)

    return says


LLAMA2 = """\
{% if messages[0].role == 'system' %}{% set turns = messages[1:] %}{% set head = '<<SYS>>\\n' ~ messages[0].content ~ '\\n<</SYS>>\\n\\n' %}
{% else %}{% set turns = messages %}{% set head = '' %}{% endif %}
{% for m in turns %}
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{% set content = head ~ m.content if loop.first else m.content %}
{% if m.role == 'user' %}{{ bos_token ~ '[INST] ' ~ content | trim ~ ' [/INST]' }}{% else %}{{ ' ' ~ content | trim ~ ' ' ~ eos_token }}{% endif %}
{% endfor %}"""

LLAMA3 = """\
{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

# A system turn with dates always; tools in the first question; a call is the whole answer.
LLAMA31 = """\
{{- bos_token }}
{%- set date = date_string if date_string is defined else DATE %}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools %}{{ 'Environment: ipython\\n' }}{% endif %}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: ' + date + '\\n\\n' + system + '<|eot_id|>' }}
{%- for m in turns %}
    {%- if tools and loop.first %}
        {{- '<|start_header_id|>user<|end_header_id|>\\n\\nAnswer with a JSON call of one of these functions.\\n\\n' }}
        {%- for tool in tools %}{{ tool | tojson(indent=4) }}{{ '\\n\\n' }}{% endfor %}
        {{- m.content | trim + '<|eot_id|>' }}
    {%- elif m.tool_calls %}
        {%- if m.tool_calls | length != 1 %}{{ raise_exception('This model makes one call at a time') }}{% endif %}
        {%- set f = m.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + f.name + '", "parameters": ' }}{{ f.arguments | tojson }}{{ '}<|eot_id|>' }}
    {%- elif m.role in ['tool', 'ipython'] %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}{{ m.content | tojson }}{{ '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
HEADERS = (
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|python_tag|>",
    "<|eom_id|>",
)


def llama31_says(message: Message, last: bool) -> str:
    if message.tool_calls:
        return call_json(message.tool_calls[0], "parameters") + own("<|eot_id|>")
    return message.content.strip() + own("<|eot_id|>")


ALTERNATE = """\
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"""
MISTRAL1 = (
    "{{ bos_token }}{% for m in messages %}"
    + ALTERNATE
    + """
{%- if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}{{ m.content + eos_token + ' ' }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""
)
MIXTRAL = (
    """\
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}
{{- bos_token }}{% for m in turns %}"""
    + ALTERNATE
    + """
{%- if m.role == 'user' %}{{ ' [INST] ' + (system + '\\n\\n' if loop.first and system is defined else '') + m.content + ' [/INST]' }}
{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"""
)
# System text and tools stand before the last question only, so they move as the chat goes on.
MISTRAL3 = """\
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}
{%- set questions = turns | selectattr('role', 'equalto', 'user') | list %}
{%- set ns = namespace(user=true) %}
{%- for m in turns %}{% if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}
    {%- if (m.role == 'user') != ns.user %}{{ raise_exception('After the optional system message, roles must alternate user/assistant') }}{% endif %}
    {%- set ns.user = not ns.user %}
{%- endif %}{% endfor %}
{{- bos_token }}
{%- for m in turns %}
    {%- if m.role == 'user' %}
        {%- if tools and m == questions[-1] %}{{ '[AVAILABLE_TOOLS]' + SP + '[' }}{% for tool in tools %}{{ tool | tojson }}{{ '' if loop.last else ', ' }}{% endfor %}{{ '][/AVAILABLE_TOOLS]' }}{% endif %}
        {{- '[INST]' + SP + (system + '\\n\\n' if loop.last and system is defined else '') + m.content + '[/INST]' }}
    {%- elif m.tool_calls %}
        {{- '[TOOL_CALLS]' + SP + '[' }}
        {%- for call in m.tool_calls %}{{ '{"name": "' + call.function.name + '", "arguments": ' }}{{ call.function.arguments | tojson }}{{ ', "id": "' + call.id + '"}' + ('' if loop.last else ', ') }}{% endfor %}
        {{- ']' + eos_token }}
    {%- elif m.role == 'assistant' %}{{ SP + m.content + eos_token }}
    {%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + SP + '{"content": ' + m.content + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}{{ raise_exception('Only user and assistant roles are supported, with the exception of an initial optional system message!') }}
    {%- endif %}
{%- endfor %}"""
MISTRAL_MARKERS = (
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)


def mistral3_says(space: str) -> Says:
    def says(message: Message, last: bool) -> str:
        if message.tool_calls:
            calls = [call_json(call)[:-1] + f', "id": "{call["id"]}"}}' for call in message.tool_calls]
            return f"{own('[TOOL_CALLS]')}{space}[{', '.join(calls)}]{own('</s>')}"
        return f"{space}{message.content}{own('</s>')}"

    return says


MISTRAL7 = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}
{%- else %}{% set system = 'You are a model of 2025. Today is ' + strftime_now('%Y-%m-%d') + '.' %}{% set turns = messages %}{% endif %}
{{- '[SYSTEM_PROMPT]' + system + '[/SYSTEM_PROMPT]' }}
{%- for m in turns %}
    {%- if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}
    {%- elif m.role == 'assistant' %}{{ m.content + eos_token }}
    {%- else %}{{ raise_exception('Only user, system and assistant roles are supported!') }}{% endif %}
{%- endfor %}"""

GEMMA = (
    """\
{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}"""
    + ALTERNATE
    + """
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
)
GEMMA3 = (
    """\
{{ bos_token }}
{%- if messages[0].role == 'system' %}{% set head = messages[0].content + '\\n\\n' %}{% set turns = messages[1:] %}{% else %}{% set head = '' %}{% set turns = messages %}{% endif %}
{%- for m in turns %}"""
    + ALTERNATE
    + """
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + (head if loop.first else '') }}{{ m.content | trim }}{{ '<end_of_turn>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
)

PHI3 = """\
{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""
PHI4 = """\
{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""
PHI4_MINI = """\
{% for m in messages %}
{%- if m.role == 'system' and m.tools %}{{ '<|system|>' + m.content + '<|tool|>' + m.tools + '<|/tool|><|end|>' }}
{%- else %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"""
PHI_MARKERS = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")

# Two modes, chosen by a word in the system text; the day is in the prompt; generated text is marked.
SMOLLM3 = """\
{%- set custom = messages[0].content if messages[0].role == 'system' else '' %}
{%- set mode = '/no_think' if '/no_think' in custom else '/think' %}
{{- '<|im_start|>system\\n## Metadata\\n\\nToday Date: ' + strftime_now('%d %B %Y') + '\\nReasoning Mode: ' + mode + '\\n\\n' }}
{{- custom.replace('/no_think', '').replace('/think', '').rstrip() + '<|im_end|>\\n' }}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {%- generation %}
        {{- '<|im_start|>assistant\\n' + ('' if mode == '/think' else '<think>\\n\\n</think>\\n\\n') + m.content.lstrip('\\n') + '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' + ('' if mode == '/think' else '<think>\\n\\n</think>\\n\\n') }}{% endif %}"""

OLMO2 = """\
{{ bos_token }}{% for m in messages %}
{%- if m.role == 'system' %}{{ '<|system|>\\n' + m.content + '\\n' }}
{%- elif m.role == 'user' %}{{ '<|user|>\\n' + m.content + '\\n' }}
{%- elif not loop.last %}{{ '<|assistant|>\\n' + m.content + eos_token + '\\n' }}
{%- else %}{{ '<|assistant|>\\n' + m.content + eos_token }}{% endif %}
{%- if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"""

GRANITE3 = """\
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}
{%- else %}{% set system = "Knowledge Cutoff Date: April 2024.\\nToday's Date: " + strftime_now('%B %d, %Y') + '.\\nYou are Granite.' %}{% set turns = messages %}{% endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\\n' }}
{%- if tools %}{{ '<|start_of_role|>tools<|end_of_role|>' }}{{ tools | tojson(indent=4) }}{{ '<|end_of_text|>\\n' }}{% endif %}
{%- for m in turns %}
{{- '<|start_of_role|>' + ('tool_response' if m.role == 'tool' else m.role) + '<|end_of_role|>' + m.content }}
{%- for call in m.tool_calls or [] %}{{ '<|tool_call|>' if loop.first else '' }}{{ call.function | tojson }}{% endfor %}
{{- '<|end_of_text|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"""


def granite_says(message: Message, last: bool) -> str:
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.tool_calls or ()]
    return (
        message.content + (own("<|tool_call|>") if calls else "") + "".join(calls) + own("<|end_of_text|>")
    )


COMMAND_R = """\
{{ bos_token }}
{%- if messages[0].role == 'system' %}{% set turns = messages[1:] %}{% set system = messages[0].content %}{% else %}{% set turns = messages %}{% set system = false %}{% endif %}
{%- if system != false %}{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + system + '<|END_OF_TURN_TOKEN|>' }}{% endif %}
{%- for m in turns %}"""
COMMAND_R += (
    ALTERNATE
    + """
{{- '<|START_OF_TURN_TOKEN|>' + ('<|USER_TOKEN|>' if m.role == 'user' else '<|CHATBOT_TOKEN|>') + m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"""
)

ZEPHYR = """\
{% for m in messages %}
{{ '<|' + m.role + '|>\\n' + m.content + eos_token }}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
STABLELM2 = """\
{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
ALPACA = """\
{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System messages are not allowed in this template.') }}{% endif %}
{{- 'You are a good model.\\n\\n' }}
{%- for m in messages %}{% if m.role == 'user' %}{{ '### Instruction\\n' + m.content + '\\n\\n' }}
{%- elif m.role == 'assistant' %}{{ '### Response\\n' + m.content + eos_token + '\\n\\n' }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '### Response\\n' }}{% endif %}"""
FALCON = """\
{% for m in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}
{%- if m.role == 'system' %}{{ 'System: ' + m.content }}{% elif m.role == 'user' %}{{ 'User: ' + m.content }}
{%- else %}{{ 'Falcon: ' + m.content + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '\\nFalcon:' }}{% endif %}"""
FALCON3 = """\
{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>\\n' + m.content + eos_token + ('' if loop.last else '\\n') }}
{%- else %}{{ '<|' + m.role + '|>\\n' + m.content + '\\n' }}{% endif %}
{%- if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"""
DEEPSEEK_LLM = """\
{{ bos_token }}{% for m in messages %}
{%- if m.role == 'user' %}{{ 'User: ' + m.content + '\\n\\n' }}
{%- elif m.role == 'assistant' %}{{ 'Assistant: ' + m.content + eos_token }}
{%- else %}{{ m.content + '\\n\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""
# Thoughts are shown nowhere, and the prompt opens one.
DEEPSEEK_R1 = """\
{%- set ns = namespace(system='') %}
{%- for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content %}{% endif %}{% endfor %}
{{- bos_token + ns.system }}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{ '<｜User｜>' + m.content }}
    {%- elif m.role == 'assistant' %}
        {%- set said = m.content.split('</think>')[-1] if '</think>' in m.content else m.content %}
        {{- '<｜Assistant｜>' + said + '<｜end▁of▁sentence｜>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""


def r1_says(message: Message, last: bool) -> str:
    thought, said = "", message.content
    if "</think>" in message.content:
        thought, said = message.content.split("</think>")[0], message.content.split("</think>")[-1]
    thought = message.extra.get("reasoning_content") or thought.removeprefix("<think>")
    return thought.strip("\n") + "\n</think>\n\n" + said.lstrip("\n") + own("<｜end▁of▁sentence｜>")


OPENCHAT = """\
{{ bos_token }}{% for m in messages %}
{%- if m.role == 'system' %}{{ m.content + '<|end_of_turn|>' }}
{%- else %}{{ 'GPT4 Correct ' + m.role.title() + ': ' + m.content + '<|end_of_turn|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'GPT4 Correct Assistant:' }}{% endif %}"""
VICUNA = """\
{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content + ' ' }}{% set turns = messages[1:] %}{% else %}{{ 'A chat between a user and an assistant. ' }}{% set turns = messages %}{% endif %}
{%- for m in turns %}{{ 'USER: ' + m.content + ' ' if m.role == 'user' else 'ASSISTANT: ' + m.content + eos_token }}{% endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
# An answer ends in a line end and the next speaker's marker.
NEMOTRON = """\
{{ '<extra_id_0>System' }}{% for m in messages %}{% if m.role == 'system' %}{{ '\\n' + m.content.strip() }}{% endif %}{% endfor %}{{ '\\n\\n' }}
{%- for m in messages %}{% if m.role == 'user' %}{{ '<extra_id_1>User\\n' + m.content.strip() + '\\n' }}
{%- elif m.role == 'assistant' %}{{ '<extra_id_1>Assistant\\n' + m.content.strip() + '\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<extra_id_1>Assistant\\n' }}{% endif %}"""
GLM4 = """\
[gMASK]<sop>{% if tools %}{{ '<|system|>\\n# Tools' }}{% for tool in tools %}{{ '\\n\\n## ' + tool.function.name + '\\n\\n' }}{{ tool.function | tojson(indent=4) }}{% endfor %}{% endif %}
{%- for m in messages %}
{%- if m.tool_calls %}{% for call in m.tool_calls %}{{ '<|assistant|>' + call.function.name + '\\n' }}{{ call.function.arguments | tojson }}{% endfor %}
{%- elif m.role == 'tool' %}{{ '<|observation|>\\n' + m.content }}
{%- else %}{{ '<|' + m.role + '|>\\n' + m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
EXAONE = """\
{% for m in messages %}{% if loop.first and m.role != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif %}
{{- '[|' + m.role + '|]' + m.content }}{{ '\\n' if m.role == 'user' else '[|endofturn|]\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"""
LLAMA4 = """\
{{- bos_token }}{% for m in messages %}
{{- '<|header_start|>' + m.role + '<|header_end|>\\n\\n' }}
{%- if m.tool_calls %}{{ '<|python_start|>' + m.content | trim + '<|python_end|>' }}
{%- for call in m.tool_calls %}{{ '{"name": "' + call.function.name + '", "parameters": ' }}{{ call.function.arguments | tojson }}{{ '}' }}{% endfor %}
{{- '<|eot|>' }}{% else %}{{ m.content | trim + '<|eot|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|header_start|>assistant<|header_end|>\\n\\n' }}{% endif %}"""


def llama4_says(message: Message, last: bool) -> str:
    if not message.tool_calls:
        return message.content.strip() + own("<|eot|>")
    calls = "".join(call_json(call, "parameters") for call in message.tool_calls)
    said = own("<|python_start|>") + message.content.strip() + own("<|python_end|>")
    return said + calls + own("<|eot|>")


def hermes_says(message: Message, last: bool) -> str:
    calls = [f"<tool_call>\n{call_json(call)}\n</tool_call>" for call in message.tool_calls or ()]
    return "\n".join([message.content, *calls]) + own("<|im_end|>")


HERMES = """\
{{- bos_token }}
{%- if tools %}{{ '<|im_start|>system\\nYou call functions. <tools> ' }}{% for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}{{ ' </tools><|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ '<|im_start|>tool\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}
{%- for call in m.tool_calls or [] %}{{ '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}{{ call.function.arguments | tojson }}{{ '}\\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

IM_END = plainly("<|im_end|>")
LLAMA = {"base": "llama 3", "bos": "<|begin_of_text|>", "eos": "<|eot_id|>", "markers": HEADERS}
SP = {"bos": "<s>", "eos": "</s>"}  # SentencePiece
R1 = {"bos": "<｜begin▁of▁sentence｜>", "eos": "<｜end▁of▁sentence｜>"}

FAMILIES: dict[str, Family] = {
    "chatml": Family(CHATML, IM_END, markers=IM),
    "yi": Family(CHATML, IM_END, base="prepend", bos="<|startoftext|>", markers=(*IM, "<|im_sep|>")),
    "qwen2": Family(chatml_default("You are a helpful assistant."), IM_END, markers=IM),
    "qwen2.5": Family(QWEN25, tool_call_tags("<|im_end|>"), markers=IM, words=TAGS[:2], tools=True),
    "qwen3": Family(QWEN3, qwen3_says(""), markers=IM, words=TAGS, tools=True, thinks=True, parts=True),
    "qwen3 thinking": Family(
        QWEN3_THINKING, qwen3_says("<think>\n"), markers=IM, words=TAGS, tools=True, thinks=True, parts=True
    ),
    "hermes": Family(
        HERMES,
        hermes_says,
        base="llama 3",
        bos="<|begin_of_text|>",
        markers=IM[:2],
        words=TAGS[:2],
        tools=True,
        seam="text",
    ),
    "llama 2": Family(LLAMA2, plainly(" </s>", " ", trim=True), base="prepend", seam="text", **SP),
    "llama 3": Family(LLAMA3, plainly("<|eot_id|>", trim=True), **LLAMA),
    "llama 3.1": Family(LLAMA31.replace("DATE", "'26 Jul 2024'"), llama31_says, tools=True, **LLAMA),
    "llama 3.2": Family(
        LLAMA31.replace("DATE", "strftime_now('%d %b %Y')"), llama31_says, tools=True, **LLAMA
    ),
    "llama 4": Family(
        LLAMA4,
        llama4_says,
        base="llama 3",
        bos="<|begin_of_text|>",
        eos="<|eot|>",
        tools=True,
        markers=("<|header_start|>", "<|header_end|>", "<|python_start|>", "<|python_end|>"),
    ),
    "mistral v1": Family(MISTRAL1, plainly("</s>"), base="prepend", system="none", seam="text", **SP),
    "mixtral": Family(MIXTRAL, plainly("</s>", " "), base="prepend", seam="text", **SP),
    "mistral v3": Family(
        MISTRAL3.replace("SP", "' '"),
        mistral3_says(" "),
        base="metaspace",
        markers=MISTRAL_MARKERS,
        tools=True,
        parts=True,
        **SP,
    ),
    "mistral nemo": Family(
        MISTRAL3.replace("SP", "''"),
        mistral3_says(""),
        base="llama 3",
        markers=MISTRAL_MARKERS,
        tools=True,
        parts=True,
        **SP,
    ),
    "mistral v7": Family(
        MISTRAL7,
        plainly("</s>"),
        base="llama 3",
        markers=(*MISTRAL_MARKERS, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        **SP,
    ),
    "gemma": Family(
        GEMMA,
        plainly("<end_of_turn>", trim=True),
        base="metaspace",
        bos="<bos>",
        eos="<eos>",
        markers=("<start_of_turn>", "<end_of_turn>"),
        eos_too=("<end_of_turn>",),
        system="none",
    ),
    "gemma 3": Family(
        GEMMA3,
        plainly("<end_of_turn>", trim=True),
        base="metaspace",
        bos="<bos>",
        eos="<eos>",
        markers=("<start_of_turn>", "<end_of_turn>"),
        eos_too=("<end_of_turn>",),
    ),
    "phi 3": Family(
        PHI3,
        lambda m, last: m.content + own("<|end|>") + ("\n" + own("<|endoftext|>") if last else ""),
        base="prepend",
        bos="<s>",
        eos="<|endoftext|>",
        markers=PHI_MARKERS,
        rstrip=True,
        eos_too=("<|end|>",),
    ),
    "phi 4": Family(PHI4, IM_END, markers=(*IM, "<|im_sep|>")),
    "phi 4 mini": Family(
        PHI4_MINI,
        lambda m, last: m.content + own("<|end|>") + (own("<|endoftext|>") if last else ""),
        eos="<|endoftext|>",
        markers=(*PHI_MARKERS, "<|tool|>", "<|/tool|>"),
        eos_too=("<|end|>",),
    ),
    "smollm2": Family(chatml_default("You are a helpful AI assistant named SmolLM."), IM_END, markers=IM),
    "smollm3": Family(
        SMOLLM3,
        lambda m, last: m.content.lstrip("\n") + own("<|im_end|>"),
        base="llama 3",
        markers=IM,
        words=TAGS,
        thinks=True,
    ),
    "olmo 2": Family(
        OLMO2,
        plainly("<|endoftext|>"),
        base="llama 3",
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        seam="text",
    ),
    "granite 3": Family(
        GRANITE3,
        granite_says,
        eos="<|end_of_text|>",
        tools=True,
        markers=("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
    ),
    "command r": Family(
        COMMAND_R,
        plainly("<|END_OF_TURN_TOKEN|>", trim=True),
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        markers=("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
    ),
    "zephyr": Family(ZEPHYR, plainly("</s>"), base="prepend", seam="text", **SP),
    "tinyllama": Family(STABLELM2, plainly("</s>"), base="prepend", seam="text", **SP),
    "stablelm 2": Family(
        STABLELM2,
        plainly("<|endoftext|>"),
        eos="<|endoftext|>",
        markers=("<|user|>", "<|assistant|>", "<|system|>"),
    ),
    "starcoder2": Family(
        ALPACA,
        plainly("<|endoftext|>"),
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        system="none",
        seam="text",
    ),
    "falcon": Family(FALCON, plainly("<|endoftext|>", " "), eos="<|endoftext|>", seam="text"),
    "falcon 3": Family(FALCON3, plainly("<|endoftext|>"), eos="<|endoftext|>", seam="text"),
    "deepseek llm": Family(DEEPSEEK_LLM, plainly(R1["eos"], " "), seam="text", **R1),
    "deepseek r1": Family(
        DEEPSEEK_R1,
        r1_says,
        base="llama 3",
        markers=("<｜User｜>", "<｜Assistant｜>"),
        words=TAGS[2:],
        thinks=True,
        parts=True,
        **R1,
    ),
    "internlm 2": Family("{{ bos_token }}" + CHATML, IM_END, base="prepend", bos="<s>", markers=IM[:2]),
    "openchat": Family(
        OPENCHAT,
        plainly("<|end_of_turn|>", " "),
        base="prepend",
        bos="<s>",
        eos="<|end_of_turn|>",
        seam="text",
    ),
    "vicuna": Family(VICUNA, plainly("</s>", " "), base="prepend", seam="text", **SP),
    "nemotron": Family(
        NEMOTRON,
        lambda m, last: m.content.strip() + "\n" + own("</s>" if last else "<extra_id_1>"),
        base="metaspace",
        bos="<s>",
        eos="</s>",
        markers=("<extra_id_0>", "<extra_id_1>"),
        eos_too=("<extra_id_1>",),
        seam="text",
    ),
    "glm 4": Family(
        GLM4,
        lambda m, last: "",
        eos="<|endoftext|>",
        markers=("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>"),
        eos_too=("<|user|>", "<|observation|>"),
    ),
    "exaone": Family(
        EXAONE,
        plainly("[|endofturn|]"),
        bos="[BOS]",
        eos="[|endofturn|]",
        markers=("[|system|]", "[|user|]", "[|assistant|]"),
    ),
}


@cache
def tokenizer_json(name: str) -> str:
    """A tokenizer of the family's kind with the family's own added tokens and no others."""
    family = FAMILIES[name]
    described = json.loads(BASES[family.base]())
    wanted = [family.eos, *([family.bos] if family.bos else []), *family.markers]
    needed = {"<unk>"} if described["model"].get("unk_token") else set()
    described["added_tokens"] = [t for t in described["added_tokens"] if t["content"] in needed]
    described["post_processor"] = None
    backend = Backend.from_str(json.dumps(described))
    # Real markers take white space after them only where the family's do.
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False, rstrip=family.rstrip)
            for token in dict.fromkeys(wanted)
        ]
    )
    backend.add_tokens([AddedToken(word, special=False, normalized=False) for word in family.words])
    return str(backend.to_str())


def config(name: str) -> dict[str, str]:
    family = FAMILIES[name]
    return {"eos_token": family.eos} | ({"bos_token": family.bos} if family.bos else {})


@cache
def template(name: str) -> ChatTemplate:
    family = FAMILIES[name]
    tokenizer = Tokenizer(tokenizer_json(name), config(name))
    tokenizer.more_eos_ids = tuple(tokenizer.id(token) or 0 for token in family.eos_too)
    return ChatTemplate(family.source, tokenizer)
